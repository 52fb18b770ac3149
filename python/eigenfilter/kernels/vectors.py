"""The kernels of Lanczos iterations, on vectors that are the rows of one tensor.

Each public function allocates what its operation returns. The operation's body is the reference.
What the vectors must be is checked where the operation is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels import dispatch
from eigenfilter.kernels._op import op

MOST_ROWS = _core.most_rows  # vectors in `gram` and `mix_rows`, hence in `cholesky_qr`


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
    shape, m = dispatch.tensor("w", w).shape[:-1], dispatch.tensor("basis", basis).shape[:1]
    coefficients, norms = _doubles(w, *shape, *m), _doubles(w, *shape)
    _orthogonalize(w, basis, coefficients, norms, passes, backend)
    return coefficients, norms


@op
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
    sums = _doubles(q, 2, count("q", q))
    _row_dots(q, w, sums, backend)
    return sums


@op
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
    sums = _doubles(u, 2, count("u", u))
    _lanczos_step(u, q, w, factors, sums, backend)
    return sums


@op
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
    b = count("vectors", vectors, MOST_ROWS)
    out = _doubles(vectors, b, b)
    _gram(vectors, out, backend)
    return out


@op
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
    _mix_rows(vectors, factors, backend)


@op
def _mix_rows(vectors: Tensor, factors: Tensor, backend: str | None = None) -> None:
    """V <- tril(F) V in float64, rounded once; summed in the order of the columns of F."""
    V, F = vectors.double(), factors.tril()
    result = torch.zeros_like(V)
    for j in range(len(V)):
        result[j:] += F[j:, j, None] * V[j]
    vectors.copy_(result)


def count(name: str, vectors: Tensor, most: int = _core.most_vectors) -> int:
    """Return how many vectors there are, so that no more is allocated for them than may be used.

    Raises:
        TypeError: `vectors` is not a tensor.
        ValueError: there are too many.
    """
    shape = dispatch.tensor(name, vectors).shape
    b = shape[0] if shape else 1
    if b > most:
        raise ValueError(f"{name} must be of at most {most} vectors, not {b}")
    return b


def _doubles(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=like.device)
