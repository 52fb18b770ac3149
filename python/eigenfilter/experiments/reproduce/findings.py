"""The findings of a reproduction: its plan, its runs, and the conclusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eigenfilter.experiments.reproduce import summary
from eigenfilter.experiments.reproduce.plan import EXPERIMENTS, Plan
from eigenfilter.experiments.reproduce.summary import ClaimCheck, RunGroup, RunResult


@dataclass(frozen=True)
class Findings:
    """A plan, the results of its runs, and the conclusions from them.

    Attributes:
        plan: the plan.
        runs: results of all runs.
        seconds: time that all commands spent on the runs and their spectra.
        rows: the runs grouped by method, momentum and rho.
        checks: comparisons of the sharpness that the claims of the paper predict.
    """

    plan: Plan
    runs: list[RunResult]
    seconds: float
    rows: list[RunGroup]
    checks: list[ClaimCheck]

    @classmethod
    def of(cls, plan: Plan, runs: Sequence[RunResult], seconds: float) -> Findings:
        """Group the runs, and check the claims."""
        rows = summary.group_runs(runs)
        return cls(plan, list(runs), seconds, rows, summary.check_claims(rows))

    @property
    def complete(self) -> bool:
        """Whether no run is unfinished."""
        return all(run.outcome != "unfinished" for run in self.runs)

    @property
    def failed(self) -> bool:
        """Whether a run failed other than by divergence, or is complete without a spectrum."""
        return any(
            run.outcome == "failed" or (run.outcome == "complete" and run.spectrum is None)
            for run in self.runs
        )

    @property
    def title(self) -> str:
        """The experiment, its scale, and the outcomes of the runs."""
        name = EXPERIMENTS[self.plan.experiment].title
        return f"{name}, {self.plan.statement}; {summary.ending(self.plan, self.runs)}"

    @property
    def verdicts(self) -> list[str]:
        """A line per claim: in how many comparisons it held."""
        return summary.summarize_claims(self.checks)

    @property
    def failures(self) -> dict[str, list[str]]:
        """Runs that are not complete or have no spectrum, with the reasons, by headings."""
        noted = [run for run in self.runs if run.note]
        failures = {
            "Not completed": [
                f"{run.name}: {run.outcome}: {run.note}"
                for run in noted
                if run.outcome != "complete"
            ],
            "Complete, but without a spectrum": [
                f"{run.name}: {run.note}" for run in noted if run.outcome == "complete"
            ],
        }
        return {heading: lines for heading, lines in failures.items() if lines}

    def settings(self) -> dict[str, str]:
        """Return a description of the training and the measurements."""
        plan, experiment = self.plan, EXPERIMENTS[self.plan.experiment]
        scale, fixed = plan.scale, experiment.fixed
        spectrum = scale.spectrum
        return {
            "network": f"{scale.model}" + ", tanh" * (fixed.get("activation") == "tanh"),
            "images": f"the first {scale.samples:,} of the training set"
            + ", random crops and flips" * bool(fixed.get("flip")),
            "loss": "cross entropy",
            "batch": f"{fixed['batch_size']}",
            "epochs": f"{scale.epochs}",
            "learning rate": ", ".join(
                f"{lr:g} with momentum {momentum:g}" for momentum, lr in experiment.lr.items()
            )
            + ", constant",
            "weight decay": "none",
            "seeds": ", ".join(str(seed) for seed in plan.seeds),
            "spectra": f"the first {spectrum.samples:,} training images without augmentation; "
            f"{spectrum.pairs} largest eigenvalues, density from {spectrum.probes} random vectors "
            f"with {spectrum.steps} products each",
            "best rho": summary.SELECTION,
            "deviation": "standard deviation of a sample, over the seeds",
        }
