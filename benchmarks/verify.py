"""Check that the contenders of a comparison agree, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.comparison import Comparison, Tolerance

REPETITIONS = 3


@dataclass(frozen=True)
class Verdict:
    """How far the library's results are from its peers'.

    Attributes:
        errors: by peer, the largest |a - b| / (atol + rtol |b|) of any element. It is NaN if a
            result is NaN, and inf if the results have different shapes.
        tolerance: rtol and atol.
    """

    errors: dict[str, float]
    tolerance: Tolerance

    @property
    def failures(self) -> dict[str, float]:
        """The errors that are too large, NaN among them, by peer."""
        return {peer: error for peer, error in self.errors.items() if not error <= 1}


def verify(comparison: Comparison) -> Verdict:
    """Let every contender repeat the work from the same start, and compare the results."""
    for contender in (comparison.library, *comparison.peers):
        contender.repeat(REPETITIONS)
    ours = comparison.library.result()
    errors = {
        peer.name: distance(ours, peer.result(), comparison.tolerance) for peer in comparison.peers
    }
    return Verdict(errors, comparison.tolerance)


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: Tolerance) -> float:
    """Return the largest difference in units of the tolerance; see `Verdict.errors`."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = ((a - b).abs() / (tolerance.atol + tolerance.rtol * b.abs())).max().item()
        worst = worst if error <= worst else error  # NaN stays
    return worst
