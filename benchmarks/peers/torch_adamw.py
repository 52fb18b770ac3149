"""torch.optim.AdamW's implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

CLASS = torch.optim.AdamW
ACCESSES = 7  # it reads x, g, m, v and writes x, m, v


def settings(lr: float) -> dict[str, Any]:
    """The options that all benchmarks use."""
    return {"lr": lr}


def fused(params: Sequence[Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW with one fused kernel over all tensors."""
    return torch.optim.AdamW(params, **settings(lr), fused=True)


def foreach(params: Sequence[Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW with one multi-tensor call for each operation."""
    return torch.optim.AdamW(params, **settings(lr), foreach=True)


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Call the fused kernel alone."""
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((), float(step), device=p.device) for p in params],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=False,
        maximize=False,
    )
