"""Sharpness-aware training in plain tensors, without this library."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Loss = Callable[[], Tensor]


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together."""
    return torch.stack([t.square().sum() for t in tensors]).sum().sqrt()


def sam_steps(
    params: list[Tensor],
    losses: Iterable[Loss],
    *,
    lr: float | Callable[[int], float],
    rho: float | Callable[[int], float],
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    normalized: bool = False,
) -> tuple[list[float], list[float]]:
    """Steps of SAM (`normalized`) or USAM with heavy-ball momentum, one for each loss.

        d = grad f(x + rho g), g = grad f(x), and g / ||g|| instead of g if `normalized`
        d <- d min(1, max_norm / ||d||), as torch does it, if max_norm > 0
        m <- momentum m + d + weight_decay x
        x <- x - lr m

    Returns:
        The losses at x, and the norms of d before it is clipped.
    """
    buffers = [torch.zeros_like(p) for p in params]
    values, norms = [], []
    for step, loss_of in enumerate(losses):
        rate = lr(step) if callable(lr) else lr
        radius = rho(step) if callable(rho) else rho
        x = [p.detach().clone() for p in params]
        loss = loss_of()
        values.append(loss.item())
        ascents = torch.autograd.grad(loss, params)
        scale = radius / norm_of(ascents) if normalized else radius
        _write(params, [a + scale * g for a, g in zip(x, ascents, strict=True)])
        descents = torch.autograd.grad(loss_of(), params)
        norms.append(norm_of(descents).item())
        clip = min(1.0, max_norm / (norms[-1] + 1e-6)) if max_norm else 1.0
        decayed = [clip * d + weight_decay * a for d, a in zip(descents, x, strict=True)]
        buffers = [momentum * m + d for m, d in zip(buffers, decayed, strict=True)]
        _write(params, [a - rate * m for a, m in zip(x, buffers, strict=True)])
    return values, norms


def _write(params: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
