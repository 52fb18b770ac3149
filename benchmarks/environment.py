"""What figures depend on: versions, compiler, processor, load."""

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
from eigenfilter.kernels import triton_blocks

ROOT = Path(__file__).resolve().parents[1]
"""Of the checkout."""


def own_process() -> dict[str, str]:
    """The environment of a process that runs a module of the benchmarks, in whatever folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def describe(device: torch.device) -> dict[str, Any]:
    """Return the environment of a run, as it stands at its beginning."""
    found: dict[str, Any] = {
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
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cuda_architectures": _core.cuda_architectures,
            "triton_blocks": _triton_blocks(device),
        }
    return found


def _triton_blocks(device: torch.device) -> str:
    """Whose sizes of blocks the Triton kernels have."""
    file = triton_blocks.file()
    saved = triton_blocks.name_of(device) in triton_blocks.read(file)
    return f"those of {file}" if saved else "the default"


def load() -> float:
    """Return how many processes have wanted a core over the last minute."""
    return round(os.getloadavg()[0], 2)


class Neighbours:
    """How many cores others keep busy from now on: half of one spoils what several threads do."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._others = _others_seconds()

    def cores(self) -> float:
        """Return the mean number of cores; NaN where the system does not tell."""
        elapsed = time.perf_counter() - self._began
        return round(max(_others_seconds() - self._others, 0.0) / elapsed, 2)


def _others_seconds() -> float:
    """Processor time of everybody else since the system started, stolen time included."""
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
    """The compiler of the core, which leaves its name in what it compiles."""
    found = re.search(
        rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(_core.__file__).read_bytes()
    )
    return found.group().decode() if found else "unknown"


def _cpu() -> str:
    """The processor's name and, where it has them, its family and model."""
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
