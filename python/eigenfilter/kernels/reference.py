"""The kernels in plain PyTorch, in the paper's symbols: what every other room is tested against.

x: parameter; g: gradient; b: backup of x; m: momentum buffer; alpha: the length of a move; lr, beta
(momentum), tau (dampening), wd (weight decay); S = 1 / grad_scale. Never optimised. Coefficients
are formed in float64 and rounded once to the arithmetic's dtype (float32; float64 for float64
tensors), and no multiply-add is fused: every room rounds alike, so the rooms agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter import _core

Scalar = float | Tensor


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ascend(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """b <- x; x <- x + alpha S g, or x unchanged where found_inf is not zero."""
    _core.check(("params", "grads", "backups"), (params, grads, backups), (True, False, True))
    for x, g, b in zip(params, grads, backups, strict=True):
        T = arithmetic_dtype(x.dtype)
        step = (_real(alpha, x) * _inverse(grad_scale, x)).to(T)
        b.copy_(x)
        _write(x, x.to(T) + step * g.to(T), found_inf)


def descend(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    backups: Sequence[Tensor] | None,
    *,
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """x <- b; d = +-S g + wd x; m <- beta m + (1 - tau) d; x <- x - lr m (Nesterov: d + beta m)."""
    names = ("params", "grads", "momenta", "backups")
    _core.check(names, (params, grads, momenta, backups), (True, False, True, False))
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        T = arithmetic_dtype(p.dtype)
        if backups is not None:
            p.copy_(backups[i])
        x = p.to(T)
        S = _inverse(grad_scale, p)
        d = (-S if maximize else S).to(T) * g.to(T)
        wd = _real(weight_decay, p).to(T)
        if wd != 0:
            d = d + wd * x
        u = d
        if momenta is not None:
            beta = _real(momentum, p).to(T)
            keep = (1 - _real(dampening, p)).to(T)
            m = beta * momenta[i].to(T) + keep * d
            u = d + beta * m if nesterov else m
            _write(momenta[i], m, found_inf)
        _write(p, x - _real(lr, p).to(T) * u, found_inf)


def norm(tensors: Sequence[Tensor], out: Tensor, *, grad_scale: Tensor | None = None) -> None:
    """out <- S sqrt(sum of squares over all elements of all tensors), summed in float64."""
    _core.check(("tensors",), (tensors,), (False,))
    total = torch.zeros((), dtype=torch.float64, device=out.device)
    for t in tensors:
        total = total + t.double().square().sum()
    out.copy_(total.sqrt() * _inverse(grad_scale, out))


def flag_nonfinite(tensors: Sequence[Tensor], found_inf: Tensor) -> None:
    """found_inf <- 1 if any element of any tensor is inf or NaN; else unchanged."""
    _core.check(("tensors",), (tensors,), (False,))
    for t in tensors:
        found_inf.masked_fill_(~t.isfinite().all(), 1.0)


def _real(value: Scalar, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).reshape(())


def _inverse(grad_scale: Tensor | None, like: Tensor) -> Tensor:
    return 1 / _real(1.0 if grad_scale is None else grad_scale, like)


def _write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    rounded = value.to(target.dtype)
    target.copy_(rounded if found_inf is None else torch.where(found_inf != 0, target, rounded))
