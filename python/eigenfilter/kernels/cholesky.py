"""Orthonormal bases of a few vectors by repeated Cholesky QR, built from `gram` and `mix_rows`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eigenfilter.kernels import dispatch
from eigenfilter.kernels._op import OPERATIONS
from eigenfilter.kernels.vectors import MOST_ROWS, count, gram, mix_rows

# Passes of `cholesky_qr`, and the new part of a vector, in eps of its length, below which the
# vector counts as dependent. float64 needs more, because its arithmetic is no wider than its data.
_PASSES = {torch.float32: 2, torch.float64: 3}
_OWN = {torch.float32: 0.5, torch.float64: 4.0}


@torch.no_grad()
def cholesky_qr(
    vectors: Tensor,
    *,
    total: Callable[[Tensor], Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Orthonormalize a few vectors in place by repeated Cholesky QR.

        V V^T = L L^T,    V <- L^-1 V        (twice; three times for float64)

    A vector that is zero, or depends on earlier ones up to rounding (half an eps of its length in
    float32, four in float64), becomes zero, as does L_ii. The others become orthonormal to a few
    roundings for every condition number of the block: a pivot below the rounding error is raised
    above it, and the next pass then resolves the new part of that vector. Each pass reads the
    vectors twice and writes them once. float64 vectors are first divided by powers of two, because
    their squares may overflow. Nothing waits for the device.

    Args:
        vectors: V [b, n], float32 or float64, contiguous, overwritten; b <= 32.
        total: function that returns the sum of a float64 tensor over all processes, if each of
            them holds a slice of the vectors.
        backend: see `eigenfilter.kernels`.

    Returns:
        L [b, b], lower triangular, float64: the former V is L times the new one. Its diagonal has
        the length of each vector's new part.

    Raises:
        TypeError, ValueError, RuntimeError: as `gram`.

    Source: T. Fukaya, R. Kannan, Y. Nakatsukasa, Y. Yamamoto, Y. Yanagisawa, 2020,
    doi 10.1137/18M1218212, section 3, with raised pivots in place of the shift.
    """
    b = count("vectors", vectors, MOST_ROWS)
    result = torch.eye(b, dtype=torch.float64, device=vectors.device)
    if vectors.dtype not in _PASSES:
        raise TypeError(f"vectors must be float32 or float64, not {vectors.dtype}")
    if total is not None and not callable(total):
        raise TypeError(f"total must be a function, not {type(total).__name__}")
    if not torch.compiler.is_compiling():  # errors come before the first write
        dispatch.choose(vectors.device, backend)
        OPERATIONS["mix_rows"].check(vectors, result)
    eps = torch.finfo(vectors.dtype).eps
    # The smallest pivot above the rounding error.
    least = max(8 * b * torch.finfo(torch.float64).eps, eps**2)
    sizes = _sizes(vectors, total) if vectors.dtype == torch.float64 else None
    if sizes is not None:
        vectors /= sizes[:, None]
    threshold = result.new_full((b,), -1.0)  # new parts below it are dropped
    for i in range(_PASSES[vectors.dtype]):
        g = gram(vectors, backend=backend)
        g = g if total is None else _summed(total, g)
        lengths = g.diagonal().sqrt()
        own = result.diagonal() * lengths
        scale = 1 / lengths.masked_fill(lengths == 0, 1.0)
        lower = _factor(g * scale[:, None] * scale, least, own, threshold)
        inverse = torch.linalg.solve_triangular(lower, scale.diag(), upper=False)
        result = result @ (lengths[:, None] * lower)
        if i == 0:
            threshold = _OWN[vectors.dtype] * eps * lengths
        else:
            dropped = result.diagonal() <= threshold
            inverse.masked_fill_(dropped[:, None], 0.0)
            result.masked_fill_(dropped, 0.0)
        mix_rows(vectors, inverse.contiguous(), backend=backend)
    return result if sizes is None else sizes[:, None] * result


def _sizes(vectors: Tensor, total: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return powers of two [b], float64, close to the largest elements of vectors [b, l].

    They lie in [2^-1000, 2^1000]. Squares of the quotients and their sums are finite.
    """
    sizes = vectors.new_zeros(len(vectors))
    if vectors.numel():
        sizes = torch.linalg.vector_norm(vectors, torch.inf, dim=1).clamp_max(2.0**1000)
    exponents = (sizes if total is None else _summed(total, sizes)).frexp().exponent
    return torch.ldexp(torch.ones_like(sizes), exponents.clamp(-1000, 1000).to(sizes))


def _summed(total: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    result = total(t)
    if not isinstance(result, Tensor) or (result.shape, result.dtype, result.device) != (
        t.shape,
        t.dtype,
        t.device,
    ):
        raise TypeError("total must return a tensor like what it is given: their sum")
    return result


def _factor(g: Tensor, least: float, own: Tensor, threshold: Tensor) -> Tensor:
    """Return L [b, b] of g = L L^T, with pivots below `least` raised to it.

    Such a vector eliminates nothing from the later ones. Neither does a vector that is dropped,
    because its new part, `own` times the root of the pivot, is at most `threshold`.
    """
    lower = torch.zeros_like(g)
    left = g.clone()
    for j in range(len(g)):
        pivot = left[j, j].clone()
        root = pivot.clamp_min(least).sqrt()
        column = left[j + 1 :, j] / root
        column.masked_fill_((pivot < least) | (own[j] * root <= threshold[j]), 0.0)
        lower[j, j] = root
        lower[j + 1 :, j] = column
        left[j + 1 :, j + 1 :] -= torch.outer(column, column)
    return lower
