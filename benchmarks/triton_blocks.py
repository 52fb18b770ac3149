"""Which sizes of blocks and programs serve the Triton kernels best: all of them, timed in turns.

    eigenfilter bench triton-blocks --device cuda --save

The bandwidth of each kernel for each choice, as a fraction of a copy's. A choice is taken in place
of the default where it is better by more than the quartiles of both. With --save what is taken is
written down for this kind of device, see `eigenfilter.kernels.triton_blocks`, and later processes
use it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import environment, report
from benchmarks.contest import Contender, Phase, Setting
from benchmarks.kernels import KERNELS
from benchmarks.timing import Spread, clock, interleave
from eigenfilter.experiments.files import output_folder, replace_text
from eigenfilter.kernels import triton_blocks
from eigenfilter.kernels.triton_blocks import Blocks

CHOICES = tuple(itertools.starmap(Blocks, itertools.product((2048, 4096, 8192, 16384), (2, 4, 8))))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Measured = dict[tuple[str, str], dict[Blocks, Spread]]
"""A kernel's bandwidths over a copy's by kernel and dtype, then choice."""


def run(device: torch.device, folder: Path, save: bool) -> None:
    """Time every choice, print and write the table as it grows; save what is best, if asked for.

    Raises:
        ValueError: the file for what is best holds something else.
        UserError: something cannot be written.
    """
    saved = triton_blocks.read(triton_blocks.file()) if save else {}
    found = environment.describe(device)
    rows = [
        "| kernel | dtype | block, bytes | warps | of copy |",
        "| --- | --- | --- | --- | --- |",
    ]
    print("\n".join(rows))
    files = report.Files(folder, f"{device.type}-triton-blocks", found)
    measured: Measured = {}
    data = []
    pairs = list(itertools.product(KERNELS, DTYPES))
    for name, dtype in pairs:
        spreads = measured[name, str(dtype)] = measure(name, dtype, device)
        taken = best(spreads)
        for choice, ratio in spreads.items():
            data.append({"kernel": name, "dtype": str(dtype), **asdict(choice), **asdict(ratio)})
            mark = " (taken)" if choice == taken else ""
            spread = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            rows.append(f"| {name} | {dtype} | {choice.bytes} | {choice.warps}{mark} | {spread} |")
            print(rows[-1], flush=True)
        missing = report.incomplete(len(measured), len(pairs), "kernels and dtypes")
        files.save(
            ["# Sizes of the Triton kernels' blocks", *missing, "", *rows],
            {
                "device": device.type,
                "complete": len(measured) == len(pairs),
                "triton_blocks": data,
            },
        )
    files.name()
    if save:
        write(triton_blocks.file(), saved, device, measured)


def measure(
    kernel: str, dtype: torch.dtype, device: torch.device, repeat: int | None = None
) -> dict[Blocks, Spread]:
    """A kernel's bandwidth over a copy's, by choice."""
    contest = KERNELS[kernel](Setting(device, "triton"), dtype)
    copy = contest.yardsticks[0]
    [work] = contest.library.phases

    def contender(choice: Blocks) -> Contender:
        def act(run: Callable[[], object] = work.run) -> None:
            with triton_blocks.forcing(choice):
                run()

        return Contender(str(choice), (Phase(work.prepare, act),), contest.library.result)

    contenders = [*map(contender, CHOICES), copy.contender]
    laps = interleave(contenders, clock(contest.clock, device), repeat=repeat)
    copied = [copy.scale * lap.seconds for lap in laps[copy.contender.name]]
    return {
        choice: Spread.of(
            [b / lap.seconds for lap, b in zip(laps[str(choice)], copied, strict=True)]
        )
        for choice in CHOICES
    }


def best(spreads: Mapping[Blocks, Spread]) -> Blocks:
    """The default, or the fastest choice if its lower quartile is above the default's upper."""
    usual = Blocks()
    fastest = max(spreads, key=lambda choice: spreads[choice].median)
    return fastest if spreads[fastest].low > spreads[usual].high else usual


def write(path: Path, saved: triton_blocks.Saved, device: torch.device, measured: Measured) -> None:
    """Write down which sizes are better than the default for a kind of device, and what was saved.

    Raises:
        UserError: it cannot be written.
    """
    better = {key: taken for key, all_ in measured.items() if (taken := best(all_)) != Blocks()}
    by_kernel = saved[triton_blocks.name_of(device)] = {}
    for (kernel, dtype), taken in better.items():
        by_kernel.setdefault(kernel, {})[dtype] = taken
    output_folder(path.parent)
    replace_text(path, json.dumps(saved, default=asdict, indent=1) + "\n")
    print(f"wrote {path}")
