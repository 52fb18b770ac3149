"""Contenders on one problem: each is checked against float64 first, then all are timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eigenfilter.benchmarks import environment
from eigenfilter.benchmarks.contest import Contender, Phase, nothing
from eigenfilter.benchmarks.curvature import ours
from eigenfilter.benchmarks.curvature.datasets import Missing
from eigenfilter.benchmarks.curvature.peers import curvlinops, hessian_eigenthings, pyhessian
from eigenfilter.benchmarks.curvature.problems import Problem, Recipe, product
from eigenfilter.benchmarks.curvature.solver import K, Solve, Solver, arpack
from eigenfilter.benchmarks.timing import Lap, Spread, turns
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


@dataclass(frozen=True)
class Entry:
    """A contender's figures.

    Attributes:
        solver: its name.
        setting: the one that was timed.
        products: that it took.
        error: the worst relative error of its values.
        reached: whether that is within ACCURACY.
        seconds: of the processor.
        wall: seconds that went by, others' work on the machine included.
        units: `seconds` over those of U, round by round.
        ratios: `seconds` over those of each of ours, round by round, by name.
        goal: of these ratios.
    """

    solver: str
    setting: str
    products: int
    error: float
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
        gap: the worst relative difference of these from what ARPACK gives, largest in magnitude.
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
    gap: float
    unit: Spread
    entries: tuple[Entry, ...]
    overhead: Spread
    rounds: int
    neighbours: float
    absent: tuple[str, ...]


@dataclass(frozen=True)
class _Checked:
    solver: Solver
    setting: str
    solve: Solve
    products: int
    error: float


@contextmanager
def one_thread() -> Iterator[None]:
    """All libraries compute on one thread: then the processor's time is nobody else's."""
    import scipy.sparse.linalg  # noqa: F401 - its library has to be there to be limited
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def processor(run: Callable[[], object]) -> Lap:
    """A clock of the processor's time; as the host's it has the time that went by."""
    began, used = time.perf_counter(), time.process_time()
    run()
    return Lap(time.process_time() - used, time.perf_counter() - began)


def reference(problem: Problem) -> tuple[Tensor, float]:
    """The K largest eigenvalues in float64, and their distance from ARPACK's."""
    double = problem.double()
    op = HessianOperator(double.model, double.loss_fn, double.data)
    values = eigsh(op, K, tol=1e-10).values
    return values, worst(arpack(op.to_scipy(), which="LM", tol=0).values, values)


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
    exact, gap = reference(problem)
    checked, absent = [], []
    for solver in SOLVERS:
        if recipe.vectors and not solver.vectors:
            continue
        try:
            solver.check()
            checked.append(_check(solver, problem, exact))
        except Missing as missing:
            absent.append(f"{solver.name}: {missing}")
    contenders = [_contender(U, lambda: product(problem, problem.gradients(), False))]
    contenders += [_contender(c.solver.name, _bound(c.solve, problem)) for c in checked]
    neighbours = environment.Neighbours()
    laps = turns(contenders, processor, rounds)
    overhead = _overhead(problem, rounds)
    seconds = {who: [lap.seconds for lap in found] for who, found in laps.items()}
    entries = tuple(
        Entry(
            c.solver.name,
            c.setting,
            c.products,
            c.error,
            c.error <= ACCURACY,
            Spread.of(seconds[c.solver.name]),
            Spread.of([lap.host for lap in laps[c.solver.name]]),
            _ratio(seconds[c.solver.name], seconds[U]),
            {
                mine.name: _ratio(seconds[c.solver.name], seconds[mine.name])
                for mine in (ours.OURS, ours.ALONE)
            },
            c.solver.goal,
        )
        for c in checked
    )
    return Row(
        name,
        recipe.summary,
        sum(p.numel() for p in problem.params),
        exact.tolist(),
        gap,
        Spread.of(seconds[U]),
        entries,
        overhead,
        rounds,
        neighbours.cores(),
        tuple(absent),
    )


def _check(solver: Solver, problem: Problem, exact: Tensor) -> _Checked:
    """Take the first setting that is accurate enough, or the last."""
    for setting, solve in solver.settings.items():
        found = solve(problem)
        checked = _Checked(solver, setting, solve, found.products, worst(found.values, exact))
        if checked.error <= ACCURACY:
            break
    return checked


def _overhead(problem: Problem, rounds: int) -> Spread:
    """Lanczos over as many raw products, the graphs of both ready."""
    op = HessianOperator(problem.model, problem.loss_fn, problem.batches, engine="retained")
    products = eigsh(op, K, look_for_copies=False).matvecs
    gradients = problem.gradients()

    def raw() -> None:
        for _ in range(products):
            product(problem, gradients, True)

    lanczos = _contender(LANCZOS, lambda: eigsh(op, K, look_for_copies=False))
    laps = turns((lanczos, _contender(RAW, raw)), processor, rounds)
    return _ratio([a.seconds for a in laps[LANCZOS]], [b.seconds for b in laps[RAW]])


def _contender(name: str, run: Callable[[], object]) -> Contender:
    return Contender(name, (Phase(nothing, run),), list)


def _bound(solve: Solve, problem: Problem) -> Callable[[], object]:
    return lambda: solve(problem)


def _ratio(others: Sequence[float], seconds: Sequence[float]) -> Spread:
    return Spread.of([b / a for a, b in zip(seconds, others, strict=True)])
