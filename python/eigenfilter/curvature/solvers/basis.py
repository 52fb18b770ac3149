"""The vectors of a Krylov space: where they lie, in which precision, and the passes over them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eigenfilter.curvature.solvers.vector_ops import VectorOps, full_precision

_CHUNK = 1 << 16  # columns rotated at a time, so that the rotation needs no second basis

Floats: TypeAlias = NDArray[np.float64]
"""Small arrays on the host: a NumPy call on a few dozen numbers takes a tenth of torch's time."""


class Basis:
    """Rows [capacity, l] of orthonormal vectors q_i, in the operator's own dtype.

    Everything that depends on how vectors are stored is here; `RoundedBasis` stores them narrower.

    Attributes:
        rows: the vectors.
    """

    def __init__(self, ops: VectorOps, rows: Tensor, dtype: torch.dtype) -> None:
        """Use `rows` as the memory of the vectors of an operator of this dtype."""
        self.rows = rows
        self._ops = ops
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, first: int, count: int, device: torch.device) -> Tensor:
        """Return `count` vectors [count, l] to multiply, on the operator's device."""
        return self.rows[first : first + count].to(device)

    def workspace(self, i: int) -> Tensor:
        """Return memory [l], in the operator's dtype, in which the vector of row i is built."""
        return self.rows[i]

    def store(self, i: int, vector: Tensor) -> Tensor | None:
        """Store in row i the vector that was built in `workspace(i)`, and invalidate that memory.

        Returns ||d|| [], float64, of the rounding error d that storing makes; None if it makes
        none.
        """
        return None

    def orthogonalize(self, w: Tensor, first: int, end: int, passes: int) -> tuple[Tensor, Tensor]:
        """Orthogonalize w against the rows [first, end), as `VectorOps.orthogonalize`."""
        return self._ops.orthogonalize(w, self.rows[first:end], passes=passes)

    def move_rows(self, first: int, end: int, to: int) -> None:
        """Copy the rows [first, end) to the rows from `to` on; the ranges may overlap."""
        self.rows[to : to + end - first] = self.rows[first:end].clone()

    def rotate(
        self, first: int, s: Floats, c: Tensor, extents: NDArray[np.intp], before: Tensor
    ) -> tuple[Floats, Floats] | None:
        """Replace rows by linear combinations of them, in place.

            before   | 0 .. first: unchanged | m rows            | the rest, dropped later |
            after    | 0 .. first: unchanged | r rows = S^T (m)  | m - r rows of no use    |

        Args:
            first: the first of the m rows.
            s: [m, r], the coordinates of r Ritz vectors, S.
            c, extents: of the m rows, as in `projection`, with all columns.
            before: [first, first], the coefficients of the rows before them.

        Returns:
            None if what is stored are the Ritz vectors themselves, so that their products have the
            coefficients Theta. Else the coefficients [r, first + r] of their products, along the
            rows before and among themselves, and ||d_i|| [r] as in `store`.
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
        """Return T [m, m], the projection of H onto the span of the rows [first, first + m).

        Only the lower triangle of what is returned is valid.

        Args:
            c: [m, >= first + m], the coefficients that orthogonalization found in the products;
                row j belongs to the basis row first + j.
            first: the first row.
            extents: [m], how many rows of the basis each product was orthogonalized against.
        """
        return c[:, first : first + len(c)]

    def coordinates(self, first: int, s: Floats) -> Floats:
        """Return the combinations [m, m] of the rows from `first` on, for eigenvectors s of T."""
        return s

    def orthonormal_combinations(self, s: Floats) -> Floats:
        """Return the S [size, r] nearest to s whose combinations of the rows are orthonormal."""
        return s

    def orthogonality(self, size: int) -> float:
        """Return max |V^T V - I| over the rows [0, size)."""
        gram = self._ops.gram(self.rows[:size])
        return float((gram - torch.eye(size).to(gram)).abs().max())


# A basis in float16. It differs from a textbook Lanczos basis in:
#
# 1. The vectors are not orthonormal. Each is v = q + d, with ||d|| near 2e-4, and their Gram matrix
#    G differs from I by as much. So T is not what orthogonalization measured, but the solution of
#    the generalized problem M s = theta G s, with M = V^T H V.
# 2. M is not measured either: V^T H V would cost a pass per product. It follows from coefficients
#    that are known, H v_j = V c_j + (what is orthogonal to V), so that row j of M is c_j^T G. This
#    is exact only for the rows i that the product was orthogonalized against, hence the lower
#    triangle (`extents`), and the upper one by symmetry.
# 3. One more pass of Gram-Schmidt: subtracting V (V^T w) leaves the part (G - I) V^T w of w.
# 4. G is measured row by row in float64, and only for rows that are new or changed (`_gram_rows`).
#
#        columns     0            _gram_rows            size
#        rows 0      | measured before                 | read now  |
#        ...         | and still valid                 | (mirror)  |
#        _gram_rows  | read now                        | read now  |
#
# 5. A restart rounds Y = V S a second time, to Y + D. The Ritz vectors that are stored are not
#    quite the Ritz vectors that were computed, so Theta is not their projection. (4) gives their
#    projection without a product: D^T V is accumulated while D exists, piece by piece.
# 6. The residual of a pair has a part that the iteration cannot see and no step can reduce, F s. It
#    is estimated (`KrylovSchur.rounding_residuals`) and reported, and does not delay convergence.


class RoundedBasis(Basis):
    """Rows v_i of a dtype narrower than the operator's, orthonormal except for their rounding.

    A stored vector is v = q + d; in float16 ||d|| is near 2e-4 (beyond n = 10^8, where elements are
    subnormal, 1.7e-8 sqrt(n)). H multiplies v, not q, and the product is orthogonalized against all
    of V = (v_1, ..):

        H v_j = V c_j + beta_j q_new,    V^T q_new = 0                                          (1)
        M = V^T H V = tril(C^T G) mirrored,    G = V^T V                                        (2)

    Row j of M up to j follows from c_j, the rest by symmetry; nothing is neglected except the
    rounding of products and sums. One pass of orthogonalization leaves a share G - I of what it
    subtracts, so one pass more is made. Then

        T = L^-1 M L^-T,    G = L L^T,    T s' = theta s',    s = L^-T s'                       (3)

    has the eigenvalues that H has on the span of the stored vectors. The rounding d changes those
    of H to second order only, by about ||d||^2 ||H||.

    A rotation stores Y = V S as Y + D. As (1) gives H Y except for the errors of earlier rounding,
    no product is needed for

        (Y + D)^T H (Y + D) = S^T M S + D^T H Y + (D^T H Y)^T + D^T H D                         (4)

    up to the last term. D^T V is summed while D is formed: D has its largest elements where vectors
    have theirs, and may well have a part along them.

    Source: (3): B. N. Parlett, The Symmetric Eigenvalue Problem (1998), section 15.1. (4) is ours.
    """

    def __init__(self, ops: VectorOps, rows: Tensor, dtype: torch.dtype) -> None:
        super().__init__(ops, rows, dtype)
        self._gram = np.zeros((len(rows), len(rows)))
        self._gram_rows = 0  # how many leading rows and columns of it are valid

    def orthogonalize(self, w: Tensor, first: int, end: int, passes: int) -> tuple[Tensor, Tensor]:
        return super().orthogonalize(w, first, end, passes + 1)

    def read(self, first: int, count: int, device: torch.device) -> Tensor:
        return super().read(first, count, device).to(self._dtype)

    def workspace(self, i: int) -> Tensor:
        return torch.empty(self._ops.length, dtype=self._dtype, device=self.rows.device)

    def store(self, i: int, vector: Tensor) -> Tensor:
        self._gram_rows = min(self._gram_rows, i)
        self.rows[i] = vector
        for part in self._ops.parts(self.rows.device):  # or torch makes a wide copy of the row
            vector[part] -= self.rows[i, part]
        return self._ops.norm(vector)

    def move_rows(self, first: int, end: int, to: int) -> None:
        self._gram_rows = min(self._gram_rows, to)
        super().move_rows(first, end, to)

    def rotate(
        self, first: int, s: Floats, c: Tensor, extents: NDArray[np.intp], before: Tensor
    ) -> tuple[Floats, Floats]:
        (m, r), end = s.shape, c.shape[1]
        size, last = first + m, first + r
        coefficients = c.cpu().numpy()
        # Inner products of H Y with the rows before, and with Y; and H Y along all rows, by (1).
        along = s.T @ self._inner_products(coefficients, extents)[:, :first]
        among = s.T @ self._projected(coefficients, first, extents) @ s
        products = s.T @ coefficients
        # D^T V in the first columns, and the squares of the norms of D's columns in the last one.
        sums = torch.zeros(r, end + 1, dtype=torch.float64, device=self.rows.device)
        factor = torch.from_numpy(s).to(self.rows.device, self._dtype)
        with full_precision(self.rows.device):
            for part in self._ops.parts(self.rows.device):
                wide = self.rows[:end, part].to(self._dtype)
                combined = factor.T @ wide[first:size]
                self.rows[first:last, part] = combined
                errors = self.rows[first:last, part] - combined
                sums[:, :end] += errors @ wide.T
                sums[:, end] += errors.square().sum(1)
        self._gram_rows = min(self._gram_rows, first)
        total = self._ops.total(sums).cpu().numpy()
        first_order = total[:, :end] @ products.T  # D^T H Y
        among += first_order + first_order.T
        along += total[:, :first] @ before.cpu().numpy().T
        # Coefficients of the products, from their inner products: (H y_i)^T V = k_i^T G.
        gram, inner = self._gram_matrix(last), np.hstack((along, among))
        solution = torch.linalg.solve(*map(torch.from_numpy, (gram, np.ascontiguousarray(inner.T))))
        return solution.T.numpy(), np.sqrt(total[:, end])

    def combine(self, s: Floats) -> Tensor:
        factor = torch.from_numpy(s).to(self.rows.device, self._dtype)
        combined = factor.new_empty(s.shape[1], self._ops.length)
        with full_precision(self.rows.device):
            for part in self._ops.parts(self.rows.device):
                combined[:, part] = factor.T @ self.rows[: len(s), part].to(self._dtype)
        return combined

    def projection(self, c: Floats, first: int, extents: NDArray[np.intp]) -> Floats:
        gram = self._gram_matrix(first + len(c))[first:, first:]
        factor = torch.linalg.cholesky(torch.from_numpy(gram))
        m = torch.from_numpy(self._projected(c, first, extents))
        half = torch.linalg.solve_triangular(factor, m, upper=False)
        t: Floats = torch.linalg.solve_triangular(factor.T, half, upper=True, left=False).numpy()
        return t

    def coordinates(self, first: int, s: Floats) -> Floats:
        size = first + len(s)
        gram = torch.from_numpy(self._gram_matrix(size)[first:, first:])
        factor = torch.linalg.cholesky(gram).T
        solution = torch.linalg.solve_triangular(factor, torch.from_numpy(s), upper=True)
        coordinates: Floats = solution.numpy()
        return coordinates

    def orthonormal_combinations(self, s: Floats) -> Floats:
        values, vectors = np.linalg.eigh(s.T @ self._gram_matrix(len(s)) @ s)
        nearest: Floats = s @ ((vectors / np.sqrt(values)) @ vectors.T)
        return nearest

    def orthogonality(self, size: int) -> float:
        return float(np.abs(self._gram_matrix(size) - np.eye(size)).max())

    def _projected(self, c: Floats, first: int, extents: NDArray[np.intp]) -> Floats:
        """Return M [m, m] of (2) of the rows [first, first + m); arguments as in `projection`."""
        m = self._inner_products(c, extents)[:, first : first + len(c)]
        whole: Floats = np.tril(m) + np.tril(m, -1).T
        return whole

    def _inner_products(self, c: Floats, extents: NDArray[np.intp]) -> Floats:
        """Return (H v_j) . v_i [m, size] of the last m of the first `size` rows with all of these.

        They are valid for i <= j; beyond, products were not orthogonalized.
        """
        size = int(extents.max(initial=0))
        inside = np.arange(size) < extents[:, None]
        products: Floats = np.where(inside, c[:, :size], 0.0) @ self._gram_matrix(size)
        return products

    def _gram_matrix(self, size: int) -> Floats:
        """Return G [size, size] of the first rows; only what has changed is measured."""
        valid = min(self._gram_rows, size)
        if valid < size:
            rows = torch.zeros(size - valid, size, dtype=torch.float64, device=self.rows.device)
            for part in self._ops.parts(self.rows.device):
                # In two steps: torch's direct conversion from half is slow on the CPU.
                columns = self.rows[:size, part].to(self._dtype).double()
                rows += columns[valid:] @ columns.T
            total = self._ops.total(rows).cpu().numpy()
            self._gram[valid:size, :size] = total
            self._gram[:valid, valid:size] = total[:, :valid].T
            self._gram_rows = size
        return self._gram[:size, :size]
