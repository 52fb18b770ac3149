"""The kernels of Lanczos iterations, on vectors that are the rows of one tensor.

Each public function allocates what its operation returns. The operation's body is the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfilter.kernels._op import op

_MOST_VECTORS = 65_535  # bound of a GPU's grid
_MOST_PASSES = 100  # two are enough
MOST_ROWS = 32  # vectors in `gram` and `mix_rows`, hence in `cholesky_qr`


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


@op(writes=("w", "coefficients", "norms"))
def _orthogonalize(
    w: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    norms: Tensor,
    passes: int,
    backend: str | None = None,
) -> None:
    """w <- w - Q^T (Q w), `passes` times, in float64; rounded to w's dtype after each."""
    Q = basis.double()
    coefficients.zero_()
    for _ in range(passes):
        c = w.double() @ Q.T
        coefficients += c
        w.copy_(w.double() - c @ Q)
    norms.copy_(torch.linalg.vector_norm(w.double(), dim=-1))


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
    require_rows(q=q, w=w)
    sums = torch.zeros(2, len(q), dtype=torch.float64, device=q.device)
    if q.numel():
        _row_dots(q, w, sums, backend)
    return sums


@op(writes=("sums",))
def _row_dots(q: Tensor, w: Tensor, sums: Tensor, backend: str | None = None) -> None:
    """s_0 <- q_i . w_i, s_1 <- w_i . w_i, in float64."""
    sums[0] = (q.double() * w.double()).sum(1)
    sums[1] = w.double().square().sum(1)


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
    require_rows(u=u, q=q, w=w)
    _require_factors(factors, (3, len(u)), u)
    sums = torch.zeros(2, len(u), dtype=torch.float64, device=u.device)
    if u.numel():
        _lanczos_step(u, q, w, factors, sums, backend)
    return sums


@op(writes=("u", "sums"))
def _lanczos_step(
    u: Tensor, q: Tensor, w: Tensor, factors: Tensor, sums: Tensor, backend: str | None = None
) -> None:
    """u_i <- f_0i w_i + f_1i q_i + f_2i u_i in float64, rounded once; s <- u_i . u_i, u_i . q_i."""
    f = factors[:, :, None]
    u.copy_(f[0] * w.double() + f[1] * q.double() + f[2] * u.double())
    sums[0] = u.double().square().sum(1)
    sums[1] = (u.double() * q.double()).sum(1)


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
    require_rows(vectors=vectors, most=MOST_ROWS)
    out = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    if vectors.numel():
        _gram(vectors, out, backend)
    return out


@op(writes=("out",))
def _gram(vectors: Tensor, out: Tensor, backend: str | None = None) -> None:
    """G <- V V^T, in float64, symmetric to the bit."""
    lower = (vectors.double() @ vectors.double().T).tril()
    out.copy_(lower + lower.tril(-1).T)


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
    require_rows(vectors=vectors, most=MOST_ROWS)
    _require_factors(factors, (len(vectors), len(vectors)), vectors)
    if vectors.numel():
        _mix_rows(vectors, factors, backend)


@op(writes=("vectors",))
def _mix_rows(vectors: Tensor, factors: Tensor, backend: str | None = None) -> None:
    """V <- tril(F) V in float64, rounded once; summed in the order of the columns of F."""
    V, F = vectors.double(), factors.tril()
    result = torch.zeros_like(V)
    for j in range(len(V)):
        result[j:] += F[j:, j, None] * V[j]
    vectors.copy_(result)


def require_rows(*, most: int = _MOST_VECTORS, **tensors: Tensor) -> None:
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
