"""Verify a contest, then time it: one benchmark in one setting."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import environment
from benchmarks.contest import Benchmark, Contest, Setting, Yardstick
from benchmarks.timing import Spread, clock, interleave
from benchmarks.verify import Verdict, verify

MOST_NEIGHBOURS = 0.2  # cores


@dataclass(frozen=True)
class Comparison:
    """The library against one other.

    Attributes:
        against: a peer or a yardstick.
        seconds: its time of one repetition.
        host: what of that the host was occupied for; see `timing.Lap`.
        bandwidth: bytes a second at its median time, of those that the work has to move.
        ratio: its time over the library's, round by round; a yardstick's is scaled.
        goal: the ratio to reach, or None.
    """

    against: str
    seconds: Spread
    host: Spread
    bandwidth: float | None
    ratio: Spread
    goal: float | None

    @property
    def reached(self) -> bool:
        """Whether the median ratio reaches the goal; True if there is none."""
        return self.goal is None or self.ratio.median >= self.goal


@dataclass(frozen=True)
class Timing:
    """What timing a contest gave: `seconds`, `host` and `bandwidth` are the library's.

    `neighbours` is the mean number of cores that others kept busy meanwhile.
    """

    rounds: int
    moved: int | None
    seconds: Spread
    host: Spread
    bandwidth: float | None
    comparisons: tuple[Comparison, ...]
    neighbours: float

    @property
    def disturbed(self) -> bool:
        """Whether others were so busy that the figures say nothing about a goal."""
        return self.neighbours > MOST_NEIGHBOURS


@dataclass(frozen=True)
class Result:
    """One benchmark in one setting; without a timing where its check is red.

    `absent` has a line for each peer that could not take part.
    """

    name: str
    summary: str
    device: str
    backend: str
    verdict: Verdict
    timing: Timing | None
    load: float
    absent: tuple[str, ...] = ()


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
        contest.absent,
    )


def _time(
    contest: Contest, setting: Setting, goals: dict[str, float], repeat: int | None
) -> Timing:
    others = [Yardstick(peer) for peer in contest.peers] + list(contest.yardsticks)
    contenders = (contest.library, *(other.contender for other in others))
    neighbours = environment.Neighbours()
    laps = interleave(contenders, clock(contest.clock, setting.device), repeat=repeat)
    busy = neighbours.cores()
    ours = laps[contest.library.name]

    def bandwidth(seconds: Spread, scale: float = 1.0) -> float | None:
        return None if contest.moved is None else contest.moved / scale / seconds.median

    comparisons = []
    for other in others:
        name = other.contender.name
        seconds = Spread.of([lap.seconds for lap in laps[name]])
        pairs = zip(ours, laps[name], strict=True)
        comparisons.append(
            Comparison(
                name,
                seconds,
                Spread.of([lap.host for lap in laps[name]]),
                bandwidth(seconds, other.scale),
                Spread.of([other.scale * b.seconds / a.seconds for a, b in pairs]),
                goals.get(name),
            )
        )
    seconds = Spread.of([lap.seconds for lap in ours])
    host = Spread.of([lap.host for lap in ours])
    return Timing(
        len(ours), contest.moved, seconds, host, bandwidth(seconds), tuple(comparisons), busy
    )
