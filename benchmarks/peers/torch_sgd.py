"""torch.optim.SGD's implementations, and its foreach functions in place of single kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def fused(params: Sequence[Parameter], lr: float, momentum: float) -> torch.optim.SGD:
    """One fused kernel over all tensors."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum, fused=True)


def foreach(params: Sequence[Parameter], lr: float, momentum: float) -> torch.optim.SGD:
    """One multi-tensor call an operation."""
    return torch.optim.SGD(params, lr=lr, momentum=momentum, foreach=True)


def ascend(
    params: list[Tensor], grads: list[Tensor], backups: list[Tensor], *, alpha: float
) -> None:
    """b <- x; x <- x + alpha g."""
    torch._foreach_copy_(backups, params)
    torch._foreach_add_(params, grads, alpha=alpha)


def descend(
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
