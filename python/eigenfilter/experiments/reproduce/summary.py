"""What the runs say: means over seeds, the best radii, the order of the sharpness."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eigenfilter.experiments.reproduce.plan import CLAIMS, METHODS, Plan
from eigenfilter.experiments.runs import Record

SELECTION = (
    "The best rho of a method is the one of the highest mean accuracy on the test set, as in the "
    "paper: an accuracy chosen so is optimistic. Only radii with which no run diverged or failed "
    "can be best; they are compared over the seeds that all of them were trained with."
)


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        outcome: "complete", "diverged", "failed" or "unfinished": its training or its spectrum.
        note: why it did not complete, or has no spectrum though it did.
        accuracy: on the test set, at the end; None, as all behind it, where there is none.
        sharpness, error: the largest Hessian eigenvalue, and its residual ||H v - lambda v||, which
            bounds how far an eigenvalue is, but for rounding in the products.
        edge: of the filter; None for SAM.
        gradients: of batches that the run took.
        seconds: it took.
        spectrum: as `spectra` keeps it, or None.
    """

    name: str
    method: str
    momentum: float
    rho: float | None
    seed: int
    outcome: str
    note: str
    accuracy: float | None
    sharpness: float | None
    error: float | None
    edge: float | None
    gradients: float | None
    seconds: float | None
    spectrum: Record | None

    @property
    def ratio(self) -> float | None:
        """Sharpness over the edge."""
        return None if self.sharpness is None or not self.edge else self.sharpness / self.edge

    def as_dict(self) -> dict[str, Any]:
        """Everything but the spectrum, which lies in the run's folder."""
        values = asdict(self) | {"ratio": self.ratio}
        del values["spectrum"]
        return values

    @classmethod
    def of(cls, name: str, record: Record, spectrum: Record | None) -> RunResult:
        """From the results of a run and its spectrum."""
        config, outcome, note = record["config"], record["outcome"], ""
        if outcome == "failed":
            outcome, note = "diverged" if record["diverged"] else "failed", record["error"]
        elif outcome != "complete" or spectrum is None:
            outcome = "unfinished"
        if spectrum is not None and "error" in spectrum:
            note = spectrum["error"]
        found = spectrum if spectrum is not None and "values" in spectrum else None
        method = config["optimizer"]
        trained = record["outcome"] == "complete"
        return cls(
            name=name,
            method=method,
            momentum=config["momentum"],
            rho=None if method == "sgd" else config["rho"],
            seed=config["seed"],
            outcome=outcome,
            note=note,
            accuracy=record["test"]["accuracy"] if trained else None,
            sharpness=found["values"][0] if found else None,
            error=found["residuals"][0] if found else None,
            edge=found["edge"] if found else None,
            gradients=record["gradients"] if trained else None,
            seconds=record["seconds"] if trained else None,
            spectrum=found,
        )


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds; `deviation` is that of a sample, None for a single seed."""

    value: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> SeedMean | None:
        """Of those that there are; None if there is none."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        return cls(statistics.fmean(there), statistics.stdev(there) if there[1:] else None)

    def text(self, form: str) -> str:
        """The mean in a format, and the deviation if there is one."""
        if self.deviation is None:
            return form.format(self.value)
        return f"{form.format(self.value)} ± {form.format(self.deviation)}"


@dataclass(frozen=True)
class RunGroup:
    """The runs of one method, momentum and rho, all seeds."""

    method: str
    momentum: float
    rho: float | None
    runs: tuple[RunResult, ...]
    best: bool

    @property
    def label(self) -> str:
        """The method, and rho where it has one."""
        return METHODS[self.method] + ("" if self.rho is None else f" (rho {self.rho:g})")

    def mean(self, name: str) -> SeedMean | None:
        """Of an attribute of the runs."""
        return SeedMean.of([getattr(run, name) for run in self.runs])

    @property
    def note(self) -> str:
        """How many runs did not complete, and how they ended."""
        outcomes = [run.outcome for run in self.runs]
        return ", ".join(
            f"{outcomes.count(kind)} of {len(outcomes)} {kind}"
            for kind in ("diverged", "failed", "unfinished")
            if kind in outcomes
        )

    def as_dict(self) -> dict[str, Any]:
        """The means as plain data; `error` is the largest."""
        values: dict[str, Any] = {
            "method": self.method,
            "momentum": self.momentum,
            "rho": self.rho,
            "best": self.best,
            "note": self.note,
        }
        for name in ("accuracy", "sharpness", "edge", "ratio", "gradients", "seconds"):
            mean = self.mean(name)
            values[name] = None if mean is None else asdict(mean)
        return values | {"error": self.error}

    @property
    def error(self) -> float | None:
        """The largest error of a sharpness."""
        return max((run.error for run in self.runs if run.error is not None), default=None)


def group_runs(runs: Sequence[RunResult]) -> list[RunGroup]:
    """The runs by method, momentum and rho; for each method and momentum the best is marked."""
    groups: dict[tuple[float, str, float | None], list[RunResult]] = {}
    for run in runs:
        groups.setdefault((run.momentum, run.method, run.rho), []).append(run)
    order = list(METHODS)
    keys = sorted(groups, key=lambda key: (key[0], order.index(key[1]), key[2] or 0.0))
    best = set()
    for momentum, method in dict.fromkeys(key[:2] for key in keys):
        radii = [key for key in keys if key[:2] == (momentum, method)]
        at = _best([groups[key] for key in radii])
        if at is not None:
            best.add(radii[at])
    return [
        RunGroup(method, momentum, rho, tuple(groups[key]), key in best)
        for key in keys
        for momentum, method, rho in [key]
    ]


def _best(radii: Sequence[Sequence[RunResult]]) -> int | None:
    """The place of the best of a method's radii, as SELECTION says; None where it cannot be told.

    Of equals it is the first.
    """
    accuracies = {
        place: {run.seed: run.accuracy for run in runs if run.accuracy is not None}
        for place, runs in enumerate(radii)
        if not any(run.outcome in ("diverged", "failed") for run in runs)
    }
    if not accuracies:
        return None
    common = set.intersection(*(set(found) for found in accuracies.values()))
    if not common:
        return None
    return max(
        accuracies,
        key=lambda place: statistics.fmean(accuracies[place][seed] for seed in sorted(common)),
    )


@dataclass(frozen=True)
class ClaimCheck:
    """Whether one method ended sharper than another, as the paper says.

    Attributes:
        claim: one of CLAIMS.
        at: of which radii, in words.
        sharper, flatter: labels of what the claim says to be so.
        values: mean sharpness of the two.
        held, seeds: in how many seeds it was so, of how many with both.
    """

    claim: tuple[str, str]
    momentum: float
    at: str
    sharper: str
    flatter: str
    values: tuple[float, float]
    held: int
    seeds: int

    @property
    def verdict(self) -> str:
        """As claimed or reversed where every seed says so; else not in every seed."""
        if self.held == self.seeds:
            return "as claimed"
        return "reversed" if not self.held else "not in every seed"

    @property
    def sentence(self) -> str:
        """All of it."""
        above, below = self.values
        sign = ">" if above > below else "<=" if above == below else "<"
        return (
            f"Momentum {self.momentum:g}, {self.at}: {self.sharper} {above:.4g} {sign} "
            f"{self.flatter} {below:.4g}; the claimed order in {self.held} of {self.seeds} seeds: "
            f"{self.verdict}."
        )


def check_claims(rows: Sequence[RunGroup]) -> list[ClaimCheck]:
    """Every claim, at the best radii and at each radius that both methods have."""
    found = []
    for momentum in dict.fromkeys(row.momentum for row in rows):
        here = [row for row in rows if row.momentum == momentum]
        for first, second in CLAIMS:
            sharper = [row for row in here if row.method == first]
            flatter = [row for row in here if row.method == second]
            for at, a, b in _paired(sharper, flatter):
                check = _check(at, a, b)
                if check is not None:
                    found.append(check)
    return found


def summarize_claims(checks: Sequence[ClaimCheck]) -> list[str]:
    """Of each claim, a line: in how many comparisons it came out how."""
    lines = []
    for first, second in CLAIMS:
        found = [check.verdict for check in checks if check.claim == (first, second)]
        counts = [
            f"{verdict} in {found.count(verdict)}"
            for verdict in ("as claimed", "not in every seed", "reversed")
            if verdict in found
        ]
        if counts:
            lines.append(
                f"{METHODS[first]} sharper than {METHODS[second]}: of {len(found)} comparisons "
                f"{', '.join(counts)}."
            )
    return lines


def _paired(
    sharper: Sequence[RunGroup], flatter: Sequence[RunGroup]
) -> list[tuple[str, RunGroup, RunGroup]]:
    best = [("best rho", a, b) for a in sharper for b in flatter if a.best and b.best]
    same = [
        (f"rho {b.rho:g}", a, b)
        for b in flatter
        for a in sharper
        if b.rho is not None and a.rho in (None, b.rho)
    ]
    return best + same


def _check(at: str, above: RunGroup, below: RunGroup) -> ClaimCheck | None:
    first = {run.seed: run.sharpness for run in above.runs if run.sharpness is not None}
    second = {run.seed: run.sharpness for run in below.runs if run.sharpness is not None}
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    return ClaimCheck(
        claim=(above.method, below.method),
        momentum=above.momentum,
        at=at,
        sharper=above.label,
        flatter=below.label,
        values=(
            statistics.fmean(first[seed] for seed in seeds),
            statistics.fmean(second[seed] for seed in seeds),
        ),
        held=sum(first[seed] > second[seed] for seed in seeds),
        seeds=len(seeds),
    )


# As text.

_CELLS: Mapping[str, Callable[[RunGroup], str]] = {
    "method": lambda row: METHODS[row.method],
    "momentum": lambda row: f"{row.momentum:g}",
    "rho": lambda row: "" if row.rho is None else f"{row.rho:g}",
    "test accuracy": lambda row: _text(row.mean("accuracy"), "{:.2%}"),
    "sharpness": lambda row: _text(row.mean("sharpness"), "{:.4g}"),
    "its error": lambda row: "-" if row.error is None else f"{row.error:.0e}",
    "edge": lambda row: "-" if (edge := row.mean("edge")) is None else f"{edge.value:.4g}",
    "ratio": lambda row: _text(row.mean("ratio"), "{:.3f}"),
    "gradients": lambda row: "-" if (g := row.mean("gradients")) is None else f"{g.value:,.0f}",
    "seconds": lambda row: _text(row.mean("seconds"), "{:.1f}"),
    "note": lambda row: row.note,
}


def _text(mean: SeedMean | None, form: str) -> str:
    return "-" if mean is None else mean.text(form)


def table(rows: Sequence[RunGroup]) -> list[tuple[str, ...]]:
    """Cells, the head first; `note` is left out where it is empty throughout."""
    names = [name for name in _CELLS if name != "note" or any(row.note for row in rows)]
    return [tuple(names), *(tuple(_CELLS[name](row) for name in names) for row in rows)]


def ending(plan: Plan, runs: Sequence[RunResult]) -> str:
    """How many runs there are, and what became of those that did not complete, in a line."""
    outcomes = [run.outcome for run in runs]
    words = [f"{len(runs)} runs with {plan.scale.seeds} seed{'s' * (plan.scale.seeds != 1)}"]
    words += [
        f"{outcomes.count(kind)} {kind}"
        for kind in ("complete", "diverged", "failed", "unfinished")
        if kind in outcomes
    ]
    return ", ".join(words)
