"""A Krylov-Schur decomposition of a symmetric operator: extend, solve, restart, lock."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.basis import Basis, Floats, RoundedBasis
from eigenfilter.curvature.solvers.power_of_two_scale import PowerOfTwoScale
from eigenfilter.curvature.solvers.vector_ops import VectorOps

_ROUNDING_UNITS = 10.0  # the assumed rounding error of a product, in units of eps ||H||
_RANDOM_SHARE = 0.1  # length of the random vector that is added to a start of the caller's

# How the rows of the basis are divided. All vectors are rows, so that each is contiguous.
#
#     0             num_locked                            size               end      capacity
#     |   locked    |                 Q                   |        P         |   unused    |
#     |             |                                     |                  |             |
#     | converged   | multiplied by H:                    | waiting to be    | len(basis)  |
#     | pairs, not  | right after a restart: kept Ritz    | multiplied:      | = max_basis |
#     | in T        | vectors, then new Krylov vectors    | block_size rows, | + block_size|
#     |             | as steps follow                     | or fewer         |             |
#
#   step         size += 1, end += 1 for each vector multiplied: the first row of P becomes the last
#                row of Q by moving the boundary, and what is new in H q_j is appended to P.
#
#                before   | locked | q q q q | p p |
#                after    | locked | q q q q   q | p p |            (block_size 2, one multiplied)
#
#   restart      Q shrinks from `size - num_locked` rows to the r Ritz vectors that are kept; P
#                moves up behind them and stays as it is.
#
#                before   | locked | q q q q q q q q q q | p p |    (full)
#                after    | locked | y y y y | p p |
#
#   lock         the chosen pairs, of those locked before and of Q, become rows [0, num_locked); Q
#                and P are empty, and `start` must follow.
#   unlock       num_locked = 0: what was locked becomes the first rows of Q.
#
# Row j of the coefficients belongs to basis row j and holds what orthogonalization made of H q_j:
#
#     column       0 .. num_locked    num_locked .. size            size .. end
#     row j of Q   along the locked   T (lower triangle, mirrored)  B^T: along P
#                  (rounding, or E)
#
# While nothing is restarted and block_size is 1, T is tridiagonal up to rounding. After a restart
# it is an arrow: Theta on the diagonal, and the coupling B S of every Ritz vector to the first row
# of P, which is the next row of Q:
#
#         theta_1                     x
#                 theta_2             x
#                         theta_3     x
#         x       x       x       alpha   beta
#                                 beta    alpha
#
# This differs from ARPACK in:
#
# 1. The restart. ARPACK applies implicit QR sweeps with the unwanted Ritz values as shifts. Here
#    the wanted Ritz vectors are formed explicitly (thick restart, or Krylov-Schur). In exact
#    arithmetic both keep the same space. This way any set of pairs can be kept, at both ends of the
#    spectrum at once, there is no forward instability, and the cost is one matrix product over the
#    basis.
# 2. Locking. ARPACK keeps converged vectors in the active basis. Here the wanted pairs leave T once
#    all have converged, and a new sequence starts orthogonal to them, to find repeated eigenvalues.
#    If it finds any, `unlock` puts all into one T again, and a Rayleigh-Ritz step decides.
# 3. Orthogonalization. ARPACK decides by a norm test whether a second pass of Gram-Schmidt is
#    needed. Here there are always two: a test would read a number from the device after every
#    product. The first pass is short: it goes against the rows that H q_j can lie along in exact
#    arithmetic (`_origins`), which are two of them if block_size is 1.
# 4. T. The three-term recurrence assumes the coefficients that are zero in exact arithmetic. Here T
#    has all coefficients that both passes measured.
# 5. Blocks. Any number of vectors may wait; they are multiplied as one block and orthogonalized one
#    after another (band Lanczos). So a dependent vector shortens P and breaks nothing.
# 6. Breakdown. ARPACK replaces a vanishing residual by a random vector. Here the decomposition ends
#    before what came from rounding (`_truncate`); where P becomes empty, Q is invariant (`closed`),
#    and the caller decides what to start next.
# 7. Synchronization. Coefficients stay on the device until `solve`, which the caller needs only
#    when it expects news. ARPACK is driven by reverse communication, one product at a time.
# 8. Range. Products are multiplied by a power of two, so that squares neither overflow nor vanish.


class Ritz(NamedTuple):
    """The eigenpairs of the projection T of H."""

    values: Floats  # theta [m], ascending
    vectors: Floats  # S [m, m]: the pairs are theta_i, Q s_i
    residuals: Floats  # [m], ||H Q s_i - theta_i Q s_i||, without what lies along locked vectors
    residual_slack: Floats  # [m], the part of `residuals` that is only an upper bound
    coupling: Floats  # B S [p, m]: the coefficients of H Q S along the rows of P


class KrylovSchur:
    """The decomposition H Q = Q T + P B of a symmetric H, with orthonormal columns of Q and P.

    Q [n, m] holds the vectors that were multiplied, P [n, p] those that will be. A step multiplies
    the first block_size vectors of P, moves them to Q, and appends the new directions to P:

        H q_j = (Q, P) c_j + beta_j p_new

    With p = block_size = 1 this is the Lanczos iteration; with more it is band Lanczos. T is the
    lower triangle of the c_j, mirrored.

    Q and P stay orthogonal to the locked pairs, which take no further part until `unlock`. Then T
    contains the coefficients between them and the vectors that came later. Of the residual that a
    pair had when it was locked only the length is known, less the part that T accounts for by now:

        H Q = Q T + P B + E,    ||H Q s - theta Q s|| <= ||B s|| + sum_j |s_j| ||E e_j||

    In a dtype narrower than the operator's the columns V are rounded, and `RoundedBasis` computes
    T. A rounding error d of a column adds beta_j d to the residual of the product that the column
    came from, and (H - theta) d to that of a Ritz pair that is stored: these are the columns of F.
    They are taken to be uncorrelated, as rounding errors are. The iteration does not see them:

        H V s - theta V s = P B s + E s + F s,    ||F s||^2 = sum_j s_j^2 ||F e_j||^2

    All of this is about 2^-e H; only `scale` knows e, see `PowerOfTwoScale`.

    Memory: n (max_basis + block_size) elements, in slices where the operator's vectors are sliced.

    Attributes:
        num_locked, size, end: the boundaries of locked vectors, Q and P among the rows of `basis`;
            the diagram at the top of this module shows them.
        starting_columns: the columns of Q that were P when the present stretch started, at `start`
            or at the last restart.
        products: the number of products used.
        norm: a lower estimate of ||2^-e H||, from the coefficients seen.

    Source: G. W. Stewart, A Krylov-Schur algorithm for large eigenproblems, SIAM J. Matrix Anal.
    Appl. 23 (2001), for symmetric H: K. Wu and H. Simon, Thick-restart Lanczos method, ibid. 22
    (2000), eqs. (2.6) to (2.11); A. Ruhe, Implementation aspects of band Lanczos algorithms, Math.
    Comp. 33 (1979).
    """

    def __init__(
        self,
        op: SymmetricOperator,
        max_basis: int,
        block_size: int,
        seed: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the basis.

        Args:
            op: the operator H.
            max_basis: the most locked and multiplied vectors.
            block_size: how many vectors are multiplied at a time.
            seed: seed of the random starts.
            device: where the basis lies; None for the operator's device.
            dtype: in which precision it is stored; None for the operator's dtype.
        """
        self.ops = VectorOps(op)
        n = self.ops.dimension
        self.num_locked = 0
        self.size = 0
        self.end = 0
        self.products = 0
        self.norm = 0.0
        self.scale = PowerOfTwoScale(self.ops)
        self._op = op
        self._max_basis = min(max_basis, n)
        self.block_size = block_size
        capacity = min(max_basis + block_size, n)
        device = op.device if device is None else device
        dtype = op.dtype if dtype is None else dtype
        pinned = device.type == "cpu" and op.device.type == "cuda"
        rows = torch.empty(capacity, self.ops.length, dtype=dtype, device=device, pin_memory=pinned)
        kind = Basis if dtype == op.dtype else RoundedBasis
        self.basis = kind(self.ops, rows, op.dtype)  # (locked, Q, P)^T
        # Row j is c_j.
        self._coefficients = torch.zeros(
            self._max_basis, capacity, dtype=torch.float64, device=device
        )
        self._extents = np.zeros(self._max_basis, dtype=np.intp)  # see `Basis.projection`
        self._locked_residuals = np.zeros(self._max_basis)  # ||E e_j||
        self._rounding_errors = self._coefficients.new_zeros(self._max_basis)  # ||F e_j||
        # For each row in [0, end): the first row that its product can lie along, in exact
        # arithmetic.
        self._origins: list[int] = []
        # Basis row that was multiplied -> basis row that holds the new direction of its product.
        self._children: dict[int, int] = {}
        self._generator = self.ops.generator(seed, device)
        self.starting_columns = slice(0, 0)

    @property
    def eps(self) -> float:
        """The unit of rounding in the products."""
        return torch.finfo(self._op.dtype).eps

    @property
    def rounding(self) -> float:
        """The residual that rounding in the products alone may cause.

        Every element errs by eps, or by the spacing of subnormal numbers where it is one.
        """
        tiny = torch.finfo(self._op.dtype).tiny * math.sqrt(self.ops.dimension)
        smallest = math.ldexp(tiny, -self.scale.exponent)
        return _ROUNDING_UNITS * self.eps * max(self.norm, smallest)

    @property
    def closed(self) -> bool:
        """Whether P is empty: Q is invariant, up to rounding."""
        return self.size == self.end

    @property
    def whole(self) -> bool:
        """Whether the locked vectors and Q span the whole space."""
        return self.size == self.ops.dimension

    @property
    def full(self) -> bool:
        """Whether a restart must come before the next step."""
        return self.end > self._max_basis and not self.closed

    @property
    def max_kept(self) -> int:
        """How many pairs a restart may keep so that a step can follow."""
        return self._max_basis - self.num_locked - (self.end - self.size)

    @property
    def betas(self) -> Tensor:
        """The lengths of the new directions [m], on the host.

        With block_size 1, nothing locked and no restart, these are the subdiagonal of T and ||B||.
        The last product has none where Q is the whole space.
        """
        return self._coefficients[: self.size].diagonal(1)[: self.size].cpu()

    def start(self, starts: Tensor | None = None) -> None:
        """Fill P with block_size random vectors, orthogonal to the basis.

        starts: [<= block_size, n], rows that are added to the first of them, as most of their
            length.
        """
        first = self.end
        for i in range(min(self.block_size, len(self.basis) - first)):
            row = self.basis.workspace(first + i).normal_(generator=self._generator)
            if starts is not None and i < len(starts):
                length = self.ops.norm(starts[i]).clamp_min(self.eps)  # columns may have cancelled
                row *= _RANDOM_SHARE * length / self.ops.norm(row)
                row += starts[i]
            # Where the basis leaves few directions, little of the row remains, with a large
            # relative error; so it is orthogonalized several times.
            length = self.ops.norm(row)
            for _ in range(3 if first + i else 1):
                row /= length
                _, length = self.basis.orthogonalize(row, 0, first + i, passes=1)
            row /= length
            self.basis.store(first + i, row)
            self.end += 1
            self._origins.append(first)
        self.starting_columns = slice(0, self.end - first)

    def step(self, limit: int) -> int:
        """Multiply the first vectors of P, at most block_size or `limit`; return how many."""
        first, count = self.size, min(self.block_size, self.end - self.size, limit)
        for j, w in enumerate(self._multiply(first, count), first):
            self.size += 1
            self._orthogonalize(j, w)
        return count

    def _multiply(self, first: int, count: int) -> list[Tensor]:
        v = self.basis.read(first, count, self._op.device)
        products = [self._op.matvec(v[0])] if count == 1 else list(self._op.matmat(v.T).unbind(1))
        self.products += count
        for w in products:
            if w.shape != v.shape[1:] or w.dtype != v.dtype or w.device != v.device:
                raise TypeError(
                    f"product {self.products} is {list(w.shape)}, {w.dtype}, on {w.device}; the "
                    f"operator takes {list(v.shape[1:])}, {v.dtype}, on {v.device}"
                )
        return [self.scale.down(w).to(self.basis.rows.device) for w in products]

    def _orthogonalize(self, j: int, w: Tensor) -> None:
        """Fill row j of the coefficients from w = H q_j, and append its new direction to P."""
        new = self.end
        spans_all = new == len(self.basis)  # the basis is the whole space: nothing is new
        direction = torch.empty_like(w) if spans_all else self.basis.workspace(new)
        # H q_j has a part along every locked pair, as long as that pair's residual, which need not
        # be small beside what remains of w. So both passes go over all rows if there are any.
        origin = 0 if self.num_locked else self._origins[j]
        direction.copy_(w)
        row = self._coefficients[j]
        row.zero_()
        if origin:
            row[origin:new], _ = self.basis.orthogonalize(direction, origin, new, passes=1)
        rest, length = self.basis.orthogonalize(direction, 0, new, passes=1 if origin else 2)
        row[:new] += rest  # the sum over both passes
        self._extents[j] = new
        if spans_all:
            self._rounding_errors[j] = 0
            return
        row[new] = length
        direction /= length.clamp_min(torch.finfo(w.dtype).tiny)
        error = self.basis.store(new, direction)
        if error is not None:
            self._rounding_errors[j] = length * error
        # By symmetry H p_new has no part along rows before q_j, the row that it came from.
        self._origins.append(j)
        self._children[j] = new
        self.end += 1

    def eigenvalues_with_locked(self) -> Floats:
        """Return the eigenvalues of T extended by the locked pairs."""
        c = self._coefficients[: self.size, : self.end].cpu().numpy()
        t = self.basis.projection(c, 0, self._extents[: self.size])
        values: Floats = torch.linalg.eigvalsh(torch.from_numpy(t)).numpy()  # the lower triangle
        return values

    def solve(self) -> Ritz:
        """Bring T and B to the host, and return the eigenpairs of T.

        Raises:
            FloatingPointError: a product was not finite.
        """
        c = self._coefficients[self.num_locked : self.size, : self.end].cpu().numpy()
        finite = np.isfinite(c).all(1)
        if not finite.all():
            age = len(c) - int(np.argmin(finite))
            raise FloatingPointError(
                f"product {self.products - age + 1} of H with a vector is not finite: is the "
                "loss, at these parameters?"
            )
        self.norm = max(self.norm, float(np.linalg.norm(c, axis=1).max(initial=0.0)))
        for j, child in self._children.items():
            if c[j - self.num_locked, child] <= self.rounding:
                # The direction `child` is rounding, and so is all that followed from it.
                self._truncate(j + 1, child)
                c = c[: self.size - self.num_locked, : self.end]
                break
        t, b = c[:, self.num_locked : self.size], c[:, self.size :]
        extents = self._extents[self.num_locked : self.size]
        values, vectors = _eigh(self.basis.projection(c, self.num_locked, extents))
        vectors = self.basis.coordinates(self.num_locked, vectors)
        # A pair that was locked and is unlocked has a residual of known length and, at first, of
        # unknown direction. Products of later vectors show parts of it: they lie above the diagonal
        # of T, where the pair's own row has none. What is left of the length is the slack.
        slack = self._locked_residuals[self.num_locked : self.size]
        if slack.any():
            known_part = (np.tril(t - t.T, -1) ** 2).sum(0)
            slack = np.sqrt(np.maximum(slack**2 - known_part, 2.0 * self.rounding * slack))
        residual_slack = np.einsum("j,ji->i", slack, np.abs(vectors))
        coupling: Floats = np.einsum("jp,ji->pi", b, vectors)
        residuals = np.linalg.norm(coupling, axis=0) + residual_slack
        return Ritz(values, vectors, residuals, residual_slack, coupling)

    def _truncate(self, size: int, end: int) -> None:
        self.size, self.end = size, end
        del self._origins[end:]
        self._children = {j: child for j, child in self._children.items() if child < end}
        self._coefficients[:, end:] = 0

    def restart(self, ritz: Ritz, indices: NDArray[np.intp]) -> None:
        """Keep only the pairs with these indices: Q <- Q S, T <- Theta, B <- B S."""
        s = ritz.vectors[:, indices]
        size = self.num_locked + len(indices)
        end = size + self.end - self.size
        products = torch.from_numpy(s).to(self._coefficients).T  # S^T, then S^T (c_j)
        products = products @ self._coefficients[self.num_locked : self.size]
        rotated = self._rotate(
            ritz, self.num_locked, self.num_locked + indices, products[:, : self.num_locked]
        )
        self.basis.move_rows(self.size, self.end, size)
        self._coefficients[self.num_locked :] = 0
        kept_rows = self._coefficients[self.num_locked : size]
        kept_rows[:, :size] = rotated
        kept_rows[:, size:end] = products[:, self.size : self.end]
        self._locked_residuals[self.num_locked : size] = ritz.residual_slack[indices]
        self.starting_columns = slice(len(indices), len(indices) + end - size)
        self.size, self.end = size, end
        # The products of P may now lie along every Ritz vector.
        self._origins = [self.num_locked] * self.end
        self._children = {}

    def lock(self, ritz: Ritz, indices: NDArray[np.intp]) -> None:
        """Lock the pairs with these indices, and drop all other vectors and P.

        indices: of all pairs, first the locked ones, then those of Q.
        """
        block = self._rotate(ritz, 0, indices, self._coefficients[: len(indices), :0])
        self.num_locked = self.size = self.end = len(indices)
        self._origins = [0] * self.end
        self._children = {}
        self._coefficients.zero_()
        self._coefficients[: self.end, : self.end] = block

    def unlock(self, residuals: Floats) -> None:
        """Make the locked vectors, pairs with these residuals, part of Q."""
        self._locked_residuals[: self.num_locked] = residuals
        self.num_locked = 0

    def vectors(self, ritz: Ritz, indices: NDArray[np.intp]) -> Tensor:
        """Return the vectors [n, l] of the pairs with these indices, on the operator's device.

        indices: of all pairs, first the locked ones, then those of Q.
        """
        s = self.basis.orthonormal_combinations(self._combinations(ritz)[:, indices])
        return self.basis.combine(s).T.to(self._op.device)

    def rounding_residuals(self, ritz: Ritz, indices: NDArray[np.intp]) -> Floats:
        """Return ||F s|| of the pairs with these indices, counted as in `vectors`.

        It is what the rounding of the basis adds to their residuals.
        """
        squares = self._rounding_errors[: self.size].cpu().numpy() ** 2
        residuals: Floats = np.sqrt(squares @ self._combinations(ritz)[:, indices] ** 2)
        return residuals

    def orthogonality(self) -> float:
        """Return max |V^T V - I| over the columns V = (locked, Q)."""
        return self.basis.orthogonality(self.size)

    def _rotate(self, ritz: Ritz, first: int, indices: NDArray[np.intp], before: Tensor) -> Tensor:
        """Replace the rows from `first` on by the pairs with these indices.

        before: [l, first], the coefficients of their products along the rows before `first`, in
            exact arithmetic.

        Returns the coefficients [l, first + l] of their products.
        """
        rows = slice(first, self.size)
        locked = self._coefficients[: self.num_locked].diagonal().cpu().numpy()
        theta = np.concatenate([locked, ritz.values])[indices]
        rotation = self.basis.rotate(
            first,
            self._combinations(ritz)[first:, indices],
            self._coefficients[rows, : self.end],
            self._extents[rows],
            self._coefficients[:first, :first],
        )
        end = first + len(indices)
        self._extents[first:end] = end
        if rotation is None:
            return torch.cat((before, torch.from_numpy(np.diag(theta)).to(before)), dim=1)
        coefficients, errors = rotation
        stored = (self.norm + np.abs(theta)) * errors  # an upper bound of ||(H - theta) d||
        rounding = np.hypot(self.rounding_residuals(ritz, indices), stored)
        self._rounding_errors[first:end] = torch.from_numpy(rounding).to(self._rounding_errors)
        return torch.from_numpy(coefficients).to(before)

    def _combinations(self, ritz: Ritz) -> Floats:
        """Return the matrix [size, size] that combines rows to the locked pairs and those of Q."""
        s = np.eye(self.size)
        s[self.num_locked :, self.num_locked :] = ritz.vectors
        return s


def _eigh(t: Floats) -> tuple[Floats, Floats]:
    """Solve T, of which the lower triangle is read, in torch's thread pool: NumPy has another."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(t))
    return values.numpy(), vectors.numpy()
