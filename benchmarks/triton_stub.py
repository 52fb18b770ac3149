"""A driver for Triton that launches nothing, for machines without a GPU.

All that comes before a launch is Triton's own, for an H100: Triton binds and specializes arguments,
compiles kernels to machine code with ptxas, and caches them. Tensors stay on the CPU. As no kernel
reads them, their addresses are as good as a GPU's.

It works with Triton 3.6 to 3.8, which call a driver in the same way.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from eigenfilter.kernels import dispatch
from eigenfilter.kernels import triton as modules
from eigenfilter.kernels.triton import device, launch

TARGET = GPUTarget("cuda", 90, 32)
VERSIONS = ((3, 6), (3, 7), (3, 8))


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: name of the function.
        grid: numbers of programs in every dimension.
        source: Triton's source of the kernel, with names, signature, constants and attributes.
        args: arguments of the function in order, constants among them.
        ptx: file of the assembly from which the machine code was made.
    """

    kernel: str
    grid: tuple[int, int, int]
    source: Any
    args: tuple[Any, ...]
    ptx: Path

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name."""
        return self.args[self.source.fn.arg_names.index(name)]


class StubDriver:
    """The methods that Triton calls of a driver.

    Args:
        on_launch: called with every launch, or None.
    """

    def __init__(self, on_launch: Callable[[Launch], None] | None) -> None:
        self.launches = 0
        self._on_launch = on_launch
        self._assembly: list[Path] = []
        self.utils = self
        self.launcher_cls = self._launcher

    @property
    def variants(self) -> int:
        """The number of kernels that Triton loaded, one for each specialization."""
        return len(self._assembly)

    # The device.

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    # The functions that Triton calls utils.

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(
        self, name: str, binary: bytes, *rest: object
    ) -> tuple[int, int, int, int, int]:
        """Return the module, the function, its registers, its spills, and the most threads.

        The function is the index of its assembly.
        """
        if not binary.startswith(b"\x7fELF"):
            raise RuntimeError(
                f"Triton did not compile {name} to machine code: check that its ptxas works"
            )
        return 1, len(self._assembly) - 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def keep_assembly(
        self, module: object, function: object, name: str, group: dict[str, str], *rest: object
    ) -> None:
        """A hook that Triton calls just before `load_binary`."""
        self._assembly.append(Path(group[f"{name}.ptx"]))

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            # Metadata, its lazy form and two hooks come before the arguments.
            self.launches += 1
            if self._on_launch is not None:
                args = rest[4:]
                name = source.fn.__name__
                self._on_launch(Launch(name, (x, y, z), source, args, self._assembly[function]))

        return launch


def _allow(device_type: str) -> None:
    """Accept any device."""


def _forget(kernels: Sequence[JITFunction[Any]]) -> None:
    """Drop the compiled kernels, which belong to one driver."""
    for kernel in kernels:
        kernel.device_caches.clear()


def _kernels() -> list[JITFunction[Any]]:
    names = [module.name for module in pkgutil.iter_modules(modules.__path__)]
    loaded = [importlib.import_module(f"{modules.__name__}.{name}") for name in names]
    return [f for module in loaded for f in vars(module).values() if isinstance(f, JITFunction)]


@contextlib.contextmanager
def installed(on_launch: Callable[[Launch], None] | None = None) -> Iterator[StubDriver]:
    """A context in which a `StubDriver` launches the Triton kernels, for CPU tensors.

    Args:
        on_launch: called with every launch, or None.

    Raises:
        RuntimeError: this version of Triton was not tried, or Triton interprets kernels.
    """
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version not in VERSIONS:
        raise RuntimeError(
            f"triton {triton.__version__} was not tried with the stub driver: see whether its "
            "tests pass, and add it to VERSIONS in benchmarks/triton_stub.py"
        )
    if not isinstance(device.chunk, JITFunction):
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET")
    kernels, before = _kernels(), driver._active
    stub = StubDriver(on_launch)
    _forget(kernels)
    driver.set_active(stub)
    knobs.runtime.kernel_load_start_hook.add(stub.keep_assembly)
    try:
        with (
            mock.patch.object(launch, "require", _allow),
            mock.patch.object(launch, "_INTERPRETED", True),  # no device becomes the current one
        ):
            yield stub
    finally:
        _forget(kernels)
        dispatch._choose.cache_clear()
        knobs.runtime.kernel_load_start_hook.remove(stub.keep_assembly)
        driver.set_active(before)
