"""Do the contenders of a contest agree? Asked before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.contest import Contest, Tolerance

REPETITIONS = 3


@dataclass(frozen=True)
class Verdict:
    """How far the library is from its peers.

    Attributes:
        errors: by peer, the largest |a - b| / (atol + rtol |b|) of any element; NaN where a result
            is NaN, inf where the results do not even have the same shapes.
        tolerance: rtol and atol.
    """

    errors: dict[str, float]
    tolerance: Tolerance

    @property
    def red(self) -> dict[str, float]:
        """The errors that are too large; NaN is."""
        return {peer: error for peer, error in self.errors.items() if not error <= 1}


def verify(contest: Contest) -> Verdict:
    """Let every contender repeat the work from the same start, and compare what came of it."""
    for contender in (contest.library, *contest.peers):
        contender.repeat(REPETITIONS)
    ours = contest.library.result()
    errors = {peer.name: distance(ours, peer.result(), contest.tolerance) for peer in contest.peers}
    return Verdict(errors, contest.tolerance)


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: Tolerance) -> float:
    """Return the largest difference in units of the tolerance, as `Verdict.errors` has it."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = ((a - b).abs() / (tolerance.atol + tolerance.rtol * b.abs())).max().item()
        worst = worst if error <= worst else error  # NaN stays
    return worst
