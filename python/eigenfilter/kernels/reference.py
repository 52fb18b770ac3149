"""The kernels in plain PyTorch, in the paper's symbols: the reference for all other backends.

x: parameter; g: gradient; g0: gradient at x; b: backup of x; m: momentum buffer or first moment; v:
second moment; alpha: step size of an ascent; lr, beta (momentum), tau (dampening), wd (weight
decay); S = 1 / grad_scale. The reference is never optimized. Coefficients are formed in float64 and
rounded once to the arithmetic's dtype (float32; float64 where x or g is float64), and no
multiply-add is fused. The compiled kernels' checks run on all arguments before anything is written.
Every backend rounds alike, so that the backends agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels.conventions import Scalar, arithmetic_dtype, power_of_two

_X, _M, _V = range(3)  # the outputs of a descent, each rounded by its own random bits
_WORD = 0xFFFFFFFF
_CHECK = 0  # threads: the compiled kernel then checks its arguments and computes nothing


@torch.no_grad()
def perturb(
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
    _core.perturb(params, grads, backups, alpha, True, adaptive, grad_scale, found_inf, _CHECK)
    for p, grad, b in zip(params, grads, backups, strict=True):
        T = arithmetic_dtype(p.dtype, grad.dtype)
        step = (_real(alpha, p) * _inverse(grad_scale, p)).to(T)
        b.copy_(p)
        x, g = p.to(T), grad.to(T)
        _write(p, x + step * (x * x * g if adaptive else g), found_inf)


@torch.no_grad()
def perturb_again(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    alpha: Scalar,
    backups: Sequence[Tensor] | None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """x <- x + alpha S g, or b + alpha S g; x unchanged where found_inf is not zero."""
    _core.perturb(params, grads, backups, alpha, False, False, grad_scale, found_inf, _CHECK)
    for p, g, b in zip(params, grads, params if backups is None else backups, strict=True):
        T = arithmetic_dtype(p.dtype, g.dtype)
        step = (_real(alpha, p) * _inverse(grad_scale, p)).to(T)
        _write(p, b.to(T) + step * g.to(T), found_inf)


@torch.no_grad()
def perturb_hvp(
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
    lists = (params, grads, base_grads, backups)
    _core.perturb_hvp(*lists, alpha, eps, grad_scale, found_inf, _CHECK)
    for p, g, g0, b in zip(params, grads, base_grads, backups, strict=True):
        T = arithmetic_dtype(p.dtype, g.dtype)
        step = (_real(alpha, p) * _inverse(grad_scale, p) / _real(eps, p)).to(T)
        _write(p, b.to(T) + step * (g.to(T) - g0.to(T)), found_inf)


@torch.no_grad()
def sgd_step(
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
    rounding_seed: Scalar | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """x <- b; d = +-S g + wd x; m <- beta m + (1 - tau) d; x <- x - lr m (Nesterov: d + beta m)."""
    lists, scalars = (params, grads, momenta, backups), (lr, momentum, dampening, weight_decay)
    flags = (rounding_seed, grad_scale, found_inf)
    _core.sgd_step(*lists, *scalars, nesterov, maximize, *flags, _CHECK)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        T = arithmetic_dtype(p.dtype, g.dtype)
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
            _write(momenta[i], _rounded(m, momenta[i], rounding_seed, i, _M), found_inf)
        x = x - _real(lr, p).to(T) * u
        _write(p, _rounded(x, p, rounding_seed, i, _X), found_inf)


@torch.no_grad()
def adamw_step(
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
    rounding_seed: Scalar | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """x <- b; d = +-S g; m <- beta1 m + (1 - beta1) d; v <- beta2 v + (1 - beta2) d^2;

    x <- (1 - lr wd) x - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps).
    """
    lists, scalars = (params, grads, exp_avgs, exp_avg_sqs, backups), (lr, beta1, beta2, eps)
    flags = (rounding_seed, grad_scale, found_inf)
    _core.adamw_step(*lists, *scalars, weight_decay, step, maximize, *flags, _CHECK)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        T = arithmetic_dtype(p.dtype, g.dtype)
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
        x = decay * p.to(T) - size * m / denominator
        for output, target, value in ((_M, exp_avgs[i], m), (_V, exp_avg_sqs[i], v), (_X, p, x)):
            _write(target, _rounded(value, target, rounding_seed, i, output), found_inf)


@torch.no_grad()
def norm(
    tensors: Sequence[Tensor],
    out: Tensor,
    *,
    weights: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """out <- S sqrt(sum of (w t)^2 over all elements of all tensors), summed in float64."""
    _core.norm(tensors, out, weights, grad_scale, _CHECK)
    values = [t.double() for t in tensors]
    if weights is not None:
        values = [w.double() * v for w, v in zip(weights, values, strict=True)]
    root = _root_of_squares(values, out.device)
    filled = [v.abs().amax() for v in values if v.numel() > 0]
    if filled and any(t.dtype == torch.float64 for t in tensors):
        scale = power_of_two(torch.stack(filled).amax())
        scaled = _root_of_squares([v / scale for v in values], out.device) * scale
        # Scaled, if the squares overflow float64 or are so small that they lose significant digits.
        root = torch.where((root >= 2.0**-350) & (root < torch.inf), root, scaled)
    out.copy_(root * _inverse(grad_scale, out))


def _root_of_squares(values: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for v in values:
        total = total + v.square().sum()
    return total.sqrt()


@torch.no_grad()
def orthogonalize(
    w: Tensor, basis: Tensor, coefficients: Tensor, norms: Tensor, *, passes: int
) -> None:
    """w <- w - Q^T (Q w), `passes` times, in float64; rounded to w's dtype after each."""
    _core.orthogonalize(w, basis, coefficients, norms, passes, _CHECK)
    Q = basis.double()
    coefficients.zero_()
    for _ in range(passes):
        c = w.double() @ Q.T
        coefficients += c
        w.copy_(w.double() - c @ Q)
    norms.copy_(torch.linalg.vector_norm(w.double(), dim=-1))


@torch.no_grad()
def row_dots(q: Tensor, w: Tensor, sums: Tensor) -> None:
    """s_0 <- q_i . w_i, s_1 <- w_i . w_i, in float64."""
    _core.row_dots(q, w, sums, _CHECK)
    sums[0] = (q.double() * w.double()).sum(1)
    sums[1] = w.double().square().sum(1)


@torch.no_grad()
def lanczos_step(u: Tensor, q: Tensor, w: Tensor, factors: Tensor, sums: Tensor) -> None:
    """u_i <- f_0i w_i + f_1i q_i + f_2i u_i in float64, rounded once; s <- u_i . u_i, u_i . q_i."""
    _core.lanczos_step(u, q, w, factors, sums, _CHECK)
    f = factors[:, :, None]
    u.copy_(f[0] * w.double() + f[1] * q.double() + f[2] * u.double())
    sums[0] = u.double().square().sum(1)
    sums[1] = (u.double() * q.double()).sum(1)


@torch.no_grad()
def gram(vectors: Tensor, out: Tensor) -> None:
    """G <- V V^T, in float64, symmetric to the bit."""
    _core.gram(vectors, out, _CHECK)
    lower = (vectors.double() @ vectors.double().T).tril()
    out.copy_(lower + lower.tril(-1).T)


@torch.no_grad()
def mix_rows(vectors: Tensor, factors: Tensor) -> None:
    """V <- tril(F) V in float64, rounded once; summed in the order of the columns of F."""
    _core.mix_rows(vectors, factors, _CHECK)
    V, F = vectors.double(), factors.tril()
    result = torch.zeros_like(V)
    for j in range(len(V)):
        result[j:] += F[j:, j, None] * V[j]
    vectors.copy_(result)


@torch.no_grad()
def flag_nonfinite(tensors: Sequence[Tensor], found_inf: Tensor) -> None:
    """found_inf <- 1 if any element of any tensor is inf or NaN; else unchanged."""
    _core.flag_nonfinite(tensors, found_inf, _CHECK)
    for t in tensors:
        found_inf.masked_fill_(~t.isfinite().all(), 1.0)


def _real(value: Scalar, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).reshape(())


def _power(base: Tensor, exponent: Scalar) -> Tensor:
    """base^exponent for a whole exponent, by squaring: with the same roundings in every backend."""
    result, n = torch.ones_like(base), int(exponent)
    while n > 0:
        if n % 2 == 1:
            result = result * base
        base, n = base * base, n // 2
    return result


def _square_root(t: Tensor) -> Tensor:
    """Correctly rounded square root: torch's on a GPU, NumPy's on the CPU."""
    if t.device.type != "cpu":
        return t.sqrt()
    with np.errstate(invalid="ignore"):  # negative values give NaN, as in torch
        return torch.as_tensor(np.sqrt(t.numpy()))


def _inverse(grad_scale: Tensor | None, like: Tensor) -> Tensor:
    return 1 / _real(1.0 if grad_scale is None else grad_scale, like)


def _rounded(value: Tensor, like: Tensor, seed: Scalar | None, tensor: int, output: int) -> Tensor:
    """`value`; with a seed, as one of its two neighbors in the dtype of `like`, if narrow.

    Random bits depend on the seed, the index of the tensor in the lists, the output, and the index
    of the element in memory.
    """
    if seed is None or like.itemsize != 2:
        return value
    index = torch.arange(like.numel(), device=like.device).as_strided(like.shape, like.stride())
    key = _mix(_mix(_real(seed, like).long(), tensor), output)
    return _dither(value, like.dtype, _mix(index ^ key, key))


def _mix(word: Tensor, key: Tensor | int) -> Tensor:
    """The finalizer of MurmurHash3 on 32 bits in an int64, a key added between its rounds."""
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD
    word = ((word ^ word >> 13) + key) * 0xC2B2AE35 & _WORD
    return word ^ word >> 16


def _dither(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round a float32 value at random to one of its two neighbors in `dtype`.

    The neighbor farther from zero has the probability (distance from the other one) / spacing.
    Values that `dtype` holds stay. Values beyond its largest number, infinities and NaN are left to
    rounding to nearest.
    """
    cut = 0xFFFF if dtype == torch.bfloat16 else 0x1FFF
    bits = value.view(torch.int32)
    rounded = ((bits + (random & cut).int()) & ~cut).view(torch.float32)
    if dtype == torch.float16:
        # Below 2^-14 the spacing is 2^-24: 2^21 units of 2^-45, of which there are whole numbers.
        is_small = value.abs() < 2.0**-14
        units = (value.abs() * 2.0**45).where(is_small, 0.0).long()
        small = ((units + (random & 0x1FFFFF)) >> 21).float() * 2.0**-24
        rounded = small.copysign(value).where(is_small, rounded)
    return rounded.where(value.abs() < torch.finfo(dtype).max, value)


def _write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    rounded = value.to(target.dtype)
    if found_inf is not None:
        rounded = torch.where(found_inf.reshape(()) != 0, target, rounded)
    target.copy_(rounded)
