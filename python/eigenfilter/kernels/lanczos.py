"""The kernels of Lanczos iterations, on vectors that are the rows of one tensor.

`eigenfilter.kernels` exports these functions and documents `backend` and `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eigenfilter import _core
from eigenfilter.kernels import dispatch
from eigenfilter.kernels.torch_library import operator

_MOST_VECTORS = 65_535  # bound of a GPU's grid
_MOST_PASSES = 100  # two are enough
MOST_ROWS = 32  # vectors in `gram` and `mix_rows`, hence in `cholesky_qr`
# Passes of `cholesky_qr`, and the new part of a vector, in eps of its length, below which the
# vector counts as dependent. float64 needs more, because its arithmetic is no wider than its data.
_PASSES = {torch.float32: 2, torch.float64: 3}
_OWN = {torch.float32: 0.5, torch.float64: 4.0}


def orthogonalize(
    w: Tensor, basis: Tensor, *, passes: int = 2, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Orthogonalize vectors in place against a basis: block Gram-Schmidt.

        c <- c + Q w,    w <- w - Q^T (Q w)        (`passes` times, c = 0 at first)

    for Q [m, n] with orthonormal rows q_i. Sums are taken in float64, in an order that depends on
    the sizes alone (with CUDA, also on whether rows are 16-byte aligned; on the CPU, products of
    floats are summed as floats within 64 columns). Each pass rounds w once. The CPU reads the basis
    `passes` + 1 times.

    Args:
        w: [n] or [b, n], float32 or float64, contiguous.
        basis: [m, n], contiguous, of any dtype of the kernels: half precision halves the traffic.
        passes: number of passes, at least 1. One pass leaves an error of some roundings of the part
            that it removes; the second removes that error too.
        backend: see `eigenfilter.kernels`.

    Returns:
        Coefficients c [m] or [b, m] and norms [] or [b] of the new w; float64.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: shapes or devices do not match, or memory is not contiguous.
        RuntimeError: the backend asked for is not available; the message says how to get it.

    Source: L. Giraud, J. Langou, M. Rozloznik, 2005: twice is enough.
    """
    _require_strided(w=w, basis=basis)
    if basis.ndim != 2 or w.ndim not in (1, 2) or w.shape[-1] != basis.shape[1]:
        raise ValueError(
            f"basis must be [m, n] and w [n] or [b, n]: got {list(basis.shape)} and {list(w.shape)}"
        )
    if not (w.is_contiguous() and basis.is_contiguous()):
        raise ValueError("w and basis must be contiguous: pass .contiguous() of them")
    if w.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"w must be float32 or float64, not {w.dtype}")
    if w.ndim == 2 and len(w) > _MOST_VECTORS:
        raise ValueError(f"w must be of at most {_MOST_VECTORS} vectors, not {len(w)}")
    if basis.device != w.device:
        raise ValueError(f"w is on {w.device} and basis on {basis.device}: move one of them")
    if not isinstance(passes, int):
        raise TypeError(f"passes must be a whole number, not {type(passes).__name__}")
    if not 1 <= passes <= _MOST_PASSES:
        raise ValueError(f"passes must be at least 1 and at most {_MOST_PASSES}, not {passes}")
    shape = w.shape[:-1]
    coefficients = torch.zeros((*shape, len(basis)), dtype=torch.float64, device=w.device)
    norms = torch.zeros(shape, dtype=torch.float64, device=w.device)
    if w.numel() == 0:
        return coefficients, norms
    _orthogonalize(w, basis, coefficients, norms, passes, backend)
    return coefficients, norms


@operator(mutates=("w", "coefficients", "norms"))
def _orthogonalize(
    w: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    norms: Tensor,
    passes: int,
    backend: str | None,
) -> None:
    _core.check(("w",), ([w],), (True,))
    _core.check(("basis",), ([basis],), (False,))
    if _overlap(w, basis):
        raise ValueError("w shares memory with basis, which would change as it is read: clone it")
    with torch.no_grad():
        dispatch.of("w", [w], backend).orthogonalize(w, basis, coefficients, norms, passes=passes)
    increment_version([w])


def row_dots(q: Tensor, w: Tensor, *, backend: str | None = None) -> Tensor:
    """Inner products of vectors, and squared norms of the second ones, in one pass over both.

        s_0i = q_i . w_i,    s_1i = w_i . w_i

    Sums are taken in float64, in an order that depends on the sizes alone (with CUDA, also on
    whether rows are 16-byte aligned).

    Args:
        q, w: [b, n], float32 or float64, contiguous.
        backend: see `eigenfilter.kernels`.

    Returns:
        s [2, b], float64, on their device.

    Raises:
        TypeError, ValueError, RuntimeError: as `orthogonalize`.
    """
    _require_rows(q=q, w=w)
    sums = torch.zeros(2, len(q), dtype=torch.float64, device=q.device)
    if q.numel():
        _row_dots(q, w, sums, backend)
    return sums


@operator(mutates=("sums",))
def _row_dots(q: Tensor, w: Tensor, sums: Tensor, backend: str | None) -> None:
    _core.check(("q", "w"), ([q], [w]), (False, False))
    dispatch.of("q", [q], backend).row_dots(q, w, sums)


def lanczos_step(
    u: Tensor, q: Tensor, w: Tensor, factors: Tensor, *, backend: str | None = None
) -> Tensor:
    """Take one step of many Lanczos recurrences, in one pass.

        u_i <- f_0i w_i + f_1i q_i + f_2i u_i,    s_0i = u_i . u_i,    s_1i = u_i . q_i

    The arithmetic is float64, u is rounded once, and the sums are those of the rounded u, in the
    order of `row_dots`. If w_i = H q_i and u_i precedes q_i in the Krylov basis, Lanczos'
    coefficients make u_i the successor of q_i. The sums give its length, and its component along
    q_i that rounding has left, for the next step.

    Args:
        u, q, w: [b, n], float32 or float64, contiguous; u is overwritten.
        factors: f [3, b], float64, on their device, contiguous.
        backend: see `eigenfilter.kernels`.

    Returns:
        s [2, b], float64, on their device.

    Raises:
        TypeError, ValueError, RuntimeError: as `orthogonalize`; ValueError also where u overlaps.

    Source: C. Lanczos, 1950; order of the subtractions: C. Paige, 1972, doi 10.1093/imamat/10.3.373
    """
    _require_rows(u=u, q=q, w=w)
    _require_factors(factors, (3, len(u)), u)
    sums = torch.zeros(2, len(u), dtype=torch.float64, device=u.device)
    if u.numel():
        _lanczos_step(u, q, w, factors, sums, backend)
    return sums


@operator(mutates=("u", "sums"))
def _lanczos_step(
    u: Tensor, q: Tensor, w: Tensor, factors: Tensor, sums: Tensor, backend: str | None
) -> None:
    _core.check(("u", "q", "w"), ([u], [q], [w]), (True, False, False))
    with torch.no_grad():
        dispatch.of("u", [u], backend).lanczos_step(u, q, w, factors, sums)
    increment_version([u])


def gram(vectors: Tensor, *, backend: str | None = None) -> Tensor:
    """Gram matrix of a few vectors, in one pass.

        G_ij = v_i . v_j

    Products and sums are taken in float64, in the order of `row_dots`. Products of float32 numbers
    are exact.

    Args:
        vectors: [b, n], float32 or float64, contiguous; b <= 32.
        backend: see `eigenfilter.kernels`.

    Returns:
        G [b, b], float64, on their device.

    Raises:
        TypeError, ValueError, RuntimeError: as `orthogonalize`; ValueError also for too many
            vectors.
    """
    _require_rows(vectors=vectors, most=MOST_ROWS)
    out = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    if vectors.numel():
        _gram(vectors, out, backend)
    return out


@operator(mutates=("out",))
def _gram(vectors: Tensor, out: Tensor, backend: str | None) -> None:
    _core.check(("vectors",), ([vectors],), (False,))
    dispatch.of("vectors", [vectors], backend).gram(vectors, out)


def mix_rows(vectors: Tensor, factors: Tensor, *, backend: str | None = None) -> None:
    """Multiply a few vectors by a lower triangular matrix in place, in one pass.

        v_i <- sum_{j <= i} F_ij v_j

    The arithmetic is float64, in the order of j, and each result is rounded once.

    Args:
        vectors: [b, n], float32 or float64, contiguous, overwritten; b <= 32.
        factors: F [b, b], float64, on their device, contiguous. Elements above the diagonal are
            not read.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `gram`.
    """
    _require_rows(vectors=vectors, most=MOST_ROWS)
    _require_factors(factors, (len(vectors), len(vectors)), vectors)
    if vectors.numel():
        _mix_rows(vectors, factors, backend)


@operator(mutates=("vectors",))
def _mix_rows(vectors: Tensor, factors: Tensor, backend: str | None) -> None:
    _core.check(("vectors",), ([vectors],), (True,))
    with torch.no_grad():
        dispatch.of("vectors", [vectors], backend).mix_rows(vectors, factors)
    increment_version([vectors])


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
    _require_rows(vectors=vectors, most=MOST_ROWS)
    if total is not None and not callable(total):
        raise TypeError(f"total must be a function, not {type(total).__name__}")
    if not torch.compiler.is_compiling():  # errors come before the first write
        _core.check(("vectors",), ([vectors],), (True,))
        dispatch.of("vectors", [vectors], backend)
    eps = torch.finfo(vectors.dtype).eps
    b = len(vectors)
    # The smallest pivot above the rounding error.
    least = max(8 * b * torch.finfo(torch.float64).eps, eps**2)
    sizes = _sizes(vectors, total) if vectors.dtype == torch.float64 else None
    if sizes is not None:
        vectors /= sizes[:, None]
    result = torch.eye(b, dtype=torch.float64, device=vectors.device)
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


def _require_rows(*, most: int = _MOST_VECTORS, **tensors: Tensor) -> None:
    """Raise unless the tensors are contiguous [b, n], all of one shape, dtype and device."""
    _require_strided(**tensors)
    [(first, model), *_] = tensors.items()
    for name, t in tensors.items():
        if t.ndim != 2 or t.shape != model.shape:
            raise ValueError(
                f"{' and '.join(tensors)} must be [b, n], all of one shape: {name} is "
                f"{list(t.shape)}"
            )
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous: pass .contiguous() of it")
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, not {t.dtype}")
        if t.dtype != model.dtype or t.device != model.device:
            raise ValueError(
                f"{name} is {t.dtype} on {t.device}, {first} {model.dtype} on {model.device}: "
                "convert one of them"
            )
    if len(model) > most:
        raise ValueError(f"{first} must be of at most {most} vectors, not {len(model)}")


def _require_strided(**tensors: Tensor) -> None:
    """Raise TypeError for anything except strided tensors."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} must be strided, not {t.layout}: pass .to_dense() of it")


def _require_factors(factors: Tensor, shape: tuple[int, int], vectors: Tensor) -> None:
    _require_strided(factors=factors)
    if (
        factors.shape != shape
        or factors.dtype != torch.float64
        or factors.device != vectors.device
        or not factors.is_contiguous()
    ):
        raise ValueError(
            f"factors must be {list(shape)}, float64, on {vectors.device}, contiguous: got "
            f"{list(factors.shape)}, {factors.dtype}, on {factors.device}"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory of two contiguous tensors overlaps."""
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.nbytes and second < first + a.nbytes
