"""torch.optim.AdamW's implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

CLASS = torch.optim.AdamW


def settings(lr: float) -> dict[str, Any]:
    """Those of the contests."""
    return {"lr": lr}


def fused(params: Sequence[Parameter], lr: float) -> torch.optim.AdamW:
    """One fused kernel over all tensors."""
    return torch.optim.AdamW(params, **settings(lr), fused=True)


def foreach(params: Sequence[Parameter], lr: float) -> torch.optim.AdamW:
    """One multi-tensor call an operation."""
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
    """The fused kernel alone."""
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
