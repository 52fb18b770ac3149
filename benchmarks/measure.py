"""Verify a contest, then time it: one benchmark in one setting."""

from __future__ import annotations

from dataclasses import dataclass

from eigenfilter.benchmarks import environment
from eigenfilter.benchmarks.contest import Benchmark, Contest, Setting
from eigenfilter.benchmarks.timing import Spread, clock, interleave
from eigenfilter.benchmarks.verify import Verdict, verify

MOST_NEIGHBOURS = 0.2  # cores


@dataclass(frozen=True)
class Comparison:
    """The library against one other.

    Attributes:
        against: a peer's name, or "copy".
        seconds: its time of one repetition.
        bandwidth: bytes a second at its median time, of those that the work has to move.
        ratio: its time over the library's, round by round; the copy's is scaled to as many bytes.
        goal: the ratio to reach, or None.
    """

    against: str
    seconds: Spread
    bandwidth: float
    ratio: Spread
    goal: float | None

    @property
    def reached(self) -> bool:
        """Whether the median ratio reaches the goal; True if there is none."""
        return self.goal is None or self.ratio.median >= self.goal


@dataclass(frozen=True)
class Timing:
    """What timing a contest gave: `seconds` and `bandwidth` are the library's.

    `neighbours` is the mean number of cores that others kept busy meanwhile.
    """

    rounds: int
    moved: int
    seconds: Spread
    bandwidth: float
    comparisons: tuple[Comparison, ...]
    neighbours: float

    @property
    def disturbed(self) -> bool:
        """Whether others were so busy that the figures say nothing about a goal."""
        return self.neighbours > MOST_NEIGHBOURS


@dataclass(frozen=True)
class Result:
    """One benchmark in one setting; without a timing where its check is red."""

    name: str
    summary: str
    device: str
    backend: str
    verdict: Verdict
    timing: Timing | None
    load: float


def measure(benchmark: Benchmark, setting: Setting, *, repeat: int | None = None) -> Result:
    """Verify a benchmark and, if its contenders agree, time it.

    Args:
        benchmark: what to run.
        setting: where.
        repeat: rounds of timing, or None for as many as a few seconds allow.
    """
    contest = benchmark.build(setting)
    verdict = verify(contest)
    timing = None
    if not verdict.red:
        goals = benchmark.goals.get(setting.device.type, ())
        timing = _time(contest, setting, {g.against: g.ratio for g in goals}, repeat)
    return Result(
        benchmark.name,
        benchmark.summary,
        setting.device.type,
        setting.backend,
        verdict,
        timing,
        environment.load(),
    )


def _time(
    contest: Contest, setting: Setting, goals: dict[str, float], repeat: int | None
) -> Timing:
    others = (*contest.peers, contest.copy)
    neighbours = environment.Neighbours()
    seconds = interleave(
        (contest.library, *others), clock(contest.clock, setting.device), repeat=repeat
    )
    busy = neighbours.cores()
    ours = seconds[contest.library.name]
    comparisons = []
    for other in others:
        theirs = seconds[other.name]
        moved, scale = contest.moved, 1.0
        if other is contest.copy:
            moved, scale = contest.copied, contest.moved / contest.copied
        comparisons.append(
            Comparison(
                other.name,
                Spread.of(theirs),
                moved / Spread.of(theirs).median,
                Spread.of([scale * b / a for a, b in zip(ours, theirs, strict=True)]),
                goals.get(other.name),
            )
        )
    spread = Spread.of(ours)
    return Timing(
        len(ours), contest.moved, spread, contest.moved / spread.median, tuple(comparisons), busy
    )
