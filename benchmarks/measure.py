"""Verify one benchmark in one setting, then time it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import environment
from benchmarks.comparison import Benchmark, Comparison, Reference, Setting
from benchmarks.timing import Spread, clock, interleave
from benchmarks.verify import Verdict, verify

MAX_BUSY_CORES = 0.2  # kept busy by other processes; above that, goals are not judged


@dataclass(frozen=True)
class RelativeTiming:
    """The times of a peer or a reference, and their ratio to the library's.

    Attributes:
        against: name of the peer or the reference.
        seconds: its time for one repetition.
        host: the part of that for which it occupied the host; see `timing.Timing`.
        bandwidth: the bytes that the work has to move, over its median time; None if unknown.
        ratio: its time over the library's, round by round; a reference's time is scaled first.
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
        """Whether the median ratio reaches the goal; True if there is no goal."""
        return self.goal is None or self.ratio.median >= self.goal


@dataclass(frozen=True)
class TimingSummary:
    """The times of a comparison; `seconds`, `host` and `bandwidth` are the library's.

    Attributes:
        rounds: how many rounds were timed.
        traffic: bytes that a repetition has to read and write; None if unknown.
        seconds: the library's time for one repetition.
        host: the part of that for which it occupied the host; see `timing.Timing`.
        bandwidth: `traffic` over the median time; None if unknown.
        comparisons: the peers, then the references.
        busy_cores: the mean number of cores that other processes kept busy meanwhile.
    """

    rounds: int
    traffic: int | None
    seconds: Spread
    host: Spread
    bandwidth: float | None
    comparisons: tuple[RelativeTiming, ...]
    busy_cores: float

    @property
    def is_disturbed(self) -> bool:
        """Whether other processes were so busy that no goal can be judged."""
        return self.busy_cores > MAX_BUSY_CORES


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of one benchmark in one setting.

    Attributes:
        name: the benchmark's name.
        summary: what is timed, in one line.
        device: the type of the device.
        backend: the library's backend.
        verdict: how far the library's results are from its peers'.
        timing: the times; None if the verification failed.
        load: the machine's load average.
        absent: one line for each peer that could not take part.
    """

    name: str
    summary: str
    device: str
    backend: str
    verdict: Verdict
    timing: TimingSummary | None
    load: float
    absent: tuple[str, ...] = ()


def measure(
    benchmark: Benchmark, setting: Setting, *, repeat: int | None = None
) -> BenchmarkResult:
    """Verify a benchmark and, if its contenders agree, time it.

    Args:
        benchmark: the benchmark.
        setting: the device and the backend.
        repeat: rounds of timing, or None for as many as a few seconds allow.
    """
    comparison = benchmark.build(setting)
    verdict = verify(comparison)
    timing = None
    if not verdict.failures:
        goals = benchmark.goals.get(setting.device.type, ())
        timing = _time(comparison, setting, {g.against: g.ratio for g in goals}, repeat)
    return BenchmarkResult(
        benchmark.name,
        benchmark.summary,
        setting.device.type,
        setting.backend,
        verdict,
        timing,
        environment.load(),
        comparison.absent,
    )


def _time(
    comparison: Comparison, setting: Setting, goals: dict[str, float], repeat: int | None
) -> TimingSummary:
    others = [Reference(peer) for peer in comparison.peers] + list(comparison.references)
    contenders = (comparison.library, *(other.contender for other in others))
    machine_load = environment.MachineLoad()
    timings = interleave(contenders, clock(comparison.clock, setting.device), repeat=repeat)
    busy_cores = machine_load.busy_cores()
    ours = timings[comparison.library.name]

    def bandwidth(seconds: Spread, scale: float = 1.0) -> float | None:
        return None if comparison.traffic is None else comparison.traffic / scale / seconds.median

    comparisons = []
    for other in others:
        name = other.contender.name
        seconds = Spread.of([timing.seconds for timing in timings[name]])
        pairs = zip(ours, timings[name], strict=True)
        comparisons.append(
            RelativeTiming(
                name,
                seconds,
                Spread.of([timing.host for timing in timings[name]]),
                bandwidth(seconds, other.scale),
                Spread.of([other.scale * b.seconds / a.seconds for a, b in pairs]),
                goals.get(name),
            )
        )
    seconds = Spread.of([timing.seconds for timing in ours])
    host = Spread.of([timing.host for timing in ours])
    return TimingSummary(
        len(ours),
        comparison.traffic,
        seconds,
        host,
        bandwidth(seconds),
        tuple(comparisons),
        busy_cores,
    )
