"""A Krylov-Schur decomposition: how it grows, is read, restarted and locked."""

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

_ROUNDING = 10.0  # a product is taken to err by this many units eps ||H||
_RANDOM = 0.1  # how much of a random vector, relative to it, is mixed into a given start


class Ritz(NamedTuple):
    """The eigenpairs of the projection T of H."""

    values: Floats  # theta [m], ascending
    vectors: Floats  # S [m, m]: the pairs are theta_i, Q s_i
    residuals: Floats  # [m], ||H Q s_i - theta_i Q s_i||, less what lies along locked vectors
    lost: Floats  # [m], the share of the residuals that is a bound
    coupling: Floats  # B S [p, m]: what leads from the pairs to the vectors that wait


class KrylovSchur:
    """The decomposition H Q = Q T + P B of a symmetric H, Q and P with orthonormal columns.

    Q [n, m] holds the vectors multiplied so far, P [n, p] those that wait to be. A step multiplies
    the first b of P, which then belong to Q, and appends what is new in the products to P:

        H q_j = (Q, P) c_j + beta_j p_new

    With p = b = 1 this is the Lanczos iteration; wider, it is band Lanczos. T is the lower triangle
    of the c_j, mirrored. Two passes make a product orthogonal: one against the vectors that H q_j
    can lie along in exact arithmetic, the two or so before it and all that a restart kept or that
    is locked; then one against the whole basis, for what rounding left. T adds up the coefficients
    of both.

    Locked pairs are columns before Q that it stays orthogonal to. They take no further part, until
    they are unlocked: then T has the coefficients between them and what came since. Of the residual
    that a pair had when it was locked only the length is known, less what T has of it by now:

        H Q = Q T + P B + E,    ||H Q s - theta Q s|| <= ||B s|| + sum_j |s_j| ||E e_j||

    In a dtype narrower than the operator's the columns are rounded, and T is another: see
    `RoundedBasis`. An error d of a column adds beta_j d to the residual of the product that it came
    from, and (H - theta) d to that of a pair that is stored anew: F. Its columns are taken as
    uncorrelated, as roundings are; to the convergence of the iteration they do nothing.

        H V s - theta V s = P B s + E s + F s,    ||F s||^2 = sum_j s_j^2 ||F e_j||^2

    All is of 2^-e H, and only `scale` knows e: see `PowerOfTwoScale`.

    Memory: n (rows + b) elements, in slices where the operator's vectors are cut. Coefficients stay
    on the device until `collect`.

    Source: G. W. Stewart, A Krylov-Schur algorithm for large eigenproblems, SIAM J. Matrix Anal.
    Appl. 23 (2001), for symmetric H: K. Wu and H. Simon, Thick-restart Lanczos method, ibid. 22
    (2000), eqs. (2.6) to (2.11); A. Ruhe, Implementation aspects of band Lanczos algorithms, Math.
    Comp. 33 (1979).
    """

    def __init__(
        self,
        op: SymmetricOperator,
        rows: int,
        width: int,
        seed: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make room for `rows` locked and multiplied vectors; multiply `width` at a time.

        device, dtype: where the basis lies, and in which precision; None for the operator's.
        """
        self.ops = VectorOps(op)
        n = self.ops.dimension
        self.locked = 0  # rows [0, locked) of the basis
        self.size = 0  # rows [locked, size) are Q
        self.end = 0  # rows [size, end) are P
        self.products = 0
        self.norm = 0.0  # of 2^-e H, as far as it has been seen
        self.scale = PowerOfTwoScale(self.ops)
        self._op = op
        self._rows = min(rows, n)
        self.width = width
        room = min(rows + width, n)
        device = op.device if device is None else device
        dtype = op.dtype if dtype is None else dtype
        pinned = device.type == "cpu" and op.device.type == "cuda"
        stored = torch.empty(room, self.ops.length, dtype=dtype, device=device, pin_memory=pinned)
        kind = Basis if dtype == op.dtype else RoundedBasis
        self.basis = kind(self.ops, stored, op.dtype)  # (locked, Q, P)^T
        self._c = torch.zeros(self._rows, room, dtype=torch.float64, device=device)
        self._extents = np.zeros(
            self._rows, dtype=np.intp
        )  # rows that each product is orthogonal to
        self._lost = np.zeros(self._rows)  # ||E e_j||
        self._rounded = torch.zeros(self._rows, dtype=torch.float64, device=device)  # ||F e_j||
        self._origins: list[int] = []  # of rows [0, end): the first row their product may lie along
        self._children: dict[int, int] = {}  # row multiplied -> row that was new in its product
        self._generator = self.ops.generator(seed, device)
        self.began = slice(0, 0)  # columns of Q that waited when it was begun, or restarted last

    @property
    def eps(self) -> float:
        """The unit of rounding in the products."""
        return torch.finfo(self._op.dtype).eps

    @property
    def rounding(self) -> float:
        """A residual as small as rounding in the products makes it: of each element by eps, or by
        what is left of it below the smallest normal number."""
        tiny = torch.finfo(self._op.dtype).tiny * math.sqrt(self.ops.dimension)
        return _ROUNDING * self.eps * max(self.norm, math.ldexp(tiny, -self.scale.exponent))

    @property
    def closed(self) -> bool:
        """Whether nothing waits to be multiplied: Q is invariant, up to rounding."""
        return self.size == self.end

    @property
    def whole(self) -> bool:
        """Whether the locked vectors and Q span the whole space."""
        return self.size == self.ops.dimension

    @property
    def full(self) -> bool:
        """Whether the next step needs a restart first."""
        return self.end > self._rows and not self.closed

    @property
    def most_kept(self) -> int:
        """How many pairs a restart may keep, so that a step can follow."""
        return self._rows - self.locked - (self.end - self.size)

    @property
    def betas(self) -> Tensor:
        """What was new in each product [m], on the host: with b = 1, nothing locked and no restart,
        the lower diagonal of T and ||B||. None for the last product where Q is the whole space."""
        return self._c[: self.size].diagonal(1)[: self.size].cpu()

    def begin(self, starts: Tensor | None = None) -> None:
        """Let b random vectors wait, orthogonal to the basis; the first near `starts` [<= b, n]."""
        first = self.end
        for i in range(min(self.width, len(self.basis) - first)):
            row = self.basis.blank(first + i).normal_(generator=self._generator)
            if starts is not None and i < len(starts):
                length = self.ops.norm(starts[i]).clamp_min(self.eps)  # they may have cancelled
                row *= _RANDOM * length / self.ops.norm(row)
                row += starts[i]
            # Where the basis leaves little room, little remains, with a large error: so again.
            length = self.ops.norm(row)
            for _ in range(3 if first + i else 1):
                row /= length
                _, length = self.basis.project_out(row, 0, first + i, passes=1)
            row /= length
            self.basis.put(first + i, row)
            self.end += 1
            self._origins.append(first)
        self.began = slice(0, self.end - first)

    def step(self, most: int) -> int:
        """Multiply the vectors that wait, at most b or `most` of them, and return how many."""
        first, count = self.size, min(self.width, self.end - self.size, most)
        for j, w in enumerate(self._multiply(first, count), first):
            self.size += 1
            self._orthogonalise(j, w)
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

    def _orthogonalise(self, j: int, w: Tensor) -> None:
        """Fill row j of the coefficients from w = H q_j; let what is new in w wait."""
        new = self.end
        inside = new == len(self.basis)  # the basis spans the whole space: there is nothing new
        out = torch.empty_like(w) if inside else self.basis.blank(new)
        # Locked pairs with a residual are never far: what has gone must not be large beside w.
        origin = 0 if self.locked else self._origins[j]
        out.copy_(w)
        row = self._c[j]
        row.zero_()
        if origin:
            row[origin:new], _ = self.basis.project_out(out, origin, new, passes=1)
        rest, length = self.basis.project_out(out, 0, new, passes=1 if origin else 2)
        row[:new] += rest
        self._extents[j] = new
        if inside:
            self._rounded[j] = 0
            return
        row[new] = length
        out /= length.clamp_min(torch.finfo(w.dtype).tiny)
        error = self.basis.put(new, out)
        if error is not None:
            self._rounded[j] = length * error
        self._origins.append(j)
        self._children[j] = new
        self.end += 1

    def joined(self) -> Floats:
        """Return the eigenvalues of T with the locked pairs in it."""
        c = self._c[: self.size, : self.end].cpu().numpy()
        t = self.basis.projection(c, 0, self._extents[: self.size])
        values: Floats = torch.linalg.eigvalsh(torch.from_numpy(t)).numpy()  # the lower triangle
        return values

    def collect(self) -> Ritz:
        """Bring T and B to the host, and solve T.

        Raises:
            FloatingPointError: a product was not finite.
        """
        c = self._c[self.locked : self.size, : self.end].cpu().numpy()
        finite = np.isfinite(c).all(1)
        if not finite.all():
            late = len(c) - int(np.argmin(finite))
            raise FloatingPointError(
                f"product {self.products - late + 1} of H with a vector is not finite: is the "
                "loss, at these parameters?"
            )
        self.norm = max(self.norm, float(np.linalg.norm(c, axis=1).max(initial=0.0)))
        for j, child in self._children.items():
            if c[j - self.locked, child] <= self.rounding:
                # What follows came from rounding, not from H.
                self._cut(j + 1, child)
                c = c[: self.size - self.locked, : self.end]
                break
        t, b = c[:, self.locked : self.size], c[:, self.size :]
        extents = self._extents[self.locked : self.size]
        values, vectors = _eigh(self.basis.projection(c, self.locked, extents))
        vectors = self.basis.coordinates(self.locked, vectors)
        # What a product has along an earlier vector, but that one's product did not know of.
        lost = self._lost[self.locked : self.size]
        if lost.any():
            seen = (np.tril(t - t.T, -1) ** 2).sum(0)
            lost = np.sqrt(np.maximum(lost**2 - seen, 2.0 * self.rounding * lost))
        unknown = np.einsum("j,ji->i", lost, np.abs(vectors))
        coupling: Floats = np.einsum("jp,ji->pi", b, vectors)
        known = np.linalg.norm(coupling, axis=0)
        return Ritz(values, vectors, known + unknown, unknown, coupling)

    def _cut(self, size: int, end: int) -> None:
        self.size, self.end = size, end
        del self._origins[end:]
        self._children = {j: child for j, child in self._children.items() if child < end}
        self._c[:, end:] = 0

    def restart(self, ritz: Ritz, kept: NDArray[np.intp]) -> None:
        """Keep of Q the pairs with indices `kept` only: Q <- Q S, T <- Theta, B <- B S."""
        s = ritz.vectors[:, kept]
        size, end = self.locked + len(kept), self.end - self.size + self.locked + len(kept)
        left = torch.from_numpy(s).to(self._c).T @ self._c[self.locked : self.size]
        turned = self._rotate(ritz, self.locked, self.locked + kept, left[:, : self.locked])
        self.basis.move(self.size, self.end, size)
        self._c[self.locked :] = 0
        kept_rows = self._c[self.locked : size]
        kept_rows[:, :size] = turned
        kept_rows[:, size:end] = left[:, self.size : self.end]
        self._lost[self.locked : size] = ritz.lost[kept]
        self.began = slice(len(kept), len(kept) + end - size)
        self.size, self.end = size, end
        self._origins = [self.locked] * self.end
        self._children = {}

    def lock(self, ritz: Ritz, kept: NDArray[np.intp]) -> None:
        """Keep of all columns those with indices `kept`, first the locked ones, then the pairs
        of Q; all are locked then, and nothing waits."""
        block = self._rotate(ritz, 0, kept, self._c[: len(kept), :0])
        self.locked = self.size = self.end = len(kept)
        self._origins = [0] * self.end
        self._children = {}
        self._c.zero_()
        self._c[: self.end, : self.end] = block

    def unlock(self, residuals: Floats) -> None:
        """Make the locked vectors, pairs with these residuals, part of Q."""
        self._lost[: self.locked] = residuals
        self.locked = 0

    def vectors(self, ritz: Ritz, picked: NDArray[np.intp]) -> Tensor:
        """Return the columns [n, l] with indices `picked`, counted as in `lock`, on the operator's
        device."""
        s = self.basis.normalised(self._columns(ritz)[:, picked])
        return self.basis.combine(s).T.to(self._op.device)

    def rounded(self, ritz: Ritz, picked: NDArray[np.intp]) -> Floats:
        """Return ||F s|| of the columns with indices `picked`: what the rounding of the basis adds
        to their residuals, the errors of its columns being taken as uncorrelated."""
        squares = self._rounded[: self.size].cpu().numpy() ** 2
        found: Floats = np.sqrt(squares @ self._columns(ritz)[:, picked] ** 2)
        return found

    def orthogonality(self) -> float:
        """Return max |V^T V - I| over the columns V = (locked, Q)."""
        return self.basis.orthogonality(self.size)

    def _rotate(self, ritz: Ritz, first: int, kept: NDArray[np.intp], along: Tensor) -> Tensor:
        """Keep of the columns from `first` on those with indices `kept`, from there on; return the
        coefficients [l, first + l] of their products.

        along: [l, first], those along what is before, but for rounding.
        """
        rows = slice(first, self.size)
        locked = self._c[: self.locked].diagonal().cpu().numpy()
        theta = np.concatenate([locked, ritz.values])[kept]
        turned = self.basis.rotate(
            first,
            self._columns(ritz)[first:, kept],
            self._c[rows, : self.end],
            self._extents[rows],
            self._c[:first, :first],
        )
        end = first + len(kept)
        self._extents[first:end] = end
        if turned is None:
            return torch.cat((along, torch.from_numpy(np.diag(theta)).to(along)), dim=1)
        found, errors = turned
        new = (self.norm + np.abs(theta)) * errors  # ||(H - theta) d||, or more
        rounded = np.hypot(self.rounded(ritz, kept), new)
        self._rounded[first:end] = torch.from_numpy(rounded).to(self._rounded)
        return torch.from_numpy(found).to(along)

    def _columns(self, ritz: Ritz) -> Floats:
        """Return what combines the rows of the basis to the locked vectors and the pairs of Q."""
        s = np.eye(self.size)
        s[self.locked :, self.locked :] = ritz.vectors
        return s


def _eigh(t: Floats) -> tuple[Floats, Floats]:
    """Solve T, of which the lower triangle is read, on torch's threads: NumPy has others."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(t))
    return values.numpy(), vectors.numpy()
