"""Vector arithmetic for solvers, also where each process holds a slice of every vector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eigenfilter import kernels
from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.kernels.vectors import MOST_ROWS

_PIECE = 1 << 12  # elements that are summed in the vectors' dtype before sums go on in float64
_CHUNK = 1 << 16  # columns that are multiplied in float64 at a time
# Columns that are copied to a wider dtype at a time: as many as a CPU's cache holds; more on a GPU,
# but no more than this part of long vectors.
_WIDE = {"cpu": (1 << 13, 1 << 13), "cuda": (1 << 16, 1 << 20)}  # at least, at most
_WIDE_PART = 64


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context in which a GPU multiplies float32 matrices in float32.

    TF32 with its 10 bits, if it is allowed for training, is used for products with a model. Here it
    would ruin orthogonality, and no residual would show it.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class VectorOps:
    """Arithmetic on this process's slices [l] of vectors [n]; l = n without slices.

    This is all that solvers need to know about distribution. Inner products are sums over slices
    with the same bits in every process, so that all processes take the same decisions. Everything
    else works slice by slice.

    Attributes:
        dimension: n, the length of a whole vector.
        length: l, the length of this process's slice.
    """

    def __init__(self, op: SymmetricOperator) -> None:
        self._slices = getattr(op, "slices", None)
        self.dimension = op.shape[0]
        self.length = self.dimension if self._slices is None else self._slices.length

    def total(self, t: Tensor) -> Tensor:
        """Sum t, float64, over slices in place, and return it."""
        return t if self._slices is None else self._slices.sum(t)

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """Return a random generator, with a different sequence for each slice."""
        if self._slices is not None:
            seed = (seed + 0x9E3779B1 * self._slices.number) % 2**32  # the CPU's takes 32 bits
        return torch.Generator(device).manual_seed(seed)

    def parts(self, device: torch.device) -> Iterator[slice]:
        """Yield ranges of columns, each so short that a wider copy of it takes little memory."""
        least, most = _WIDE[device.type]
        width = max(least, min(most, self.length // _WIDE_PART // _PIECE * _PIECE))
        return (slice(start, start + width) for start in range(0, self.length, width))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner products <a_i, b_i> [p], float64, of the rows of a and b [p, l]."""
        sums = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        for start in range(0, self.length, _CHUNK):
            part = slice(start, start + _CHUNK)
            sums += torch.linalg.vecdot(a[:, part].double(), b[:, part].double())
        return self.total(sums)

    def norm(self, w: Tensor) -> Tensor:
        """Return ||w|| [], float64, of w [l]."""
        return _norm(w) if self._slices is None else self.total(_norm(w).square()).sqrt()

    def gram(self, rows: Tensor) -> Tensor:
        """Return the inner products [m, m], float64, of rows [m, l]."""
        with full_precision(rows.device):
            return self.total((rows @ rows.T).double())

    def orthogonalize(self, w: Tensor, basis: Tensor, *, passes: int = 2) -> tuple[Tensor, Tensor]:
        """Subtract from w [l] or [p, l], in place, its part in the span of orthonormal rows [m, l].

        Returns coefficients and norms as `kernels.orthogonalize`, which does the work where there
        are no slices. With slices, coefficients are summed over processes before they are used.
        """
        if self._slices is None:
            return kernels.orthogonalize(w, basis, passes=passes)
        W = w if w.ndim == 2 else w[None]
        coefficients = torch.zeros(len(W), len(basis), dtype=torch.float64, device=w.device)
        parts = [slice(None)] if basis.dtype == w.dtype else list(self.parts(w.device))
        with full_precision(w.device):
            for _ in range(passes):
                sums = torch.zeros_like(coefficients)
                for part in parts:
                    sums += _products(W[:, part], basis[:, part].to(w.dtype))
                sums = self.total(sums)
                for part in parts:
                    W[:, part].addmm_(sums.to(w.dtype), basis[:, part].to(w.dtype), alpha=-1)
                coefficients += sums
        shape = w.shape[:-1]
        norms = self.total(kernels.row_dots(W, W)[1]).sqrt()
        return coefficients.view(*shape, len(basis)), norms.view(shape)

    def orthonormal(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Return an orthonormal basis [m, l] of a space that contains rows [m, l], m <= n.

        A row that depends on those before it is replaced by a random one.
        """
        basis = rows.clone(memory_format=torch.contiguous_format)
        for start in range(0, len(basis), MOST_ROWS):
            panel = basis[start : start + MOST_ROWS]
            while True:
                if start:
                    lengths = self.dot(panel, panel).sqrt()
                    _, left = self.orthogonalize(panel, basis[:start])
                    rounding = torch.finfo(panel.dtype).eps * lengths
                    panel.masked_fill_((left <= rounding)[:, None], 0.0)
                own = kernels.cholesky_qr(panel, total=self.total).diagonal()
                missing = (own == 0).nonzero().flatten().tolist()
                if not missing:
                    break
                for i in missing:
                    panel[i].normal_(generator=random)
        return basis


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return A B^T [p, m], float64, of a [p, l] and b [m, l], summed in pieces as in `_norm`.

    One batched product covers all pieces, without copying them.
    """
    count = a.shape[1] // _PIECE
    whole = count * _PIECE
    left, right = (
        torch.unflatten(t[:, :whole], 1, (count, _PIECE)).transpose(0, 1) for t in (a, b)
    )
    sums = torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    return sums + a[:, whole:] @ b[:, whole:].T


def _norm(w: Tensor) -> Tensor:
    """Return ||w|| of w [l] in float64, summed in pieces so that float32 errs by its eps only.

    Torch's own sum in float64 first makes a float64 copy, which takes five times as long.
    """
    pieces = w[: len(w) // _PIECE * _PIECE].view(-1, _PIECE)
    rest = torch.linalg.vector_norm(w[pieces.numel() :])
    norms = torch.linalg.vector_norm(pieces, dim=1)
    total: Tensor = torch.linalg.vector_norm(torch.cat([norms, rest[None]]).double())
    return total
