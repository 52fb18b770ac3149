"""torch.optim.SGD's implementations, and its foreach functions in place of single kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

CLASS = torch.optim.SGD
ACCESSES = 5  # with momentum it reads x, g, m and writes x, m


def settings(lr: float) -> dict[str, Any]:
    """The options that all benchmarks use."""
    return {"lr": lr, "momentum": 0.9}


def fused(params: Sequence[Parameter], lr: float) -> torch.optim.SGD:
    """SGD with one fused kernel over all tensors."""
    return torch.optim.SGD(params, **settings(lr), fused=True)


def foreach(params: Sequence[Parameter], lr: float) -> torch.optim.SGD:
    """SGD with one multi-tensor call for each operation."""
    return torch.optim.SGD(params, **settings(lr), foreach=True)


def perturb(
    params: list[Tensor], grads: list[Tensor], backups: list[Tensor], *, alpha: float
) -> None:
    """b <- x; x <- x + alpha g."""
    torch._foreach_copy_(backups, params)
    torch._foreach_add_(params, grads, alpha=alpha)


def perturb_unsaved(params: list[Tensor], grads: list[Tensor], *, alpha: float) -> None:
    """x <- x + alpha g."""
    torch._foreach_add_(params, grads, alpha=alpha)


def perturb_hvp(
    params: list[Tensor],
    grads: list[Tensor],
    base_grads: list[Tensor],
    backups: list[Tensor],
    *,
    alpha: float,
    eps: float,
) -> None:
    """x <- b + alpha (g - g0) / eps."""
    torch._foreach_copy_(params, grads)
    torch._foreach_sub_(params, base_grads)
    torch._foreach_mul_(params, alpha / eps)
    torch._foreach_add_(params, backups)


def sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    backups: list[Tensor],
    *,
    lr: float,
    momentum: float,
) -> None:
    """x <- b; m <- momentum m + g; x <- x - lr m."""
    torch._foreach_copy_(params, backups)
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    torch._foreach_add_(params, momenta, alpha=-lr)
