"""Extreme eigenpairs of a symmetric operator by the Lanczos iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eigenfilter.curvature.result import EigenResult

_ROUNDING = 10.0  # a product is taken to err by this many units eps ||H||
_RANDOM = 0.3  # how much of a random vector, relative to it, is mixed into a given start


class SymmetricOperator(Protocol):
    """What a solver needs of a symmetric H [n, n]. It must not write to v.

    If the operator has a context manager `fixed()`, solvers hold it while they work.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors taken and given."""

    @property
    def device(self) -> torch.device:
        """Of the vectors taken and given."""

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] for v [n]."""

    def matmat(self, V: Tensor) -> Tensor:
        """Return H V [n, b] for V [n, b]."""


@torch.no_grad()
def eigsh(
    op: SymmetricOperator,
    k: int = 10,
    which: str = "LA",
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    block_size: int | None = None,
    v0: Tensor | EigenResult | None = None,
    *,
    seed: int = 0,
) -> EigenResult:
    """Return k eigenpairs of a symmetric operator H, stopping by itself.

        H Q - Q T = beta_m q_{m+1} e_m^T,    T s_i = theta_i s_i,    v_i = Q s_i
        ||H v_i - theta_i v_i|| = beta_m |e_m^T s_i|

    Q [n, m] has orthonormal columns, T [m, m] is tridiagonal; every new column is orthogonalised
    against the two before it, then against all. The iteration stops when the k wanted pairs have

        residual_i <= max(tol max(|theta_i|, eps^(2/3) ||T||), 10 eps ||T||),

    eps of the operator's dtype and the last term what rounding allows. Where beta_m vanishes, Q
    spans an invariant subspace, which holds one vector for each distinct eigenvalue; the iteration
    goes on from a random vector outside it until no better eigenvalue can be left, so that multiple
    eigenvalues, rank deficiency and H = 0 are answered rightly. A multiple eigenvalue in a spectrum
    too rich to be exhausted is found once, or again only through rounding.

    Memory: Q and one spare column, in storage that doubles as it fills: from n (m + 1) elements.

    Args:
        op: the operator; float32 or float64.
        k: how many pairs, 1 <= k <= n.
        which: "LA", "SA": largest, smallest; "LM": largest in magnitude; "BE": both ends, one more
            at the high end if k is odd.
        tol: relative tolerance of the residuals, > 0.
        max_matvecs: the most products to use, >= k; by default max(300, 20 k).
        block_size: None or 1; blocks do not exist yet.
        v0: where to start: a vector [n], or the result of an earlier, similar problem, whose
            vectors are then summed. A random vector of 0.3 times its length is added, so that no
            eigenvector is missing; still, one that v0 lacked, of an eigenvalue a few percent beyond
            the wanted ones, can be overlooked when tol is loose and k small. By default random.
        seed: of the random vectors; the global generator is left alone.

    Returns:
        The pairs in the order of `EigenResult.values`. If max_matvecs did not suffice, a
        RuntimeWarning says so and `converged` tells which did.

    Raises:
        ValueError: an argument is out of its range.
        FloatingPointError: a product is not finite.
        RuntimeError: whatever the operator raises, such as a model changed within the solve.

    Source: B. N. Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13, eqs. (13.3), (13.8).
    """
    limit = max(300, 20 * k) if max_matvecs is None else max_matvecs
    _check(op, k, which, tol, limit, block_size)
    n = op.shape[0]
    with getattr(op, "fixed", nullcontext)():
        run = _Lanczos(op, limit, seed)
        run.begin(None if v0 is None else _start(op, v0))
        due = 1
        while True:
            run.step()
            spent = run.products == limit
            if run.size < min(due, n) and not spent:
                continue
            t = run.collect(tol)
            if run.size >= k and (spent or run.size == n or _settled(t, k, which)):
                break
            if t.closed:
                run.begin()
            # Looking costs an eigendecomposition of T, so it is done less often as T grows.
            due = run.size + 1 + (run.size // 20 if run.size >= k else 0)
        return _result(run, t.ritz, k, which)


def _check(
    op: SymmetricOperator, k: int, which: str, tol: float, limit: int, block_size: int | None
) -> None:
    n = op.shape[0]
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the operator must be float32 or float64, not {op.dtype}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, n] = [1, {n}], not {k}")
    if which not in _KEYS:
        raise ValueError(f"which must be one of {list(_KEYS)}, not {which!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    if limit < k:
        raise ValueError(f"max_matvecs must be at least k = {k}, not {limit}")
    if block_size not in (None, 1):
        raise ValueError(f"block_size must be None or 1 for now, not {block_size}")


def _start(op: SymmetricOperator, v0: Tensor | EigenResult) -> Tensor:
    v = v0.vectors.sum(1) if isinstance(v0, EigenResult) else v0
    if v.shape != op.shape[:1]:
        raise ValueError(f"v0 must have shape [{op.shape[0]}], not {list(v.shape)}")
    v = v.to(op.device, op.dtype)
    if not 0 < torch.linalg.vector_norm(v) < torch.inf:
        raise ValueError("v0 must be finite and not zero")
    return v


_KEYS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "LA": (torch.clone,),
    "SA": (torch.neg,),
    "LM": (torch.abs,),
    "BE": (torch.neg, torch.clone),
}


def _ends(values: Tensor, k: int, which: str) -> list[tuple[Tensor, Tensor]]:
    """Return for each end of the spectrum asked for: a key of `values`, and the best by it."""
    keys = _KEYS[which]
    counts = (k,) if len(keys) == 1 else (k // 2, k - k // 2)
    ends = []
    for key, count in zip(keys, counts, strict=True):
        if count:
            score = key(values)
            ends.append((score, score.argsort(descending=True, stable=True)[:count]))
    return ends


class _Ritz(NamedTuple):
    values: Tensor  # [m], ascending
    vectors: Tensor  # [m, m], eigenvectors of T in columns
    residuals: Tensor  # [m]
    met: Tensor  # [m] bool, whether each has converged


class _Projection:
    """T on the host, in float64: one tridiagonal block for each start, with nothing in between."""

    def __init__(
        self, alpha: Tensor, beta: Tensor, starts: list[int], floor: float, tol: float
    ) -> None:
        """Solve T: `alpha` [m] is its diagonal, `beta` [m] what lies below it, or is left over.

        floor: a residual as small as rounding makes it.
        """
        self._floor, self._tol = floor, tol
        last = torch.zeros(len(beta), dtype=torch.bool)
        last[[start - 1 for start in (*starts[1:], len(beta))]] = True
        self._alpha, self._below = alpha, beta.masked_fill(last, 0.0)
        self._left = beta.masked_fill(~last, 0.0)
        self.blocks = len(starts)
        self.ritz = self._solve(0)
        self.block = self._solve(starts[-1]) if self.blocks > 1 else self.ritz
        # As a whole, the last block is then as good as invariant: what follows is rounding.
        self.closed = bool(beta[-1] <= floor or self.block.met.all())

    def _solve(self, first: int) -> _Ritz:
        off = self._below[first:-1]
        values, vectors = torch.linalg.eigh(self._alpha[first:].diag() + off.diag(1) + off.diag(-1))
        residuals = self._left[first:] @ vectors.abs()
        return _Ritz(values, vectors, residuals, residuals <= self.allowed(values))

    def allowed(self, values: Tensor) -> Tensor:
        """Return the residuals allowed at `values`."""
        return (self._tol * values.abs()).clamp_min(self._floor)


def _settled(t: _Projection, k: int, which: str) -> bool:
    """Whether the k wanted pairs are found: they have converged, and no better one can be left."""
    wanted = _ends(t.ritz.values, k, which)
    if not all(bool(t.ritz.met[best].all()) for _, best in wanted):
        return False
    # The last block shows what lies outside the earlier ones, as soon as its ends have converged.
    tops = _ends(t.block.values, 1 if len(wanted) == 1 else 2, which)
    if not t.closed:
        return all(bool(t.block.met[best].all()) for _, best in tops)
    # A closed block holds each distinct eigenvalue once, since its start was random: what lies
    # outside it may repeat any of them, but not exceed the best.
    return all(
        float(top.max()) <= float((score[best] + t.allowed(score[best])).min())
        for (top, _), (score, best) in zip(tops, wanted, strict=True)
    )


class _Lanczos:
    """An iteration as far as it has been run. Scalars stay on the device until collected."""

    def __init__(self, op: SymmetricOperator, limit: int, seed: int) -> None:
        n = op.shape[0]
        self.size = 0  # m, the columns of Q
        self.products = 0
        self._op = op
        self._rows = min(n, limit) + 1
        self.basis = torch.empty(min(32, self._rows), n, dtype=op.dtype, device=op.device)  # Q^T
        self._scalars = torch.empty(2, self._rows, dtype=torch.float64, device=op.device)
        self._generator = torch.Generator(op.device).manual_seed(seed)
        self._starts: list[int] = []

    def begin(self, hint: Tensor | None = None) -> None:
        """Start a block at a random vector, near `hint` if given, made orthogonal to the basis."""
        v = self.basis.new_empty(self.basis.shape[1]).normal_(generator=self._generator)
        if hint is not None:
            v = hint / torch.linalg.vector_norm(hint) + _RANDOM * v / torch.linalg.vector_norm(v)
        # Where the basis leaves little room, little of v remains, with a large error: so again.
        for _ in range(3):
            v = _project_out(v / torch.linalg.vector_norm(v), self.basis[: self.size])
        self._starts.append(self.size)
        self.basis[self.size] = v / torch.linalg.vector_norm(v)

    def step(self) -> None:
        """Multiply by the last vector: one more row of T, and the next vector."""
        m = self.size
        self._make_room(m + 2)
        basis = self.basis[: m + 1]
        w = self._op.matvec(basis[m])
        self._scalars[0, m] = (basis[m] * w).sum(dtype=torch.float64)
        # H being symmetric, H q lies along the last two vectors only, but for rounding, which the
        # second pass takes away: it reads the whole basis, and so costs what a third of these do.
        w = _project_out(_project_out(w, basis[-2:]), basis)
        beta = torch.linalg.vector_norm(w, dtype=torch.float64)
        self._scalars[1, m] = beta
        self.basis[m + 1] = w / beta.clamp_min(torch.finfo(w.dtype).tiny)
        self.size += 1
        self.products += 1

    def collect(self, tol: float) -> _Projection:
        """Bring T to the host. If a block closed, cut off what came after: it followed rounding."""
        alpha, beta = scalars = self._scalars[:, : self.size].cpu()
        if not scalars.isfinite().all():
            raise FloatingPointError(
                "a product H v is not finite: is the loss, at these parameters?"
            )
        above = torch.cat([beta.new_zeros(1), beta[:-1]])
        norm = float((above + alpha.abs() + beta).max())
        eps = torch.finfo(self.basis.dtype).eps
        floor = max(_ROUNDING * eps, tol * eps ** (2 / 3)) * norm
        first = self._starts[-1]
        ended = (beta[first:] <= floor).nonzero()
        if len(ended):
            self.size = first + int(ended[0]) + 1
        return _Projection(alpha[: self.size], beta[: self.size], self._starts, floor, tol)

    def _make_room(self, rows: int) -> None:
        if rows > len(self.basis):
            size = min(2 * len(self.basis), self._rows)
            grown = self.basis.new_empty(size, self.basis.shape[1])
            grown[: rows - 1] = self.basis[: rows - 1]
            self.basis = grown


def _project_out(w: Tensor, basis: Tensor) -> Tensor:
    """Return w [n] less its part along the rows of basis [m, n]: one pass of Gram-Schmidt."""
    return torch.addmv(w, basis.T, basis @ w, alpha=-1)


def _result(run: _Lanczos, ritz: _Ritz, k: int, which: str) -> EigenResult:
    picked = torch.cat([best for _, best in _ends(ritz.values, k, which)])
    if which == "BE":
        picked = picked.sort().values
    basis = run.basis[: run.size]
    converged = ritz.met[picked]
    found = int(converged.sum())
    if found == k:
        reason = f"{found} pairs converged"
    else:
        reason = (
            f"stopped after {run.products} products with {found} of {k} pairs converged: raise "
            "max_matvecs, loosen tol, or ask for fewer pairs"
        )
        warnings.warn(reason, RuntimeWarning, stacklevel=4)
    return EigenResult(
        values=ritz.values[picked].to(basis),
        vectors=basis.T @ ritz.vectors[:, picked].to(basis),
        residuals=ritz.residuals[picked].to(basis),
        converged=converged.to(basis.device),
        matvecs=run.products,
        reason=reason,
    )
