"""Which sizes of blocks and programs serve the Triton kernels best: all of them, timed in turns.

    eigenfilter bench triton-blocks --device cuda

The bandwidth of each kernel for each choice, as a fraction of a copy's. The library's own choice,
which is compiled in, is marked; where another is better by more than the quartiles, write that into
`eigenfilter/kernels/triton_tables.py` and `triton_device.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from eigenfilter.benchmarks import environment, report
from eigenfilter.benchmarks.contest import Contender, Phase, Setting
from eigenfilter.benchmarks.kernels import KERNELS
from eigenfilter.benchmarks.timing import Spread, clock, interleave

BLOCK_BYTES = (2048, 4096, 8192, 16384)
WARPS = (2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16)

Choice = tuple[int, int]


def run(device: torch.device, folder: Path) -> None:
    """Time every choice, print the table, write the results."""
    found = environment.describe(device)
    own = chosen()
    rows = [
        "| kernel | dtype | block, bytes | warps | of copy |",
        "| --- | --- | --- | --- | --- |",
    ]
    print("\n".join(rows))
    measured = []
    for name, dtype in itertools.product(KERNELS, DTYPES):
        for choice, ratio in measure(name, dtype, device).items():
            measured.append(
                {"kernel": name, "dtype": str(dtype), "choice": choice, "ratio": ratio.median}
            )
            mark = " (chosen)" if choice == own else ""
            spread = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            rows.append(f"| {name} | {dtype} | {choice[0]} | {choice[1]}{mark} | {spread} |")
            print(rows[-1], flush=True)
    title = "# Sizes of the Triton kernels' blocks"
    data = {"device": device.type, "triton_blocks": measured}
    report.write(folder, f"{device.type}-triton-blocks", found, [title, "", *rows], data)


def measure(
    kernel: str, dtype: torch.dtype, device: torch.device, repeat: int | None = None
) -> dict[Choice, Spread]:
    """A kernel's bandwidth over a copy's, by choice."""
    contest = KERNELS[kernel](Setting(device, "triton"), dtype)
    copy = contest.yardsticks[0]
    [work] = contest.library.phases

    def contender(choice: Choice) -> Contender:
        def act(run: Callable[[], object] = work.run) -> None:
            with choosing(choice):
                run()

        return Contender(str(choice), (Phase(work.prepare, act),), contest.library.result)

    choices = list(itertools.product(BLOCK_BYTES, WARPS))
    contenders = [*map(contender, choices), copy.contender]
    laps = interleave(contenders, clock(contest.clock, device), repeat=repeat)
    copied = [copy.scale * lap.seconds for lap in laps[copy.contender.name]]
    return {
        choice: Spread.of(
            [b / lap.seconds for lap, b in zip(laps[str(choice)], copied, strict=True)]
        )
        for choice in choices
    }


def chosen() -> Choice:
    """The library's choice."""
    from eigenfilter.kernels import triton_device, triton_tables

    return triton_tables.BLOCK_BYTES, triton_device.OPTIONS["num_warps"]


@contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """A context in which another choice is the library's."""
    from eigenfilter.kernels import triton_device, triton_tables

    before = chosen()
    triton_tables.BLOCK_BYTES, triton_device.OPTIONS["num_warps"] = choice
    try:
        yield
    finally:
        triton_tables.BLOCK_BYTES, triton_device.OPTIONS["num_warps"] = before
