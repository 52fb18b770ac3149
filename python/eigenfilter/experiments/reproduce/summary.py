"""Summaries of the runs: means over seeds, the best radii, and the order of the sharpness."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eigenfilter.experiments.reproduce.plan import CLAIMS, METHODS, Plan
from eigenfilter.experiments.runs import Record
from eigenfilter.filters import ASCENTS

SELECTION = (
    "The best rho of a method is the one with the highest mean accuracy on the test set, as in the "
    "paper, so that its accuracy is optimistic. Only radii with which no run diverged or failed "
    "can be best; they are compared over the seeds that all of them were trained with."
)


@dataclass(frozen=True)
class RunResult:
    """The result of one run.

    Attributes:
        name: name of the run.
        method, momentum, rho, seed: configuration of the run; rho is None for SGD.
        outcome: "complete", "diverged", "failed" or "unfinished". A run is unfinished if its
            training or its spectrum is.
        note: reason why the run is not complete or has no spectrum.
        accuracy: accuracy on the test set at the end. This and the following are None if missing.
        sharpness: largest eigenvalue of the Hessian.
        error: residual ||H v - lambda v||, which bounds the distance of the sharpness to an
            eigenvalue, except for rounding in the products.
        edge: edge of the filter; None for SAM.
        gradients: number of gradients, in units of a whole batch.
        seconds: time of the training.
        spectrum: the record that `spectra.measure_spectrum` stored.
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
        """Ratio of the sharpness to the edge."""
        return None if self.sharpness is None or not self.edge else self.sharpness / self.edge

    def as_dict(self) -> dict[str, Any]:
        """Return all values except the spectrum, which is stored in the run's folder."""
        values = asdict(self) | {"ratio": self.ratio}
        del values["spectrum"]
        return values

    @classmethod
    def of(cls, name: str, record: Record, spectrum: Record | None) -> RunResult:
        """Make a result from the records of a run and of its spectrum."""
        config, outcome, note = record["config"], record["outcome"], ""
        if outcome == "failed":
            outcome, note = "diverged" if record["diverged"] else "failed", record["error"]
        elif outcome != "complete" or spectrum is None:
            outcome = "unfinished"
        if spectrum is not None and "error" in spectrum:
            note = spectrum["error"]
        measured = spectrum if spectrum is not None and "values" in spectrum else None
        method = config["optimizer"]
        trained = record["outcome"] == "complete"
        return cls(
            name=name,
            method=method,
            momentum=config["momentum"],
            rho=config["rho"] if method in ASCENTS else None,
            seed=config["seed"],
            outcome=outcome,
            note=note,
            accuracy=record["test"]["accuracy"] if trained else None,
            sharpness=measured["values"][0] if measured else None,
            error=measured["residuals"][0] if measured else None,
            edge=measured["edge"] if measured else None,
            gradients=record["gradients"] if trained else None,
            seconds=record["seconds"] if trained else None,
            spectrum=measured,
        )


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds, and the standard deviation of the sample, None for a single seed."""

    value: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> SeedMean | None:
        """Return the mean of the values that are not None, or None if there are none."""
        present = [value for value in values if value is not None]
        if not present:
            return None
        return cls(statistics.fmean(present), statistics.stdev(present) if present[1:] else None)

    def text(self, form: str) -> str:
        """Format the mean, and the deviation if there is one."""
        if self.deviation is None:
            return form.format(self.value)
        return f"{form.format(self.value)} ± {form.format(self.deviation)}"


@dataclass(frozen=True)
class RunGroup:
    """The runs of all seeds with the same method, momentum and rho."""

    method: str
    momentum: float
    rho: float | None
    runs: tuple[RunResult, ...]
    best: bool

    @property
    def label(self) -> str:
        """The method, and rho if it has one."""
        return METHODS[self.method] + ("" if self.rho is None else f" (rho {self.rho:g})")

    def mean(self, name: str) -> SeedMean | None:
        """Return the mean of an attribute over the runs."""
        return SeedMean.of([getattr(run, name) for run in self.runs])

    @property
    def note(self) -> str:
        """How many runs are not complete, by outcome."""
        outcomes = [run.outcome for run in self.runs]
        return ", ".join(
            f"{outcomes.count(kind)} of {len(outcomes)} {kind}"
            for kind in ("diverged", "failed", "unfinished")
            if kind in outcomes
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the means as plain data, and the largest error."""
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
    """Group runs by method, momentum and rho, and mark the best rho per method and momentum."""
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
    """Return the index of the best radius of a method by SELECTION, or None if undecided.

    Among equal radii the first is best.
    """
    accuracies = {
        place: {run.seed: run.accuracy for run in runs if run.accuracy is not None}
        for place, runs in enumerate(radii)
        if not any(run.outcome in ("diverged", "failed") for run in runs)
    }
    if not accuracies:
        return None
    common = set.intersection(*(set(by_seed) for by_seed in accuracies.values()))
    if not common:
        return None
    return max(
        accuracies,
        key=lambda place: statistics.fmean(accuracies[place][seed] for seed in sorted(common)),
    )


@dataclass(frozen=True)
class ClaimCheck:
    """Comparison of two methods of which, by a claim of the paper, the first ends sharper.

    Attributes:
        claim: one of CLAIMS.
        momentum: momentum of both methods.
        at: the radii that are compared.
        sharper, flatter: labels of the methods that the claim calls sharper and flatter.
        values: mean sharpness of the two.
        held: number of seeds in which the claim held.
        seeds: number of seeds with results of both methods.
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
        """ "as claimed" or "reversed" if all seeds agree, else "not in every seed"."""
        if self.held == self.seeds:
            return "as claimed"
        return "reversed" if not self.held else "not in every seed"

    @property
    def sentence(self) -> str:
        """The comparison as a sentence."""
        above, below = self.values
        sign = ">" if above > below else "<=" if above == below else "<"
        return (
            f"Momentum {self.momentum:g}, {self.at}: {self.sharper} {above:.4g} {sign} "
            f"{self.flatter} {below:.4g}; the claimed order in {self.held} of {self.seeds} seeds: "
            f"{self.verdict}."
        )


def check_claims(rows: Sequence[RunGroup]) -> list[ClaimCheck]:
    """Check every claim at the best radii, and at each radius that both methods have."""
    checks = []
    for momentum in dict.fromkeys(row.momentum for row in rows):
        group = [row for row in rows if row.momentum == momentum]
        for first, second in CLAIMS:
            sharper = [row for row in group if row.method == first]
            flatter = [row for row in group if row.method == second]
            for at, a, b in _paired(sharper, flatter):
                check = _check(at, a, b)
                if check is not None:
                    checks.append(check)
    return checks


def summarize_claims(checks: Sequence[ClaimCheck]) -> list[str]:
    """Return a line per claim with the numbers of comparisons by verdict."""
    lines = []
    for first, second in CLAIMS:
        verdicts = [check.verdict for check in checks if check.claim == (first, second)]
        counts = [
            f"{verdict} in {verdicts.count(verdict)}"
            for verdict in ("as claimed", "not in every seed", "reversed")
            if verdict in verdicts
        ]
        if counts:
            lines.append(
                f"{METHODS[first]} sharper than {METHODS[second]}: of {len(verdicts)} comparisons "
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


# Formatting of tables.

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
    """Return rows of cells below a head; the column `note` is omitted if it is empty."""
    names = [name for name in _CELLS if name != "note" or any(row.note for row in rows)]
    return [tuple(names), *(tuple(_CELLS[name](row) for name in names) for row in rows)]


def ending(plan: Plan, runs: Sequence[RunResult]) -> str:
    """Return one line with the number of runs and their outcomes."""
    outcomes = [run.outcome for run in runs]
    parts = [f"{len(runs)} runs with {plan.scale.seeds} seed{'s' * (plan.scale.seeds != 1)}"]
    parts += [
        f"{outcomes.count(kind)} {kind}"
        for kind in ("complete", "diverged", "failed", "unfinished")
        if kind in outcomes
    ]
    return ", ".join(parts)
