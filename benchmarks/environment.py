"""What measurements depend on: versions, compiler, processor, load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import eigenfilter
from eigenfilter import _core
from eigenfilter.experiments.errors import UserError
from eigenfilter.kernels.triton import blocks as triton_blocks

ROOT = Path(__file__).resolve().parents[1]
"""The root of the checkout."""


def subprocess_environment() -> dict[str, str]:
    """Environment variables for a process that runs a module of the benchmarks, in any folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def describe(device: torch.device) -> dict[str, Any]:
    """Return the environment of a run, as it is at the beginning of the run."""
    description: dict[str, Any] = {
        "eigenfilter": eigenfilter.__version__,
        "revision": _revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _compiler(),
        "isa": _core.isa(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
    }
    if device.type == "cuda":
        description |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cuda_architectures": _core.cuda_architectures,
            "triton_blocks": _triton_blocks(device),
        }
    return description


def _triton_blocks(device: torch.device) -> str:
    """Return where the block sizes of the Triton kernels come from.

    Raises:
        UserError: the file of saved sizes is damaged or out of date.
    """
    file = triton_blocks.file()
    try:
        has_choices = triton_blocks.name_of(device) in triton_blocks.read(file)
    except ValueError as error:
        raise UserError(str(error)) from error
    return f"those of {file}" if has_choices else "the default"


def load() -> float:
    """Return the load average: how many processes wanted a core over the last minute."""
    return round(os.getloadavg()[0], 2)


class MachineLoad:
    """The load that other processes put on the machine from now on.

    Half a core is enough to distort the time of work on several threads.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._other_seconds = _other_cpu_seconds()

    def busy_cores(self) -> float:
        """Return the mean number of cores that others kept busy; NaN if the system hides it."""
        elapsed = time.perf_counter() - self._start
        return round(max(_other_cpu_seconds() - self._other_seconds, 0.0) / elapsed, 2)


def _other_cpu_seconds() -> float:
    """Processor time of all other processes since the system started, stolen time included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return float("nan")
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def _revision() -> str:
    """The commit that is checked out, with a "+" if there are changes; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _compiler() -> str:
    """The compiler of the extension, which leaves its name in the compiled file."""
    match = re.search(
        rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(_core.__file__).read_bytes()
    )
    return match.group().decode() if match else "unknown"


def _cpu() -> str:
    """The processor's name, with family and model if the system reports them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields: dict[str, str] = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE)
    )
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name
