"""What a reproduction found: its plan, its runs, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eigenfilter.experiments.reproduce import summary
from eigenfilter.experiments.reproduce.plan import EXPERIMENTS, Plan
from eigenfilter.experiments.reproduce.summary import ClaimCheck, RunGroup, RunResult


@dataclass(frozen=True)
class Findings:
    """A plan, what its runs came to, and what follows from them.

    Attributes:
        seconds: that all commands spent on the runs and their spectra, beside the plan's estimate.
    """

    plan: Plan
    runs: list[RunResult]
    seconds: float
    rows: list[RunGroup]
    checks: list[ClaimCheck]

    @classmethod
    def of(cls, plan: Plan, runs: Sequence[RunResult], seconds: float) -> Findings:
        """From the runs."""
        rows = summary.group_runs(runs)
        return cls(plan, list(runs), seconds, rows, summary.check_claims(rows))

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be run."""
        return all(run.outcome != "unfinished" for run in self.runs)

    @property
    def failed(self) -> bool:
        """Whether a run failed, not by diverging, or completed and has no spectrum."""
        return any(
            run.outcome == "failed" or (run.outcome == "complete" and run.spectrum is None)
            for run in self.runs
        )

    @property
    def title(self) -> str:
        """The experiment, whether in full, and what became of the runs."""
        name = EXPERIMENTS[self.plan.experiment].title
        return f"{name}, {self.plan.statement}; {summary.ending(self.plan, self.runs)}"

    @property
    def verdicts(self) -> list[str]:
        """Of each claim, in how many comparisons it held."""
        return summary.summarize_claims(self.checks)

    @property
    def failures(self) -> dict[str, list[str]]:
        """By their heading, what each run that did not complete or has no spectrum ended with."""
        noted = [run for run in self.runs if run.note]
        found = {
            "Not completed": [
                f"{run.name}: {run.outcome}: {run.note}"
                for run in noted
                if run.outcome != "complete"
            ],
            "Complete, but without a spectrum": [
                f"{run.name}: {run.note}" for run in noted if run.outcome == "complete"
            ],
        }
        return {heading: lines for heading, lines in found.items() if lines}

    def settings(self) -> dict[str, str]:
        """What was trained and measured, in words."""
        plan, experiment = self.plan, EXPERIMENTS[self.plan.experiment]
        scale, fixed = plan.scale, experiment.fixed
        spectrum = scale.spectrum
        return {
            "network": f"{scale.model}" + ", tanh" * (fixed.get("activation") == "tanh"),
            "images": f"the first {scale.samples:,} of the training set"
            + ", random crops and reflections" * bool(fixed.get("flip")),
            "loss": "cross entropy",
            "batch": f"{fixed['batch_size']}",
            "epochs": f"{scale.epochs}",
            "learning rate": ", ".join(
                f"{lr:g} with momentum {momentum:g}" for momentum, lr in experiment.lr.items()
            )
            + ", constant",
            "weight decay": "none",
            "seeds": ", ".join(str(seed) for seed in plan.seeds),
            "spectra": f"the first {spectrum.samples:,} training images as they are; "
            f"{spectrum.pairs} largest eigenvalues, density from {spectrum.probes} random vectors "
            f"of {spectrum.steps} products",
            "best rho": summary.SELECTION,
            "deviation": "of a sample, over the seeds",
        }
