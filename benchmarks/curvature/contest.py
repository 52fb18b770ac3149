"""Contenders on one problem: each is checked against float64 first, then all are timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from benchmarks import environment
from benchmarks.contest import Contender, Phase, nothing
from benchmarks.curvature import ours
from benchmarks.curvature.apart import Apart
from benchmarks.curvature.datasets import Missing
from benchmarks.curvature.peers import curvlinops, hessian_eigenthings, pyhessian
from benchmarks.curvature.problems import Problem, Recipe, product
from benchmarks.curvature.solver import K, Solve, Solver, arpack
from benchmarks.curvature.thread import processor
from benchmarks.timing import Lap, Spread, turns
from eigenfilter.curvature import HessianOperator, eigsh

ACCURACY = 1e-4
SOLVERS = (
    ours.OURS,
    ours.ALONE,
    ours.SCIPY,
    *hessian_eigenthings.SOLVERS,
    *curvlinops.SOLVERS,
    *pyhessian.SOLVERS,
)
U, LANCZOS, RAW = "U", "Lanczos", "its products"
MOST_OVERHEAD = 1.15
LIMIT = 8  # times our time without the check, after which a contender on a large problem is stopped
LAPS = 3  # of U there
BASIS = 32  # vectors of its reference, of 200 MB each


@dataclass(frozen=True)
class Entry:
    """A contender's figures.

    Attributes:
        solver: its name.
        setting: the one that was timed.
        stopped: whether it had no answer in the time allowed, which its times then are.
        products: that it took; None if it was stopped.
        error: the worst relative error of its values; None if it was stopped.
        memory: bytes at most, beyond the model and the data; None if it was stopped.
        reached: whether that is within ACCURACY.
        seconds: of the processor.
        wall: seconds that went by, others' work on the machine included.
        units: `seconds` over those of U, round by round.
        ratios: `seconds` over those of each of ours, round by round, by name.
        goal: of these ratios.
    """

    solver: str
    setting: str
    stopped: bool
    products: int | None
    error: float | None
    memory: int | None
    reached: bool
    seconds: Spread
    wall: Spread
    units: Spread
    ratios: dict[str, Spread]
    goal: float | None


@dataclass(frozen=True)
class Row:
    """A problem's figures.

    Attributes:
        name: of the problem.
        summary: what it is.
        parameters: n.
        reference: the ten values in float64.
        gap: the worst relative difference of these from what ARPACK gives, largest in magnitude;
            None where the problem is too large to solve twice.
        unit: U, seconds of the processor that one product takes on a graph built for it.
        entries: of those who took part.
        overhead: the time of Lanczos, its operator ready, over that of its products alone.
        rounds: of timing.
        neighbours: the mean number of cores that others kept busy meanwhile.
        absent: a line for each contender that is missing or failed.
    """

    name: str
    summary: str
    parameters: int
    reference: list[float]
    gap: float | None
    unit: Spread
    entries: tuple[Entry, ...]
    overhead: Spread
    rounds: int
    neighbours: float
    absent: tuple[str, ...]


@dataclass(frozen=True)
class _Checked:
    """A contender in the setting to be timed; all else None if it was stopped."""

    solver: Solver
    setting: str
    solve: Solve
    products: int | None = None
    error: float | None = None
    lap: Lap | None = None
    memory: int | None = None

    @property
    def reached(self) -> bool:
        """Whether it is accurate enough."""
        return self.error is not None and self.error <= ACCURACY


def reference(problem: Problem, *, large: bool = False) -> tuple[Tensor, float | None]:
    """The K largest eigenvalues in float64, and their distance from ARPACK's unless it is large.

    Raises:
        RuntimeError: they did not converge.
    """
    double = problem.double()
    op = HessianOperator(double.model, double.loss_fn, double.data)
    if large:
        found = eigsh(op, K, tol=1e-6, max_basis=BASIS, check_multiplicity=False)
    else:
        found = eigsh(op, K, tol=1e-10)
    if not found.converged.all():
        raise RuntimeError(f"the reference did not converge in {found.matvecs} products")
    if large:
        return found.values, None
    return found.values, worst(arpack(op.to_scipy(), which="LM", tol=0).values, found.values)


def worst(values: Tensor, exact: Tensor) -> float:
    """The worst relative error of values in any order; of exact ones descending."""
    found = values.double().sort(descending=True).values
    return float(((found - exact) / exact).abs().max())


def measure(name: str, recipe: Recipe, folder: Path, rounds: int) -> Row:
    """Solve a problem with every contender.

    Raises:
        Missing: its data are not in the folder.
    """
    problem = recipe.build(folder)
    exact, gap = reference(problem, large=recipe.large)
    neighbours = environment.Neighbours()
    checked, absent = _check_all(recipe, problem, exact)
    limit = _limit(checked)
    unit = _contender(U, lambda: product(problem, problem.gradients(), False))
    if recipe.large:
        rounds = 1
        laps = {c.solver.name: [c.lap or Lap(limit, limit)] for c in checked}
        units = [lap.seconds for lap in turns((unit,), processor, LAPS)[U]]
        laps[U] = [Lap(Spread.of(units).median, math.nan)]
    else:
        contenders = [_contender(c.solver.name, _bound(c.solve, problem)) for c in checked]
        laps = turns((unit, *contenders), processor, rounds)
        units = [lap.seconds for lap in laps[U]]
    return Row(
        name,
        recipe.summary,
        sum(p.numel() for p in problem.params),
        exact.tolist(),
        gap,
        Spread.of(units),
        tuple(_entry(c, laps, recipe.kind) for c in checked),
        _overhead(problem, rounds),
        rounds,
        neighbours.cores(),
        tuple(absent),
    )


def _check_all(recipe: Recipe, problem: Problem, exact: Tensor) -> tuple[list[_Checked], list[str]]:
    """Who takes part, and a line for each who cannot."""
    checked: list[_Checked] = []
    absent: list[str] = []
    with TemporaryDirectory() as scratch:
        apart = Apart(problem, Path(scratch), timed=recipe.large)
        for solver in SOLVERS:
            if recipe.vectors and not solver.vectors:
                continue
            try:
                solver.check()
            except Missing as missing:
                absent.append(f"{solver.name}: {missing}")
                continue
            if recipe.large:
                checked.append(_check_once(solver, apart, exact, _limit(checked)))
            else:
                checked.append(_check(solver, problem, apart, exact))
    return checked, absent


def _check(solver: Solver, problem: Problem, apart: Apart, exact: Tensor) -> _Checked:
    """Take the first setting that is accurate enough, or the last; measure its memory apart."""
    tried = []
    for setting, solve in solver.settings.items():
        found = solve(problem)
        tried.append(_Checked(solver, setting, solve, found.products, worst(found.values, exact)))
        if tried[-1].reached:
            break
    outcome = apart(tried[-1].solve)
    return replace(tried[-1], memory=None if outcome is None else outcome.memory)


def _check_once(solver: Solver, apart: Apart, exact: Tensor, limit: float) -> _Checked:
    """The same with all of it apart; the first setting that exceeds the limit is the last."""
    tried = []
    for setting, solve in solver.settings.items():
        tried.append(_Checked(solver, setting, solve))
        outcome = apart(solve, limit)
        if outcome is None:
            break
        error = worst(outcome.found.values, exact)
        tried[-1] = _Checked(
            solver, setting, solve, outcome.found.products, error, outcome.lap, outcome.memory
        )
        if tried[-1].reached:
            break
    return tried[-1]


def _limit(checked: Sequence[_Checked]) -> float:
    """The seconds allowed on a large problem, once ours is known."""
    laps = [c.lap for c in checked if c.solver is ours.ALONE and c.lap is not None]
    return LIMIT * laps[0].seconds if laps else math.inf


def _entry(c: _Checked, laps: dict[str, list[Lap]], kind: str) -> Entry:
    seconds = {who: [lap.seconds for lap in found] for who, found in laps.items()}
    mine = seconds[c.solver.name]
    return Entry(
        c.solver.name,
        c.setting,
        c.error is None,
        c.products,
        c.error,
        c.memory,
        c.reached,
        Spread.of(mine),
        Spread.of([lap.host for lap in laps[c.solver.name]]),
        _ratio(mine, seconds[U]),
        {name: _ratio(mine, seconds[name]) for name in (ours.OURS.name, ours.ALONE.name)},
        c.solver.special.get(kind, c.solver.goal),
    )


def _overhead(problem: Problem, rounds: int) -> Spread:
    """Lanczos over as many raw products, the graphs of both ready."""
    op = HessianOperator(problem.model, problem.loss_fn, problem.batches, engine="cached_graph")
    products = eigsh(op, K, check_multiplicity=False).matvecs
    gradients = problem.gradients()

    def raw() -> None:
        for _ in range(products):
            product(problem, gradients, True)

    lanczos = _contender(LANCZOS, lambda: eigsh(op, K, check_multiplicity=False))
    laps = turns((lanczos, _contender(RAW, raw)), processor, rounds)
    return _ratio([a.seconds for a in laps[LANCZOS]], [b.seconds for b in laps[RAW]])


def _contender(name: str, run: Callable[[], object]) -> Contender:
    return Contender(name, (Phase(nothing, run),), list)


def _bound(solve: Solve, problem: Problem) -> Callable[[], object]:
    return lambda: solve(problem)


def _ratio(others: Sequence[float], seconds: Sequence[float]) -> Spread:
    return Spread.of([b / a for a, b in zip(seconds, others, strict=True)])
