"""Extreme eigenpairs of a symmetric operator by the thick-restart Lanczos iteration."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.convergence import ConvergenceRule, Flags, Indices, RitzPairs
from eigenfilter.curvature.solvers.eigsh_arguments import (
    check_arguments,
    check_probability,
    check_rounded,
)
from eigenfilter.curvature.solvers.krylov_schur import KrylovSchur, Ritz
from eigenfilter.curvature.solvers.missed_eigenvalues import MissProbability
from eigenfilter.curvature.solvers.power_of_two_scale import exponent_of, times_power
from eigenfilter.curvature.solvers.result import EigenResult
from eigenfilter.curvature.solvers.vector_ops import VectorOps

_FEW = 20  # steps in which a pair can converge by luck
THICKNESS = 0.3  # a restart keeps this share of the pairs beyond the wanted ones


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
    criterion: str = "value",
    check_multiplicity: bool = True,
    max_miss_probability: float | None = None,
    max_basis: int | None = None,
    basis_device: torch.device | str | None = None,
    basis_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> EigenResult:
    """Return k eigenpairs of a symmetric operator H, with measured errors.

        H Q = Q T + P B,    T s_i = theta_i s_i,    v_i = Q s_i
        r_i = ||H v_i - theta_i v_i|| = ||B s_i||

    Q [n, m] and P [n, block_size] have orthonormal columns. A step multiplies the columns of P and
    adds them to Q. When Q has `max_basis` columns, the iteration restarts from its best Ritz
    vectors. It stops when each of the k wanted pairs satisfies

        value:    min(r_i, 2 R^2 / (gap_i - R)) <= tol max(|theta_i|, eps^(2/3) ||H||)
        vector:   r_i / gap_i <= tol

    or has a residual as small as rounding allows, 10 eps ||H||. For "value", R^2 is the sum of r^2
    over a group of wanted pairs at the end of the spectrum that contains theta_i, and the gap is
    the distance to the next pair, less 3 times its residual; the best group counts. "vector" bounds
    the sine of the angle between v_i and an eigenvector; the gap is the distance to the nearest
    pair that can be told apart. Wanted pairs whose intervals theta +- r overlap count as one, and
    their vectors as a basis of its eigenspace.

    One sequence finds one vector of a repeated eigenvalue, or a second one late, through rounding.
    So `check_multiplicity` locks the k pairs and searches for better ones from a random start that
    is orthogonal to them. docs/curvature.md explains this check, `miss_probability`, half-precision
    bases, and the cost.

    Args:
        op: the operator H, in float32 or float64.
        k: number of pairs, 1 <= k <= n.
        which: the end of the spectrum: "LA" for the largest, "SA" for the smallest, "LM" for the
            largest in magnitude, "BE" for both ends, one more at the high end if k is odd.
        tol: relative tolerance, > 0.
        max_matvecs: largest number of products, >= k; by default max(300, 20 k). Where Q becomes
            invariant, a few more may be needed to have k pairs at all.
        block_size: number of vectors multiplied at a time, >= 1, by `matmat` if > 1; by default 1.
            Blocks need more products, for 4 about 1.6 times as many at k = 10 and 1.2 times at
            k = 50. They are worth it where several products cost little more than one.
        v0: where to start: a vector [n], a block [n, c], or the result of a similar problem. Column
            i is added to start i modulo block_size. A random vector of 0.1 times its length is
            added to each start, so that no eigenvector is missing. By default, starts are random.
        criterion: "value" or "vector", as above.
        check_multiplicity: whether to search for repeated eigenvalues, and for any others that one
            sequence missed. Without this check a cluster narrower than about sqrt(tol) may count
            as one value, unless criterion is "vector".
        max_miss_probability: in (0, 1): the check goes on until the probability that a pair was
            missed, as the result reports it, is at most this. None stops the check by a rule that
            usually suffices. A bound usually takes a few products more, and many where the worst
            wanted eigenvalue is repeated beyond the k.
        max_basis: largest number of columns of Q, >= min(n, k + 2 block_size + 2). By default 20
            for k <= 8, 2 k for some tens, 1.5 k for k >= 40, more where block_size > 1, and up to
            256 where these have no more than 2^22 elements.
        basis_device: where Q and P lie, and where everything except the products is computed. By
            default with the operator; "cpu" uses page-locked memory of the host, for a CUDA
            operator whose vectors fill its device.
        basis_dtype: dtype of Q and P. By default the operator's; torch.float16 halves the memory
            for a float32 operator. Values then differ from those of a float32 basis by about 1e-7,
            vectors by an angle of 5e-4, which is why `criterion` must be "value" and tol >= 1e-6.
        seed: seed of the random vectors; the global generator is not used.

    Returns:
        The pairs, in the order that `EigenResult.values` defines. If max_matvecs did not suffice
        for the pairs or for the check, a RuntimeWarning and `reason` say so, and `converged` tells
        which pairs met the tolerance.

    Raises:
        ValueError: an argument is out of its range.
        FloatingPointError: a product is not finite.
        TypeError: a product does not have the operator's shape, dtype and device.
        RuntimeError: whatever the operator raises, for example if the model changed meanwhile.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import HessianOperator, eigsh
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = HessianOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> result = eigsh(op, k=2)  # the Hessian is x^T x
        >>> [round(value, 6) for value in result.values.tolist()]
        [9.0, 1.0]
        >>> bool(result.converged.all())
        True

    Source: K. Wu and H. Simon, Thick-restart Lanczos method, SIAM J. Matrix Anal. Appl. 22 (2000);
    G. W. Stewart, A Krylov-Schur algorithm, ibid. 23 (2001); for the estimates B. N. Parlett, The
    Symmetric Eigenvalue Problem (1998), theorems 4.5.1, 11.7.1.
    """
    block_size = 1 if block_size is None else block_size
    limit = max(300, 20 * k) if max_matvecs is None else max_matvecs
    max_basis = default_basis(op.shape[0], k, block_size) if max_basis is None else max_basis
    check_arguments(op, k, which, tol, criterion, limit, block_size, max_basis)
    check_probability(max_miss_probability, check_multiplicity)
    if basis_dtype not in (None, op.dtype):
        check_rounded(op, basis_dtype, tol, criterion)
    device = op.device if basis_device is None else torch.device(basis_device)
    starts = None if v0 is None else _starts(op, v0, block_size).to(device)
    with getattr(op, "fixed", nullcontext)():
        krylov = KrylovSchur(op, max_basis, block_size, seed, device, basis_dtype)
        search = _Search(krylov, k, (which, tol, criterion), max_miss_probability)
        result = search.solve(starts, limit, check_multiplicity)
    if not (search.complete and result.converged.all()):
        warnings.warn(result.reason, RuntimeWarning, stacklevel=3)
    return result


def default_basis(n: int, k: int, block_size: int) -> int:
    """Return the default of `max_basis` for k pairs of an operator of order n."""
    thin = max(20, k + max(12, 4 * block_size, min(k, 20), k // 2))
    return max(thin, min(256, 2**22 // n))  # where memory is no matter, more columns save products


def _starts(op: SymmetricOperator, v0: Tensor | EigenResult, block_size: int) -> Tensor:
    """Return the normalized columns of v0, dealt out to rows [block_size, n]."""
    start = v0.vectors if isinstance(v0, EigenResult) else v0
    v = start[:, None] if start.ndim == 1 else start
    ops = VectorOps(op)
    n = ops.length
    if v.ndim != 2 or v.shape[0] != n or not v.shape[1]:
        raise ValueError(f"v0 must have shape [{n}] or [{n}, c], not {list(start.shape)}")
    v = v.detach().to(op.device, torch.promote_types(v.dtype, op.dtype))
    starts = torch.zeros(min(block_size, v.shape[1]), n, dtype=op.dtype, device=op.device)
    for i, column in enumerate(v.unbind(1)):
        # A power of two, so that the norm neither overflows nor vanishes, and op.dtype can hold it.
        exponent = exponent_of(ops, column)
        scaled = times_power(column, -(exponent or 0)).to(op.dtype)
        norm = float(ops.norm(scaled))
        if not 0 < norm < math.inf:
            raise ValueError("v0 must be finite and not zero")
        starts[i % block_size].add_(scaled, alpha=1 / norm)
    return starts


class _Search:
    """The sequences that find k pairs and then show that no better ones are left.

    The first sequence finds k pairs, or an invariant subspace. Each further one starts at random,
    orthogonal to the locked pairs, and checks for missed pairs. One that finds any joins them to
    the locked ones in a Rayleigh-Ritz step, after which the best k are locked.
    """

    def __init__(
        self,
        krylov: KrylovSchur,
        k: int,
        criteria: tuple[str, float, str],
        max_miss_probability: float | None,
    ) -> None:
        """Prepare; criteria: which, tol and criterion of `eigsh`."""
        self._krylov = krylov
        self._k = k
        self._criteria = criteria
        self._max_miss = max_miss_probability
        self._miss: MissProbability | None = None  # of the present check
        self._num_checks = 0
        self.complete = False  # whether products sufficed for everything that was to be done
        self._locked = RitzPairs.none()
        self._checking = False  # whether k pairs are locked, and better ones are searched for
        self._products_before_check = 0
        self._random_start = True  # whether the first sequence started at random
        self._sequence_start = 0  # products used when the present sequence started
        self._wait = 0  # steps to take before T is solved again
        self._last_forecast: tuple[int, float] | None = None  # products, log(excess)

    def solve(self, starts: Tensor | None, limit: int, check_multiplicity: bool) -> EigenResult:
        """Iterate until everything is done, or the products are used up."""
        krylov = self._krylov
        krylov.start(starts)
        self._random_start = starts is None
        while True:
            self._advance(limit)
            ritz, rule, best, wanted, pairs = self._assess()
            enough = len(best) == self._k
            self._wait = self._steps_left(rule, ritz, pairs, best)
            exhausted = enough and self._wait == 0  # the present sequence has no more to give
            news = bool(wanted.any()) or (exhausted and self._locked_values_move(rule))
            complete = exhausted and (not check_multiplicity or (self._checking and not news))
            complete = complete or krylov.whole
            done = complete or (enough and krylov.products >= limit)
            if (done or exhausted or krylov.closed) and news and krylov.num_locked:
                self._miss = None
                krylov.unlock(self._locked.residuals)
                self._locked = RitzPairs.none()
                ritz, rule, best, wanted, pairs = self._assess()
                if exhausted:  # T only gained; the residuals are bounds now, and may be larger
                    excess = pairs.excess.copy()
                    excess[best] = 0.0
                    pairs = replace(pairs, excess=excess)
            if done:
                self.complete = complete and self._miss_bound(ritz) <= (self._max_miss or 1.0)
                return self._result(ritz, rule, pairs, best)
            if exhausted or krylov.closed:
                self._lock(rule, ritz, pairs, best)
                krylov.start()
            elif krylov.full:
                if self._miss is not None:
                    self._miss.record_restart(ritz, krylov.starting_columns, krylov.rounding)
                krylov.restart(ritz, self._restart_indices(rule, ritz, wanted))

    def _locked_values_move(self, rule: ConvergenceRule) -> bool:
        """Whether the coupling of locked pairs and Q moves a wanted value beyond its tolerance.

        A pair of close eigenvalues that was taken for one has no better value elsewhere: only both
        vectors together show the two.
        """
        krylov = self._krylov
        if not (self._checking and krylov.num_locked):
            return False
        values = krylov.eigenvalues_with_locked()
        best = np.sort(values[rule.best(values, self._k)])
        locked = np.sort(self._locked.values)
        return bool((np.abs(best - locked) > rule.allowed_errors(locked)).any())

    def _assess(self) -> tuple[Ritz, ConvergenceRule, Indices, Flags, RitzPairs]:
        """Solve T.

        Returns its pairs, the rule, the indices of the k best of all pairs, which pairs of Q are
        among these, and all pairs, locked ones first.
        """
        krylov = self._krylov
        ritz = krylov.solve()
        rule = ConvergenceRule(*self._criteria, krylov.norm, krylov.eps, krylov.rounding)
        best, wanted = self._best(rule, ritz)
        return ritz, rule, best, wanted, self._locked + rule.assess(ritz, wanted, krylov.closed)

    def _advance(self, limit: int) -> None:
        """Take steps until it is worth solving T."""
        krylov = self._krylov
        size, missing = krylov.size - krylov.num_locked, max(self._k - krylov.num_locked, 1)
        if size < missing:
            due = max(1, min(2 * size, missing))
        else:
            due = size + self._wait * krylov.block_size
        while True:
            # Where Q has become invariant, products may be used up before there are k pairs.
            krylov.step(max(limit - krylov.products, self._k - krylov.size))
            used_up = krylov.products >= limit and krylov.size >= self._k
            reached = krylov.size - krylov.num_locked >= due
            if used_up or reached or krylov.closed or krylov.full:
                return

    def _forecast(self, excess: float) -> int:
        """Return half the steps that the worst of the wanted pairs needs to converge at its pace.

        Solving T takes the host a fraction of a millisecond, for which a GPU must wait; but errors
        fall ever faster, and a step too many costs a product.

        excess: the error of that pair, in multiples of the error allowed.
        """
        products, block_size = self._krylov.products, self._krylov.block_size
        distance = math.log(excess)
        last, self._last_forecast = self._last_forecast, (products, distance)
        if last is None or not last[1] > distance or products == last[0]:
            return 2
        pace = (last[1] - distance) / (products - last[0])
        return max(1, math.floor(min(distance / pace / (2 * block_size), products)))

    def _best(self, rule: ConvergenceRule, ritz: Ritz) -> tuple[Indices, Flags]:
        """Return the indices of the k best pairs, locked ones first, and which of Q are among."""
        locked = self._locked
        values = np.concatenate([locked.values, ritz.values])
        # A locked value is displaced only by one that is better than it may really be.
        doubt = np.maximum(locked.errors, rule.rounding)
        advantage = np.concatenate([doubt, np.zeros_like(ritz.values)])
        best = rule.best(values, self._k, advantage)
        among = np.zeros(len(values), dtype=bool)
        among[best] = True
        return best, among[self._krylov.num_locked :]

    def _miss_bound(self, ritz: Ritz) -> float:
        """Return an upper bound of the probability that a pair was missed."""
        krylov = self._krylov
        if krylov.whole:
            return 0.0
        if self._miss is None:
            return 1.0
        return self._miss.probability(ritz, krylov.starting_columns, krylov.rounding)

    def _steps_left(
        self, rule: ConvergenceRule, ritz: Ritz, pairs: RitzPairs, best: Indices
    ) -> int:
        """Return how many steps to take before T is solved again.

        It is 0 if the present sequence has no more to give.
        """
        krylov = self._krylov
        if krylov.closed:
            return 0
        most = 1 + (krylov.size - krylov.num_locked) // (10 * krylov.block_size)
        if not (self._checking and bool((best < krylov.num_locked).all())):
            excess = float(pairs.excess[best].max(initial=0.0))
            return min(self._forecast(excess), most) if excess else 0
        if self._max_miss is not None:
            return 0 if self._miss_bound(ritz) <= self._max_miss else most
        others = pairs[krylov.num_locked :]
        needed = rule.steps_to_exhaust(self._locked.values, others, krylov.ops.dimension)
        if self._random_start:
            # Where the rest is dense next to the k, the bound on the chance shrinks slowly. But a
            # repeated eigenvalue converges as fast in this sequence as it did in the first one, if
            # that started at random as well.
            needed = min(needed, max(self._products_before_check // krylov.block_size, _FEW))
        left = needed - (krylov.products - self._sequence_start) // krylov.block_size
        return math.ceil(min(max(left, 0.0), most))

    def _lock(self, rule: ConvergenceRule, ritz: Ritz, pairs: RitzPairs, best: Indices) -> None:
        krylov = self._krylov
        if len(best) == self._k and not self._checking:
            self._checking = True
            self._products_before_check = krylov.products
        krylov.lock(ritz, best)
        self._locked = pairs[best]
        if self._checking:
            self._num_checks += 1
            levels = rule.levels(self._locked.values)
            self._miss = MissProbability(krylov.ops.dimension, levels, self._num_checks)
        self._sequence_start = krylov.products
        self._last_forecast = None

    def _restart_indices(self, rule: ConvergenceRule, ritz: Ritz, wanted: Flags) -> Indices:
        """Return the indices of the pairs of Q that a restart keeps."""
        least = int(wanted.sum()) + 2  # the next one at each end shows how far the others are
        count = least + int(THICKNESS * max(len(wanted) - least, 0))
        return np.sort(rule.best(ritz.values, min(count, self._krylov.max_kept)))

    def _reason(self, ritz: Ritz, num_met: int, num_before_rounding: int) -> str:
        """Return why the iteration stopped, with advice where it stopped early."""
        if num_met < num_before_rounding:
            return (
                f"{num_met} of {self._k} pairs converged; the rounding of the basis keeps "
                f"{num_before_rounding - num_met} from it: loosen tol, or leave basis_dtype out"
            )
        if num_met < self._k:
            return (
                f"stopped after {self._krylov.products} products with {num_met} of {self._k} "
                "pairs converged: raise max_matvecs, loosen tol, or ask for fewer pairs"
            )
        if self.complete:
            return f"{num_met} pairs converged"
        if self._krylov.closed:
            return (
                f"{num_met} pairs converged; rounding may hide another one with a probability of "
                f"{self._miss_bound(ritz):.2g}, above max_miss_probability: use float64, or leave "
                "max_miss_probability out"
            )
        return (
            f"{num_met} pairs converged; max_matvecs cut the check for repeated eigenvalues short: "
            "raise it, or leave the check out by check_multiplicity=False"
        )

    def _result(
        self, ritz: Ritz, rule: ConvergenceRule, pairs: RitzPairs, best: Indices
    ) -> EigenResult:
        krylov = self._krylov
        best = best[rule.best(pairs.values[best], self._k)]
        pairs = pairs[best]
        num_before_rounding = int(pairs.converged.sum())
        pairs = rule.with_rounding(pairs, krylov.rounding_residuals(ritz, best))
        vectors = krylov.vectors(ritz, best)
        values, residuals, errors = (
            torch.from_numpy(krylov.scale.up(numbers)).to(vectors)
            for numbers in (pairs.values, pairs.residuals, pairs.errors)
        )
        check_products = krylov.products - self._products_before_check
        return EigenResult(
            values=values,
            vectors=vectors,
            residuals=residuals,
            errors=errors,
            converged=torch.from_numpy(pairs.converged).to(vectors.device),
            matvecs=krylov.products,
            miss_probability=self._miss_bound(ritz),
            multiplicity_matvecs=check_products if self._checking else 0,
            orthogonality=krylov.orthogonality(),
            reason=self._reason(ritz, int(pairs.converged.sum()), num_before_rounding),
        )
