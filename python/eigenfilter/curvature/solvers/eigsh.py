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
from eigenfilter.curvature.solvers.eigsh_arguments import check, check_probability, check_rounded
from eigenfilter.curvature.solvers.krylov_schur import KrylovSchur, Ritz
from eigenfilter.curvature.solvers.missed_eigenvalues import MissProbability
from eigenfilter.curvature.solvers.power_of_two_scale import exponent_of, times_power
from eigenfilter.curvature.solvers.result import EigenResult
from eigenfilter.curvature.solvers.vector_ops import VectorOps

_FEW = 20  # steps in which a pair can converge by luck
THICKNESS = 0.3  # the part of the pairs beyond the wanted ones that a restart keeps


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
    """Return k eigenpairs of a symmetric operator H, stopping by itself.

        H Q = Q T + P B,    T s_i = theta_i s_i,    v_i = Q s_i
        r_i = ||H v_i - theta_i v_i|| = ||B s_i||

    Q [n, m] and P [n, b] have orthonormal columns; see `KrylovSchur`. A step multiplies the columns
    of P and so adds b columns to Q. When Q has `max_basis`, it is restarted from its best Ritz
    vectors. The iteration stops when each of the k wanted pairs has

        value:    min(r_i, 2 R^2 / (gap_i - R)) <= tol max(|theta_i|, eps^(2/3) ||H||)
        vector:   r_i / gap_i <= tol

    or is as good as rounding allows, 10 eps ||H||, or where products are subnormal 10 of their
    units sqrt(n); eps is of the operator's dtype. For "value", R^2 sums the r^2 of a group of
    wanted pairs at the end of the spectrum, theta_i among them, and the gap reaches to the next
    pair, less 3 times its residual; the best group counts. For "vector", which bounds the sine of
    the angle between v_i and an eigenvector, the gap reaches to the nearest pair that can be told
    apart: wanted pairs whose intervals theta +- r overlap count as one, and their vectors as a
    basis of its space.

    One sequence finds one vector of a multiple eigenvalue, or a second one late, through rounding.
    So before it returns, the k pairs are locked, and a sequence from a random start orthogonal to
    them looks for better ones, until the chance that one was missed is below 1 in 10 for the least
    favourable spectrum, or for as many products as the pairs took; this is repeated while it finds
    any. (None was missed in 480 trials on spectra like those of networks.) `miss_probability` of
    the result bounds that chance; `max_miss_probability` makes it look until it is that small. What
    it finds is joined to the k by a Rayleigh-Ritz step. Where Q is invariant before it holds k
    pairs, the same is done.

    With `basis_dtype=torch.float16` Q and P are stored in half the memory. Products are taken with
    the stored vectors, T is measured from them and corrected by their Gram matrix: see
    `RoundedBasis`. It stops as it would without: r_i is then what the iteration sees of the
    residual, and the result's residuals add what rounding makes of it.

    Cost: the products, usually 2 to 4 k, and for a look for copies 5 to 20, or up to as many again
    where the rest of the spectrum is dense next to the wanted. Per product, two passes over Q, of
    2 n m multiplications each at most, and a restart n m l for l vectors kept.
    Memory: n (max_basis + b) elements, and n k for the result.

    Args:
        op: the operator; float32 or float64.
        k: how many pairs, 1 <= k <= n.
        which: "LA", "SA": largest, smallest; "LM": largest in magnitude; "BE": both ends, one more
            at the high end if k is odd.
        tol: relative tolerance, > 0.
        max_matvecs: the most products to use, >= k; by default max(300, 20 k). Where Q becomes
            invariant, a few more may be needed to have k pairs at all.
        block_size: b >= 1, the vectors multiplied at a time, by `matmat` if b > 1; by default 1.
            Blocks need more products, for b = 4 about 1.6 times as many at k = 10 and 1.2 times at
            k = 50: worth it where several products cost little more than one.
        v0: where to start: a vector [n], a block [n, c], or the result of an earlier, similar
            problem; column i is added to start i modulo b. A random vector of 0.1 times its length
            is added to each, so that no eigenvector is missing. By default random.
        criterion: "value" or "vector", see above.
        check_multiplicity: whether to look for pairs that one sequence cannot see, or has not told
            apart: without it a cluster narrower than about sqrt(tol) may count as one value, unless
            criterion is "vector".
        max_miss_probability: in (0, 1), to look for such pairs until the probability that one was
            missed, as the result reports it, is at most this; None for what suffices as a rule. It
            usually takes a few products more, and many where the worst wanted value has copies
            beyond the k.
        max_basis: the most columns of Q, >= min(n, k + 2 b + 2). By default 20 for k <= 8, 2 k for
            some tens, 1.5 k for k >= 40; more where b > 1, and up to 256 where these are no more
            than 2^22 elements.
        basis_device: where Q and P lie, and all is done but the products: by default with the
            operator; "cpu" for page-locked memory of the host, which a CUDA operator whose vectors
            fill its device may need.
        basis_dtype: of Q and P: by default the operator's; torch.float16 for a float32 operator.
            Values differ from those of a float32 basis by some 1e-7, vectors by an angle of 5e-4,
            which is why `criterion` must be "value" and tol >= 1e-6.
        seed: of the random vectors; the global generator is left alone.

    Returns:
        The pairs in the order of `EigenResult.values`. If max_matvecs did not suffice, for the
        pairs or for the look for copies, a RuntimeWarning and `reason` say so; `converged` tells
        which pairs did.

    Raises:
        ValueError: an argument is out of its range.
        FloatingPointError: a product is not finite.
        TypeError: a product is not of the operator's shape, dtype and device.
        RuntimeError: whatever the operator raises, such as a model changed within the solve.

    Source: K. Wu and H. Simon, Thick-restart Lanczos method, SIAM J. Matrix Anal. Appl. 22 (2000);
    G. W. Stewart, A Krylov-Schur algorithm, ibid. 23 (2001); for the estimates B. N. Parlett, The
    Symmetric Eigenvalue Problem (1998), theorems 4.5.1, 11.7.1.
    """
    width = 1 if block_size is None else block_size
    limit = max(300, 20 * k) if max_matvecs is None else max_matvecs
    rows = default_basis(op.shape[0], k, width) if max_basis is None else max_basis
    check(op, k, which, tol, criterion, limit, width, rows)
    check_probability(max_miss_probability, check_multiplicity)
    if basis_dtype not in (None, op.dtype):
        check_rounded(op, basis_dtype, tol, criterion)
    device = op.device if basis_device is None else torch.device(basis_device)
    starts = None if v0 is None else _starts(op, v0, width).to(device)
    with getattr(op, "fixed", nullcontext)():
        run = KrylovSchur(op, rows, width, seed, device, basis_dtype)
        search = _Search(run, k, which, tol, criterion, max_miss_probability)
        result = search.solve(starts, limit, check_multiplicity)
    if not (search.complete and result.converged.all()):
        warnings.warn(result.reason, RuntimeWarning, stacklevel=3)
    return result


def default_basis(n: int, k: int, width: int) -> int:
    """Return the columns of Q by default, for k pairs of order n, `width` products at a time."""
    thin = max(20, k + max(12, 4 * width, min(k, 20), k // 2))
    return max(thin, min(256, 2**22 // n))  # where they take little, more columns save products


def _starts(op: SymmetricOperator, v0: Tensor | EigenResult, width: int) -> Tensor:
    """Return the columns of v0, normalised and dealt out to `width` starts, as rows [width, n]."""
    given = v0.vectors if isinstance(v0, EigenResult) else v0
    v = given[:, None] if given.ndim == 1 else given
    ops = VectorOps(op)
    n = ops.length
    if v.ndim != 2 or v.shape[0] != n or not v.shape[1]:
        raise ValueError(f"v0 must have shape [{n}] or [{n}, c], not {list(given.shape)}")
    v = v.detach().to(op.device, torch.promote_types(v.dtype, op.dtype))
    starts = torch.zeros(min(width, v.shape[1]), n, dtype=op.dtype, device=op.device)
    for i, column in enumerate(v.unbind(1)):
        # As `PowerOfTwoScale` does it, for squares to be numbers and for another dtype to hold it.
        exponent = exponent_of(ops, column)
        one = times_power(column, -(exponent or 0)).to(op.dtype)
        norm = float(ops.norm(one))
        if not 0 < norm < math.inf:
            raise ValueError("v0 must be finite and not zero")
        starts[i % width].add_(one, alpha=1 / norm)
    return starts


class _Search:
    """The sequences, one after another, that lead to k pairs and show that no better are left."""

    def __init__(
        self,
        run: KrylovSchur,
        k: int,
        which: str,
        tol: float,
        criterion: str,
        most_missed: float | None,
    ) -> None:
        self._run = run
        self._most_missed = most_missed  # the probability, or None for what suffices as a rule
        self._unseen: MissProbability | None = None  # of the present look
        self._looks = 0  # for pairs better than k that are locked
        self.complete = False  # whether products sufficed for what was to be done
        self._k = k
        self._asked = which, tol, criterion
        self._locked = RitzPairs.none()
        self._looking = False  # whether k pairs are locked, and better ones are looked for
        self._searched = 0  # products used when that began
        self._cold = True  # whether those started at random
        self._began = 0  # products used when the present sequence began
        self._wait = 0  # steps to take before T is looked at again
        self._past: tuple[int, float] | None = None  # what `_forecast` saw at the last look

    def solve(self, starts: Tensor | None, limit: int, check_multiplicity: bool) -> EigenResult:
        """Work until nothing is left to do, or the products are spent."""
        run = self._run
        run.begin(starts)
        self._cold = starts is None
        while True:
            self._advance(limit)
            ritz, rule, picked, wanted, pairs = self._look()
            enough = len(picked) == self._k
            self._wait = self._steps_left(rule, ritz, pairs, picked)
            settled = enough and self._wait == 0
            news = bool(wanted.any()) or (settled and self._moved(rule))
            complete = settled and (not check_multiplicity or (self._looking and not news))
            complete = complete or run.whole
            done = complete or (enough and run.products >= limit)
            if (done or settled or run.closed) and news and run.locked:
                self._unseen = None
                run.unlock(self._locked.residuals)
                self._locked = RitzPairs.none()
                ritz, rule, picked, wanted, pairs = self._look()
                if settled:  # T only gained; the residuals are bounds now, and may say less
                    excess = pairs.excess.copy()
                    excess[picked] = 0.0
                    pairs = replace(pairs, excess=excess)
            if done:
                self.complete = complete and self._missed(ritz) <= (self._most_missed or 1.0)
                return self._result(ritz, rule, pairs, picked)
            if settled or run.closed:
                self._lock(rule, ritz, pairs, picked)
                run.begin()
            elif run.full:
                if self._unseen is not None:
                    self._unseen.restarted(ritz, run.began, run.rounding)
                run.restart(ritz, self._kept(rule, ritz, wanted))

    def _moved(self, rule: ConvergenceRule) -> bool:
        """Whether what couples locked pairs and Q moves a wanted value beyond its tolerance.

        A pair of close eigenvalues that the search took for one has no better value elsewhere: only
        both together show it.
        """
        run = self._run
        if not (self._looking and run.locked):
            return False
        values = run.joined()
        best = np.sort(values[rule.best(values, self._k)])
        locked = np.sort(self._locked.values)
        return bool((np.abs(best - locked) > rule.allowed(locked)).any())

    def _look(self) -> tuple[Ritz, ConvergenceRule, Indices, Flags, RitzPairs]:
        """Return the pairs of T, the rule, which pairs are the best, which of those are of Q, and
        all pairs, locked ones first."""
        run = self._run
        ritz = run.collect()
        rule = ConvergenceRule(*self._asked, run.norm, run.eps, run.rounding)
        picked, wanted = self._pick(rule, ritz)
        return ritz, rule, picked, wanted, self._locked + rule.judge(ritz, wanted, run.closed)

    def _advance(self, limit: int) -> None:
        """Multiply until T is worth looking at."""
        run = self._run
        size, need = run.size - run.locked, max(self._k - run.locked, 1)
        due = max(1, min(2 * size, need)) if size < need else size + self._wait * run.width
        while True:
            # Where Q has become invariant, products may be spent before there are k pairs.
            run.step(max(limit - run.products, self._k - run.size))
            spent = run.products >= limit and run.size >= self._k
            if spent or run.size - run.locked >= due or run.closed or run.full:
                return

    def _forecast(self, excess: float) -> int:
        """Return half the steps that the worst of the wanted pairs needs to converge at its pace.

        A look takes the host a fraction of a millisecond, and a GPU must wait for it; but errors
        fall ever faster.

        excess: how many times the error allowed that pair may err.
        """
        products, width = self._run.products, self._run.width
        distance = math.log(excess)
        past, self._past = self._past, (products, distance)
        if past is None or not past[1] > distance or products == past[0]:
            return 2
        pace = (past[1] - distance) / (products - past[0])
        return max(1, math.floor(min(distance / pace / (2 * width), products)))

    def _pick(self, rule: ConvergenceRule, ritz: Ritz) -> tuple[Indices, Flags]:
        """Return the indices of the k best pairs, locked ones first, and whether each of Q is."""
        locked = self._locked
        values = np.concatenate([locked.values, ritz.values])
        # What is not better than a locked value may really be does not displace it.
        doubt = np.maximum(locked.errors, rule.rounding)
        lead = np.concatenate([doubt, np.zeros_like(ritz.values)])
        picked = rule.best(values, self._k, lead)
        among = np.zeros(len(values), dtype=bool)
        among[picked] = True
        return picked, among[self._run.locked :]

    def _missed(self, ritz: Ritz) -> float:
        """Return the probability, at most, that a pair was missed."""
        run = self._run
        if run.whole:
            return 0.0
        unseen = self._unseen
        return 1.0 if unseen is None else unseen.probability(ritz, run.began, run.rounding)

    def _steps_left(
        self, rule: ConvergenceRule, ritz: Ritz, pairs: RitzPairs, picked: Indices
    ) -> int:
        """Return how many steps to take before T is looked at again; 0 if the present sequence has
        no more to give."""
        run = self._run
        if run.closed:
            return 0
        most = 1 + (run.size - run.locked) // (10 * run.width)
        if not (self._looking and bool((picked < run.locked).all())):
            excess = float(pairs.excess[picked].max(initial=0.0))
            return min(self._forecast(excess), most) if excess else 0
        if self._most_missed is not None:
            return 0 if self._missed(ritz) <= self._most_missed else most
        others = pairs[run.locked :]
        needed = rule.steps_to_exhaust(self._locked.values, others, run.ops.dimension)
        if self._cold:
            # Where the rest is dense next to the k, the chance shrinks slowly; but a copy of one of
            # them converges as soon as that one did, if that one started at random as well.
            needed = min(needed, max(self._searched // run.width, _FEW))
        left = needed - (run.products - self._began) // run.width
        return math.ceil(min(max(left, 0.0), most))

    def _lock(self, rule: ConvergenceRule, ritz: Ritz, pairs: RitzPairs, picked: Indices) -> None:
        run = self._run
        if len(picked) == self._k and not self._looking:
            self._looking = True
            self._searched = run.products
        run.lock(ritz, picked)
        self._locked = pairs[picked]
        if self._looking:
            self._looks += 1
            levels = rule.levels(self._locked.values)
            self._unseen = MissProbability(run.ops.dimension, levels, self._looks)
        self._began = run.products
        self._past = None

    def _kept(self, rule: ConvergenceRule, ritz: Ritz, wanted: Flags) -> Indices:
        """Return the indices of the pairs of Q that a restart keeps."""
        least = int(wanted.sum()) + 2  # the next one at each end shows how far the others are
        count = least + int(THICKNESS * max(len(wanted) - least, 0))
        return np.sort(rule.best(ritz.values, min(count, self._run.most_kept)))

    def _result(
        self, ritz: Ritz, rule: ConvergenceRule, pairs: RitzPairs, picked: Indices
    ) -> EigenResult:
        run = self._run
        picked = picked[rule.best(pairs.values[picked], self._k)]
        pairs = pairs[picked]
        seen = int(pairs.met.sum())
        pairs = rule.with_rounding(pairs, run.rounded(ritz, picked))
        found = int(pairs.met.sum())
        if found < seen:
            reason = (
                f"{found} of {self._k} pairs converged; the rounding of the basis keeps "
                f"{seen - found} from it: loosen tol, or leave basis_dtype out"
            )
        elif found < self._k:
            reason = (
                f"stopped after {run.products} products with {found} of {self._k} pairs "
                "converged: raise max_matvecs, loosen tol, or ask for fewer pairs"
            )
        elif self.complete:
            reason = f"{found} pairs converged"
        elif run.closed:
            reason = (
                f"{found} pairs converged; rounding may hide another one with a probability of "
                f"{self._missed(ritz):.2g}, beyond max_miss_probability: use "
                "float64, or leave it out"
            )
        else:
            reason = (
                f"{found} pairs converged; max_matvecs cut the look for copies short: raise it, or "
                "leave the look out by check_multiplicity=False"
            )
        vectors = run.vectors(ritz, picked)
        values, residuals, errors = (
            torch.from_numpy(run.scale.up(found)).to(vectors)
            for found in (pairs.values, pairs.residuals, pairs.errors)
        )
        return EigenResult(
            values=values,
            vectors=vectors,
            residuals=residuals,
            errors=errors,
            converged=torch.from_numpy(pairs.met).to(vectors.device),
            matvecs=run.products,
            miss_probability=self._missed(ritz),
            multiplicity_matvecs=run.products - self._searched if self._looking else 0,
            orthogonality=run.orthogonality(),
            reason=reason,
        )
