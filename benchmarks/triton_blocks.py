"""The best block sizes and numbers of warps for the Triton kernels: all choices, timed in turns.

    eigenfilter bench triton-blocks --device cuda --save

Prints the bandwidth of each kernel for each choice, as a fraction of a copy's. The fastest choice
replaces the default if its lower quartile is above the default's upper quartile. With --save the
best choices are saved for this kind of device, and later processes use them; see
`eigenfilter.kernels.triton.blocks`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import environment, report
from benchmarks.comparison import Contender, Phase, Setting
from benchmarks.kernels import KERNELS
from benchmarks.timing import Spread, clock, interleave
from eigenfilter.experiments.files import output_folder, replace_text
from eigenfilter.kernels.triton import blocks as triton_blocks
from eigenfilter.kernels.triton.blocks import Blocks

CHOICES = tuple(itertools.starmap(Blocks, itertools.product((2048, 4096, 8192, 16384), (2, 4, 8))))

Bandwidths = dict[tuple[str, str], dict[Blocks, Spread]]
"""Bandwidths over a copy's, by kernel and dtype, then by choice."""


def run(device: torch.device, folder: Path, save: bool) -> None:
    """Time every choice; print and write the table as it grows.

    Args:
        device: the GPU.
        folder: the folder for the results.
        save: whether to save the best choices for later processes.

    Raises:
        ValueError: the file for the best choices holds something else.
        UserError: a file cannot be written.
    """
    choices = triton_blocks.read(triton_blocks.file()) if save else {}
    where = environment.describe(device)
    rows = [
        "| kernel | dtype | block, bytes | warps | of copy |",
        "| --- | --- | --- | --- | --- |",
    ]
    print("\n".join(rows))
    files = report.ResultFiles(folder, f"{device.type}-triton-blocks", where)
    bandwidths: Bandwidths = {}
    data = []
    pairs = list(itertools.product(triton_blocks.kernels(), triton_blocks.DTYPES))
    for name, dtype in pairs:
        spreads = bandwidths[name, str(dtype)] = measure(name, dtype, device)
        best_choice = best(spreads)
        for choice, ratio in spreads.items():
            data.append({"kernel": name, "dtype": str(dtype), **asdict(choice), **asdict(ratio)})
            mark = " (best)" if choice == best_choice else ""
            spread = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            rows.append(f"| {name} | {dtype} | {choice.bytes} | {choice.warps}{mark} | {spread} |")
            print(rows[-1], flush=True)
        note = report.incomplete(len(bandwidths), len(pairs), "kernels and dtypes")
        files.save(
            ["# Block sizes of the Triton kernels", *note, "", *rows],
            {
                "device": device.type,
                "complete": len(bandwidths) == len(pairs),
                "triton_blocks": data,
            },
        )
    files.print_paths()
    if save:
        write(triton_blocks.file(), choices, device, bandwidths)


def measure(
    kernel: str, dtype: torch.dtype, device: torch.device, repeat: int | None = None
) -> dict[Blocks, Spread]:
    """Return a kernel's bandwidth over a copy's, by choice."""
    comparison = KERNELS[kernel](Setting(device, "triton"), dtype)
    copy = comparison.references[0]
    [work] = comparison.library.phases

    def contender(choice: Blocks) -> Contender:
        def run() -> None:
            with triton_blocks.forcing(choice):
                work.run()

        return Contender(str(choice), (Phase(work.prepare, run),), comparison.library.result)

    contenders = [*map(contender, CHOICES), copy.contender]
    timings = interleave(contenders, clock(comparison.clock, device), repeat=repeat)
    copy_seconds = [copy.scale * timing.seconds for timing in timings[copy.contender.name]]

    def ratios(choice: Blocks) -> list[float]:
        pairs = zip(copy_seconds, timings[str(choice)], strict=True)
        return [seconds / timing.seconds for seconds, timing in pairs]

    return {choice: Spread.of(ratios(choice)) for choice in CHOICES}


def best(spreads: Mapping[Blocks, Spread]) -> Blocks:
    """Return the fastest choice if its lower quartile is above the default's upper quartile.

    Return the default otherwise.

    Args:
        spreads: bandwidths by choice; the default is one of the choices.
    """
    default = Blocks()
    fastest = max(spreads, key=lambda choice: spreads[choice].median)
    return fastest if spreads[fastest].low > spreads[default].high else default


def write(
    path: Path, choices: triton_blocks.Saved, device: torch.device, bandwidths: Bandwidths
) -> None:
    """Write a file with the choices saved before, and those better than the default for a device.

    Raises:
        UserError: the file cannot be written.
    """
    by_kernel = choices[triton_blocks.name_of(device)] = {}
    for (kernel, dtype), spreads in bandwidths.items():
        if (choice := best(spreads)) != Blocks():
            by_kernel.setdefault(kernel, {})[dtype] = choice
    output_folder(path.parent)
    replace_text(path, json.dumps(choices, default=asdict, indent=1) + "\n")
    print(f"wrote {path}")
