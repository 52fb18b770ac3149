"""Compare solvers on one problem: check each against float64, then time all in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from benchmarks import environment
from benchmarks.comparison import Contender, Phase, do_nothing
from benchmarks.curvature import library_solvers
from benchmarks.curvature.peers import curvlinops, hessian_eigenthings, pyhessian
from benchmarks.curvature.problem_data import MissingRequirement
from benchmarks.curvature.problems import HessianProblem, ProblemRecipe, product
from benchmarks.curvature.single_thread import cpu_clock
from benchmarks.curvature.solve_process import SolveProcesses
from benchmarks.curvature.solver import K, Solve, Solver, arpack
from benchmarks.timing import Spread, Timing, time_in_turns
from eigenfilter.curvature import HessianOperator, eigsh

ACCURACY = 1e-4
SOLVERS = (
    library_solvers.DEFAULTS,
    library_solvers.WITHOUT_CHECK,
    library_solvers.SCIPY,
    *hessian_eigenthings.SOLVERS,
    *curvlinops.SOLVERS,
    *pyhessian.SOLVERS,
)
U, LANCZOS, PRODUCTS = "U", "Lanczos", "its products"
MAX_OVERHEAD = 1.15
# On a large problem:
LIMIT = 8  # a contender is stopped after so many times the library's time without the check
U_ROUNDS = 3  # rounds of timing for U
BASIS = 32  # vectors for the exact values, of 200 MB each


@dataclass(frozen=True)
class ContenderResult:
    """The result of one contender on a problem.

    Attributes:
        solver: name of the contender.
        setting: name of the setting that was timed.
        stopped: whether it was stopped at the time limit. Its times are then the limit.
        products: Hessian-vector products of the solve; None if it was stopped.
        error: the worst relative error of its values; None if it was stopped.
        memory: peak bytes beyond the model and the data; None if it was stopped.
        reached: whether the error is within ACCURACY.
        seconds: the processor's time.
        wall: the time that went by, with other work on the machine.
        units: `seconds` over those of U, round by round.
        ratios: `seconds` over those of the library's contenders, round by round, by their names.
        goal: the goal for these ratios, or None.
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
class ProblemResult:
    """The results of all contenders on a problem.

    Attributes:
        name: name of the problem.
        summary: the network and the data, in one line.
        parameters: the number of parameters.
        reference: the exact values: the K largest, in float64.
        gap: the worst relative difference between the exact values and ARPACK's; None if the
            problem is too large to solve twice.
        unit: U, the processor's seconds for one product on a graph built for it.
        entries: the results of the contenders that took part.
        overhead: the time of Lanczos with a ready operator over that of its products alone.
        rounds: rounds of timing.
        busy_cores: the mean number of cores that other processes kept busy meanwhile.
        absent: one line for each contender that could not take part.
    """

    name: str
    summary: str
    parameters: int
    reference: list[float]
    gap: float | None
    unit: Spread
    entries: tuple[ContenderResult, ...]
    overhead: Spread
    rounds: int
    busy_cores: float
    absent: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    """A contender with the setting to time; the other attributes are None if it was stopped."""

    solver: Solver
    setting: str
    solve: Solve
    products: int | None = None
    error: float | None = None
    timing: Timing | None = None
    memory: int | None = None

    @property
    def reached(self) -> bool:
        """Whether its error is within ACCURACY."""
        return self.error is not None and self.error <= ACCURACY


def exact_values(problem: HessianProblem, *, large: bool = False) -> tuple[Tensor, float | None]:
    """The K largest eigenvalues in float64, and their worst relative difference from ARPACK's.

    Args:
        problem: the problem.
        large: whether the problem is too large to solve twice. The difference is then None.

    Raises:
        RuntimeError: the eigenvalues did not converge.
    """
    double = problem.double()
    op = HessianOperator(double.model, double.loss_fn, double.data)
    if large:
        result = eigsh(op, K, tol=1e-6, max_basis=BASIS, check_multiplicity=False)
    else:
        result = eigsh(op, K, tol=1e-10)
    if not result.converged.all():
        raise RuntimeError(
            f"the exact eigenvalues did not converge in {result.matvecs} products: change the "
            "recipe of the problem in benchmarks/curvature/problems.py"
        )
    if large:
        return result.values, None
    arpack_values = arpack(op.to_scipy(), which="LM", tol=0).values
    return result.values, worst_error(arpack_values, result.values)


def worst_error(values: Tensor, exact: Tensor) -> float:
    """The worst relative error of values in any order; the exact ones are in descending order."""
    ordered = values.double().sort(descending=True).values
    return float(((ordered - exact) / exact).abs().max())


def measure(name: str, recipe: ProblemRecipe, folder: Path, rounds: int) -> ProblemResult:
    """Solve a problem with every contender.

    Raises:
        MissingRequirement: the problem's data are not in the folder.
    """
    problem = recipe.build(folder)
    exact, gap = exact_values(problem, large=recipe.large)
    machine_load = environment.MachineLoad()
    candidates, absent = _check_all(recipe, problem, exact)
    limit = _time_limit(candidates)
    unit = _contender(U, lambda: product(problem, problem.gradients(), keep_graph=False))
    if recipe.large:
        rounds = 1
        timings = {c.solver.name: [c.timing or Timing(limit, limit)] for c in candidates}
        units = [timing.seconds for timing in time_in_turns((unit,), cpu_clock, U_ROUNDS)[U]]
        timings[U] = [Timing(Spread.of(units).median, math.nan)]
    else:
        contenders = [_contender(c.solver.name, _solve_later(c, problem)) for c in candidates]
        timings = time_in_turns((unit, *contenders), cpu_clock, rounds)
        units = [timing.seconds for timing in timings[U]]
    return ProblemResult(
        name,
        recipe.summary,
        sum(p.numel() for p in problem.params),
        exact.tolist(),
        gap,
        Spread.of(units),
        tuple(_contender_result(c, timings, recipe.kind) for c in candidates),
        _overhead(problem, rounds),
        rounds,
        machine_load.busy_cores(),
        tuple(absent),
    )


def _check_all(
    recipe: ProblemRecipe, problem: HessianProblem, exact: Tensor
) -> tuple[list[_Candidate], list[str]]:
    """The contenders that take part, and one line for each that cannot."""
    candidates: list[_Candidate] = []
    absent: list[str] = []
    with TemporaryDirectory() as scratch:
        solve_in_process = SolveProcesses(problem, Path(scratch), is_timed=recipe.large)
        for solver in SOLVERS:
            if recipe.vectors and not solver.joins_vectors:
                continue
            try:
                solver.check_installed()
            except MissingRequirement as missing:
                absent.append(f"{solver.name}: {missing}")
                continue
            if recipe.large:
                limit = _time_limit(candidates)
                candidates.append(_check_in_process(solver, solve_in_process, exact, limit))
            else:
                candidates.append(_check(solver, problem, solve_in_process, exact))
    return candidates, absent


def _check(
    solver: Solver, problem: HessianProblem, solve_in_process: SolveProcesses, exact: Tensor
) -> _Candidate:
    """Take the first setting that is accurate enough, or else the last; measure its memory."""
    candidates = []
    for setting, solve in solver.settings.items():
        solution = solve(problem)
        error = worst_error(solution.values, exact)
        candidates.append(_Candidate(solver, setting, solve, solution.products, error))
        if candidates[-1].reached:
            break
    result = solve_in_process(candidates[-1].solve)
    return replace(candidates[-1], memory=None if result is None else result.memory)


def _check_in_process(
    solver: Solver, solve_in_process: SolveProcesses, exact: Tensor, limit: float
) -> _Candidate:
    """Do what `_check` does with every solve in a process; stop at a setting above the limit."""
    candidates = []
    for setting, solve in solver.settings.items():
        candidates.append(_Candidate(solver, setting, solve))
        result = solve_in_process(solve, limit)
        if result is None:
            break
        candidates[-1] = replace(
            candidates[-1],
            products=result.solution.products,
            error=worst_error(result.solution.values, exact),
            timing=result.timing,
            memory=result.memory,
        )
        if candidates[-1].reached:
            break
    return candidates[-1]


def _time_limit(candidates: Sequence[_Candidate]) -> float:
    """The seconds allowed on a large problem; unlimited until the library's time is known."""
    timings = [
        c.timing
        for c in candidates
        if c.solver is library_solvers.WITHOUT_CHECK and c.timing is not None
    ]
    return LIMIT * timings[0].seconds if timings else math.inf


def _contender_result(
    c: _Candidate, timings: dict[str, list[Timing]], kind: str
) -> ContenderResult:
    all_seconds = {name: [t.seconds for t in values] for name, values in timings.items()}
    seconds = all_seconds[c.solver.name]
    library_names = (library_solvers.DEFAULTS.name, library_solvers.WITHOUT_CHECK.name)
    return ContenderResult(
        solver=c.solver.name,
        setting=c.setting,
        stopped=c.error is None,
        products=c.products,
        error=c.error,
        memory=c.memory,
        reached=c.reached,
        seconds=Spread.of(seconds),
        wall=Spread.of([timing.host for timing in timings[c.solver.name]]),
        units=_ratio(seconds, all_seconds[U]),
        ratios={name: _ratio(seconds, all_seconds[name]) for name in library_names},
        goal=c.solver.goals_by_kind.get(kind, c.solver.goal),
    )


def _overhead(problem: HessianProblem, rounds: int) -> Spread:
    """The time of Lanczos over that of as many products alone; the graphs of both are ready."""
    op = HessianOperator(problem.model, problem.loss_fn, problem.batches, engine="cached_graph")
    products = eigsh(op, K, check_multiplicity=False).matvecs
    gradients = problem.gradients()

    def run_products() -> None:
        for _ in range(products):
            product(problem, gradients, keep_graph=True)

    lanczos = _contender(LANCZOS, lambda: eigsh(op, K, check_multiplicity=False))
    timings = time_in_turns((lanczos, _contender(PRODUCTS, run_products)), cpu_clock, rounds)
    return _ratio([a.seconds for a in timings[LANCZOS]], [b.seconds for b in timings[PRODUCTS]])


def _contender(name: str, run: Callable[[], object]) -> Contender:
    return Contender(name, (Phase(do_nothing, run),), list)


def _solve_later(candidate: _Candidate, problem: HessianProblem) -> Callable[[], object]:
    return lambda: candidate.solve(problem)


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(numerators, denominators, strict=True)])
