"""The compiled extension with CUDA launches that run nothing, for machines without a GPU.

All that comes before a launch is the host code of csrc, compiled as for the installed extension: it
reads and checks arguments, fills batches, selects kernels, and copies arguments as a driver has to.
Tensors stay on the CPU; the code treats them as a GPU's. `make bench-host` builds the extension.

    python -P benchmarks/native_stub.py EXTENSION COMMAND...

runs a command of eigenfilter with this extension in place of the installed one. It has to be a
program of its own, because a process keeps the first extension that it loads.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EXTENSION = Path(__file__).resolve().parents[1] / "build" / "host" / "_core.so"
"""The file that `make bench-host` writes."""

COUNTERS = ("eigenfilter_launches", "eigenfilter_argument_bytes")


def is_loaded() -> bool:
    """Whether this process has loaded the extension without launches."""
    from eigenfilter import _core

    return hasattr(ctypes.CDLL(_core.__file__), COUNTERS[0])


def counts() -> tuple[int, int]:
    """The number of launches of this process so far, and the bytes of their arguments."""
    from eigenfilter import _core

    library = ctypes.CDLL(_core.__file__)
    launches, argument_bytes = (getattr(library, name) for name in COUNTERS)
    launches.restype = argument_bytes.restype = ctypes.c_uint64
    return launches(), argument_bytes()


def run(extension: Path, command: Sequence[str]) -> int:
    """Run a command of eigenfilter with an extension in a new process; return its exit code."""
    program = [sys.executable, "-P", __file__, str(extension), *command]
    return subprocess.run(program).returncode


def load(extension: Path | str) -> None:
    """Load an extension as `eigenfilter._core`; eigenfilter must not have been imported yet."""
    import torch  # noqa: F401  (first: the extension then shares torch's OpenMP pool)

    name = "eigenfilter._core"
    loader = importlib.machinery.ExtensionFileLoader(name, str(extension))
    spec = importlib.util.spec_from_file_location(name, extension, loader=loader)
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[name])


if __name__ == "__main__":
    load(sys.argv[1])
    from eigenfilter.experiments.cli import main

    sys.exit(main(sys.argv[2:]))
