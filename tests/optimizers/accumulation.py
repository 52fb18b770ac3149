"""Closures that add to the gradients that are there, and ways to clear these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO
from optimizers.problems import METHODS, backward, loss_of


def adamw(params: Any) -> Any:
    return ef.AdamW(params, lr=0.1, rho=RHO)


def wrapped(params: Any) -> Any:
    return ef.SharpnessAware(torch.optim.SGD(params, lr=0.1), "two_step_usam", RHO)


MAKERS: dict[str, Callable[[Any], Any]] = {
    **{name: (lambda params, m=m: m.make(params, lr=0.1)) for name, m in METHODS.items()},
    "adamw": adamw,
    "wrapper": wrapped,
}


def adding(opt: Any, params: list[nn.Parameter]) -> Callable[[], Tensor]:
    """A closure that adds its gradient to what is there."""

    def closure() -> Tensor:
        loss = loss_of(params)
        backward(opt, loss)
        return loss

    return closure


def none(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None


def in_place(params: list[nn.Parameter]) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.zero_()


def through_data(params: list[nn.Parameter]) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.data.zero_()


CLEARING = {"None": none, "in place": in_place, "through .data": through_data}
