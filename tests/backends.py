"""Selection of the implementation under test by EIGENFILTER_TEST_BACKEND.

    installed   all backends of the installed extension on this machine (the default)
    emulated    the CUDA kernels, run on the CPU by the emulator of `cuda_on_cpu`;
                `emulated-address` and `emulated-thread`: under a sanitizer
    interpreted the Triton kernels, run on the CPU by triton's interpreter

The last two are selected at import, for a whole process: import this module before eigenfilter.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import interpreter

NAME = os.environ.get("EIGENFILTER_TEST_BACKEND", "installed")
SANITIZERS = {
    "emulated": "none",
    "emulated-address": "address",
    "emulated-thread": "thread",
}
EMULATED = NAME in SANITIZERS
INTERPRETED = NAME == "interpreted"


def _choose() -> None:
    """Put the chosen implementation in place.

    Raises:
        RuntimeError: an unknown name, or the emulated extension was not built.
    """
    if INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
        interpreter.mend()
    elif EMULATED:
        built = Path(__file__).parents[1] / "build" / "emulated" / SANITIZERS[NAME] / "_core.so"
        _load(Path(os.environ.get("EIGENFILTER_EMULATED", built)))
    elif NAME != "installed":
        raise RuntimeError(f"EIGENFILTER_TEST_BACKEND={NAME}: see tests/backends.py")


def _load(extension: Path) -> None:
    """Make an extension eigenfilter's own."""
    if not extension.exists():
        raise RuntimeError(f"{extension} is not there: run make emulated")
    if any(name.partition(".")[0] == "eigenfilter" for name in sys.modules):
        raise RuntimeError("eigenfilter was imported before the emulated extension was loaded")
    name = "eigenfilter._core"
    loader = importlib.machinery.ExtensionFileLoader(name, str(extension))
    spec = importlib.util.spec_from_file_location(name, extension, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    if module.cuda_device_type != "cpu":
        raise RuntimeError(f"{extension} runs no CUDA kernels on the CPU: run make emulated")


_choose()
