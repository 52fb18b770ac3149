"""The kernels in plain PyTorch, in the paper's symbols: what every other room is tested against.

x: parameter; g: gradient; g0: gradient at x; b: backup of x; m: momentum buffer or first moment; v:
second moment; alpha: the length of a move; lr, beta (momentum), tau (dampening), wd (weight decay);
S = 1 / grad_scale. Never optimised. Coefficients
are formed in float64 and rounded once to the arithmetic's dtype (float32; float64 for float64
tensors), and no multiply-add is fused: every room rounds alike, so the rooms agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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
    adaptive: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """b <- x; x <- x + alpha S g (adaptive: x^2 g), or x unchanged where found_inf is not zero."""
    _core.check(("params", "grads", "backups"), (params, grads, backups), (True, False, True))
    for p, grad, b in zip(params, grads, backups, strict=True):
        T = arithmetic_dtype(p.dtype)
        step = (_real(alpha, p) * _inverse(grad_scale, p)).to(T)
        b.copy_(p)
        x, g = p.to(T), grad.to(T)
        _write(p, x + step * (x * x * g if adaptive else g), found_inf)


def ascend_again(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    alpha: Scalar,
    backups: Sequence[Tensor] | None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """x <- x + alpha S g, or b + alpha S g; x unchanged where found_inf is not zero."""
    _core.check(("params", "grads", "backups"), (params, grads, backups), (True, False, False))
    for p, g, b in zip(params, grads, params if backups is None else backups, strict=True):
        T = arithmetic_dtype(p.dtype)
        step = (_real(alpha, p) * _inverse(grad_scale, p)).to(T)
        _write(p, b.to(T) + step * g.to(T), found_inf)


def ascend_hvp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    base_grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    eps: Scalar,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """x <- b + alpha h with h = S (g - g0) / eps; x unchanged where found_inf is not zero."""
    names = ("params", "grads", "base_grads", "backups")
    _core.check(names, (params, grads, base_grads, backups), (True, False, False, False))
    for p, g, g0, b in zip(params, grads, base_grads, backups, strict=True):
        T = arithmetic_dtype(p.dtype)
        step = (_real(alpha, p) * _inverse(grad_scale, p) / _real(eps, p)).to(T)
        _write(p, b.to(T) + step * (g.to(T) - g0.to(T)), found_inf)


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


def descend_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    eps: Scalar,
    weight_decay: Scalar,
    step: Scalar,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """x <- b; d = +-S g; m <- beta1 m + (1 - beta1) d; v <- beta2 v + (1 - beta2) d^2;

    x <- (1 - lr wd) x - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps).
    """
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "backups")
    lists = (params, grads, exp_avgs, exp_avg_sqs, backups)
    _core.check(names, lists, (True, False, True, True, False))
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        T = arithmetic_dtype(p.dtype)
        if backups is not None:
            p.copy_(backups[i])
        S = _inverse(grad_scale, p)
        d = (-S if maximize else S).to(T) * g.to(T)
        b1, b2, a = _real(beta1, p), _real(beta2, p), _real(lr, p)
        m = b1.to(T) * exp_avgs[i].to(T) + (1 - b1).to(T) * d
        v = b2.to(T) * exp_avg_sqs[i].to(T) + (1 - b2).to(T) * (d * d)
        size = (a / (1 - _power(b1, step))).to(T)
        root = (1 / _square_root(1 - _power(b2, step))).to(T)
        decay = (1 - a * _real(weight_decay, p)).to(T)
        denominator = _square_root(v) * root + _real(eps, p).to(T)
        _write(exp_avgs[i], m, found_inf)
        _write(exp_avg_sqs[i], v, found_inf)
        _write(p, decay * p.to(T) - size * m / denominator, found_inf)


def norm(
    tensors: Sequence[Tensor],
    out: Tensor,
    *,
    weights: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """out <- S sqrt(sum of (w t)^2 over all elements of all tensors), summed in float64."""
    _core.check(("tensors", "weights"), (tensors, weights), (False, False))
    total = torch.zeros((), dtype=torch.float64, device=out.device)
    for i, t in enumerate(tensors):
        w = 1 if weights is None else weights[i].double()
        total = total + (w * t.double()).square().sum()
    out.copy_(total.sqrt() * _inverse(grad_scale, out))


def project_out(
    w: Tensor, basis: Tensor, coefficients: Tensor, norms: Tensor, *, passes: int
) -> None:
    """w <- w - Q^T (Q w), `passes` times, in float64; rounded to w's dtype after each."""
    Q = basis.double()
    coefficients.zero_()
    for _ in range(passes):
        c = w.double() @ Q.T
        coefficients += c
        w.copy_(w.double() - c @ Q)
    norms.copy_(torch.linalg.vector_norm(w.double(), dim=-1))


def flag_nonfinite(tensors: Sequence[Tensor], found_inf: Tensor) -> None:
    """found_inf <- 1 if any element of any tensor is inf or NaN; else unchanged."""
    _core.check(("tensors",), (tensors,), (False,))
    for t in tensors:
        found_inf.masked_fill_(~t.isfinite().all(), 1.0)


def _real(value: Scalar, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).reshape(())


def _power(base: Tensor, exponent: Scalar) -> Tensor:
    """base^exponent for a whole exponent, by squaring: the same roundings in every room."""
    result, n = torch.ones_like(base), int(exponent)
    while n > 0:
        if n % 2 == 1:
            result = result * base
        base, n = base * base, n // 2
    return result


def _square_root(t: Tensor) -> Tensor:
    """Correctly rounded, which torch's is on a GPU, but NumPy's on the CPU."""
    if t.device.type != "cpu":
        return t.sqrt()
    with np.errstate(invalid="ignore"):  # of negative values, as torch takes them: NaN
        return torch.as_tensor(np.sqrt(t.numpy()))


def _inverse(grad_scale: Tensor | None, like: Tensor) -> Tensor:
    return 1 / _real(1.0 if grad_scale is None else grad_scale, like)


def _write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    rounded = value.to(target.dtype)
    target.copy_(rounded if found_inf is None else torch.where(found_inf != 0, target, rounded))
