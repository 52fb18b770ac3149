"""The vectors of a Krylov space: where they lie, in which precision, and the passes over them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eigenfilter.curvature.solvers.vector_ops import VectorOps, full_precision

_CHUNK = 1 << 16  # columns rotated at a time: the rotation needs no second basis

Floats: TypeAlias = NDArray[np.float64]
"""What the host works on: NumPy, whose calls on a few dozen numbers take a tenth of torch's."""


class Basis:
    """Rows [room, l] of orthonormal vectors q_i, in the operator's own dtype.

    All that depends on how they are stored is here; see `RoundedBasis` for the other way.

    Attributes:
        rows: the vectors.
    """

    def __init__(self, ops: VectorOps, rows: Tensor, dtype: torch.dtype) -> None:
        """Keep the vectors in `rows`; `dtype` is that of the operator's."""
        self.rows = rows
        self._ops = ops
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, first: int, count: int, device: torch.device) -> Tensor:
        """Return vectors [count, l] to multiply, on the device of the operator."""
        return self.rows[first : first + count].to(device)

    def blank(self, i: int) -> Tensor:
        """Return memory [l], in the operator's dtype, to make row i in."""
        return self.rows[i]

    def put(self, i: int, made: Tensor) -> Tensor | None:
        """Store what was made in `blank(i)`, which is lost; return ||d|| [], float64, of the error
        d that storing makes, or None where there is none."""
        return None

    def project_out(self, w: Tensor, first: int, end: int, passes: int) -> tuple[Tensor, Tensor]:
        """`VectorOps.project_out`, against the rows [first, end)."""
        return self._ops.project_out(w, self.rows[first:end], passes=passes)

    def move(self, first: int, end: int, to: int) -> None:
        """Copy the rows [first, end) to where `to` is the first."""
        self.rows[to : to + end - first] = self.rows[first:end].clone()

    def rotate(
        self, first: int, s: Floats, c: Tensor, extents: NDArray[np.intp], before: Tensor
    ) -> tuple[Floats, Floats] | None:
        """Replace the rows [first, first + m) by the combinations S^T of them, in place.

        s: [m, r], coordinates of Ritz vectors; the r combinations take the rows from `first` on.
        c, extents: of the rows, as `projection` takes them, with all columns.
        before: [first, first], coefficients of the rows before them.

        Returns None where they stay the Ritz vectors that they are; else the coefficients
        [r, first + r] of their products, along the rows before and among themselves, and ||d_i||
        [r] as `put` does.
        """
        factor = torch.from_numpy(s).to(self.rows)
        with full_precision(self.rows.device):
            for start in range(0, self._ops.length, _CHUNK):
                columns = self.rows[first : first + len(s), start : start + _CHUNK]
                columns[: s.shape[1]] = factor.T @ columns
        return None

    def combine(self, s: Floats) -> Tensor:
        """Return the combinations S^T [r, l] of the first rows, for s [size, r]."""
        with full_precision(self.rows.device):
            return torch.mm(torch.from_numpy(s).to(self.rows).T, self.rows[: len(s)])

    def projection(self, c: Floats, first: int, extents: NDArray[np.intp]) -> Floats:
        """Return T [m, m], the projection of H onto the span of the rows [first, first + m), of
        which the lower triangle holds.

        c: [m, >= first + m], what projecting out made of the products: row j is that of the row
        first + j of the basis.
        extents: [m], how many rows of the basis each was made orthogonal to.
        """
        return c[:, first : first + len(c)]

    def coordinates(self, first: int, s: Floats) -> Floats:
        """Return what combines the rows from `first` on to the eigenvectors s [m, m] of T."""
        return s

    def normalised(self, s: Floats) -> Floats:
        """Return S [size, r] changed as little as makes its combinations orthonormal."""
        return s

    def orthogonality(self, size: int) -> float:
        """Return max |V^T V - I| over the rows [0, size)."""
        gram = self._ops.gram(self.rows[:size])
        return float((gram - torch.eye(size).to(gram)).abs().max())


class RoundedBasis(Basis):
    """Rows v_i of a dtype narrower than the operator's, orthonormal but for their rounding.

    What is stored of a vector is v = q + d; in float16 ||d|| is some 2e-4 (beyond n = 10^8, where
    elements are subnormal, 1.7e-8 sqrt(n)). H is applied to v, not to q, and the product is made
    orthogonal to all of V = (v_1, ..):

        H v_j = V c_j + beta_j q_new,    V^T q_new = 0                                          (1)
        M = V^T H V = tril(C^T G) mirrored,    G = V^T V                                        (2)

    Row j of M up to j follows from c_j, the rest by symmetry; nothing is left out but the rounding
    of products and sums. A pass leaves G - I of what it takes away, hence one pass more. Then

        T = L^-1 M L^-T,    G = L L^T,    T s' = theta s',    s = L^-T s'                       (3)

    has the eigenvalues that H has on the span of what is stored, from which d moves those of H to
    second order only, by some ||d||^2 ||H||.

    Rotation stores Y = V S as Y + D. As H Y is known from (1) but for the errors of former
    rounding, no product is needed for

        (Y + D)^T H (Y + D) = S^T M S + D^T H Y + (D^T H Y)^T + D^T H D                         (4)

    up to the last term. D^T V is summed as D comes about: D has its largest elements where vectors
    have theirs, and may well lie along them.

    Source: (3): B. N. Parlett, The Symmetric Eigenvalue Problem (1998), section 15.1. (4) is ours.
    """

    def __init__(self, ops: VectorOps, rows: Tensor, dtype: torch.dtype) -> None:
        super().__init__(ops, rows, dtype)
        self._gram = np.zeros((len(rows), len(rows)))
        self._known = 0  # rows of it that hold

    def project_out(self, w: Tensor, first: int, end: int, passes: int) -> tuple[Tensor, Tensor]:
        return super().project_out(w, first, end, passes + 1)

    def read(self, first: int, count: int, device: torch.device) -> Tensor:
        return super().read(first, count, device).to(self._dtype)

    def blank(self, i: int) -> Tensor:
        return torch.empty(self._ops.length, dtype=self._dtype, device=self.rows.device)

    def put(self, i: int, made: Tensor) -> Tensor:
        self._known = min(self._known, i)
        self.rows[i] = made
        for part in self._ops.parts(self.rows.device):  # or torch makes a wide copy of the row
            made[part] -= self.rows[i, part]
        return self._ops.norm(made)

    def move(self, first: int, end: int, to: int) -> None:
        self._known = min(self._known, to)
        super().move(first, end, to)

    def rotate(
        self, first: int, s: Floats, c: Tensor, extents: NDArray[np.intp], before: Tensor
    ) -> tuple[Floats, Floats]:
        (m, r), end = s.shape, c.shape[1]
        size, last = first + m, first + r
        coefficients = c.cpu().numpy()
        along = s.T @ self._measured(coefficients, extents)[:, :first]
        among = s.T @ self._projected(coefficients, first, extents) @ s
        products = s.T @ coefficients
        # D^T V, and the squares of the columns of D
        found = torch.zeros(r, end + 1, dtype=torch.float64, device=self.rows.device)
        factor = torch.from_numpy(s).to(self.rows.device, self._dtype)
        with full_precision(self.rows.device):
            for part in self._ops.parts(self.rows.device):
                wide = self.rows[:end, part].to(self._dtype)
                made = factor.T @ wide[first:size]
                self.rows[first:last, part] = made
                errors = self.rows[first:last, part] - made
                found[:, :end] += errors @ wide.T
                found[:, end] += errors.square().sum(1)
        self._known = min(self._known, first)
        total = self._ops.total(found).cpu().numpy()
        first_order = total[:, :end] @ products.T
        among += first_order + first_order.T
        along += total[:, :first] @ before.cpu().numpy().T
        gram, wanted = self._inner_products(last), np.hstack((along, among))
        turned = torch.linalg.solve(*map(torch.from_numpy, (gram, np.ascontiguousarray(wanted.T))))
        return turned.T.numpy(), np.sqrt(total[:, end])

    def combine(self, s: Floats) -> Tensor:
        factor = torch.from_numpy(s).to(self.rows.device, self._dtype)
        found = factor.new_empty(s.shape[1], self._ops.length)
        with full_precision(self.rows.device):
            for part in self._ops.parts(self.rows.device):
                found[:, part] = factor.T @ self.rows[: len(s), part].to(self._dtype)
        return found

    def projection(self, c: Floats, first: int, extents: NDArray[np.intp]) -> Floats:
        gram = self._inner_products(first + len(c))[first:, first:]
        factor = torch.linalg.cholesky(torch.from_numpy(gram))
        m = torch.from_numpy(self._projected(c, first, extents))
        half = torch.linalg.solve_triangular(factor, m, upper=False)
        t: Floats = torch.linalg.solve_triangular(factor.T, half, upper=True, left=False).numpy()
        return t

    def coordinates(self, first: int, s: Floats) -> Floats:
        size = first + len(s)
        gram = torch.from_numpy(self._inner_products(size)[first:, first:])
        factor = torch.linalg.cholesky(gram).T
        found: Floats = torch.linalg.solve_triangular(
            factor, torch.from_numpy(s), upper=True
        ).numpy()
        return found

    def normalised(self, s: Floats) -> Floats:
        values, vectors = np.linalg.eigh(s.T @ self._inner_products(len(s)) @ s)
        found: Floats = s @ ((vectors / np.sqrt(values)) @ vectors.T)
        return found

    def orthogonality(self, size: int) -> float:
        return float(np.abs(self._inner_products(size) - np.eye(size)).max())

    def _projected(self, c: Floats, first: int, extents: NDArray[np.intp]) -> Floats:
        """Return M [m, m] of the rows [first, first + m); for the arguments see `projection`."""
        m = self._measured(c, extents)[:, first : first + len(c)]
        whole: Floats = np.tril(m) + np.tril(m, -1).T
        return whole

    def _measured(self, c: Floats, extents: NDArray[np.intp]) -> Floats:
        """Return (H v_j) . v_i [m, size] of the last m of the first `size` rows, as their products
        are known, with all before them; it holds for i <= j."""
        size = int(extents.max(initial=0))
        inside = np.arange(size) < extents[:, None]
        found: Floats = np.where(inside, c[:, :size], 0.0) @ self._inner_products(size)
        return found

    def _inner_products(self, size: int) -> Floats:
        """Return G [size, size] of the first rows; only what has changed is read."""
        known = min(self._known, size)
        if known < size:
            rows = torch.zeros(size - known, size, dtype=torch.float64, device=self.rows.device)
            for part in self._ops.parts(self.rows.device):
                # In two steps: torch's direct conversion from half is slow on the CPU.
                columns = self.rows[:size, part].to(self._dtype).double()
                rows += columns[known:] @ columns.T
            found = self._ops.total(rows).cpu().numpy()
            self._gram[known:size, :size] = found
            self._gram[:known, known:size] = found[:, :known].T
            self._known = size
        return self._gram[:size, :size]
