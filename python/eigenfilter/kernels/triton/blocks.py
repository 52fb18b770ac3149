"""Block sizes of the Triton kernels: bytes of a block, warps of a program.

The default is chosen from machine code. `eigenfilter bench triton-blocks --device cuda --save`
times other sizes on a GPU, kernel by kernel, and writes the faster ones into the file `file()`.
Every later process reads them from there, and logs this once.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from eigenfilter.kernels._op import OPERATIONS

VARIABLE = "EIGENFILTER_TRITON_BLOCKS"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Sizes for one kernel.

    A block is 4 KiB of every tensor by default: two 16-byte accesses a thread with 4 warps of 32,
    one with 4 warps of 64. That keeps enough accesses in flight at full occupancy, and leaves
    registers for four lists.

    Attributes:
        bytes: bytes of every tensor in a block, a power of 2 in [512, 65536].
        warps: warps of a program, a power of 2 in [1, 32].

    Raises:
        ValueError: either is out of its range.
    """

    bytes: int = 4096
    warps: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (("bytes", 512, 65536), ("warps", 1, 32)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high or value & (value - 1):
                raise ValueError(f"{name} must be a power of 2 in [{low}, {high}], not {value!r}")

    def elements(self, dtype: torch.dtype) -> int:
        """The number of elements in a block."""
        return self.bytes // dtype.itemsize


Saved = dict[str, dict[str, dict[str, Blocks]]]
"""Sizes by device, kernel and dtype."""


def file() -> Path:
    """The file of saved sizes: EIGENFILTER_TRITON_BLOCKS, or triton-blocks.json in ~/.cache."""
    usual = Path.home() / ".cache" / "eigenfilter" / "triton-blocks.json"
    return Path(os.environ.get(VARIABLE) or usual)


def read(path: Path) -> Saved:
    """Return the saved sizes; none if there is no file, or an empty one.

    Raises:
        ValueError: the file holds something else, names kernels or dtypes that there are not, or
            cannot be read.
    """
    if not path.exists():
        return {}
    try:
        saved = {
            device: {
                kernel: {dtype: Blocks(**sizes) for dtype, sizes in by_dtype.items()}
                for kernel, by_dtype in by_kernel.items()
            }
            for device, by_kernel in json.loads(path.read_text() or "{}").items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no sizes of blocks: delete it ({error})") from error
    if unknown := sorted(_unknown_names(saved)):
        raise ValueError(
            f"{path} has block sizes for {', '.join(unknown)}, which no Triton kernel has. "
            "Delete these entries, or the file, and save the sizes again with eigenfilter bench "
            "triton-blocks --device cuda --save"
        )
    return saved


def kernels() -> list[str]:
    """The names of the kernels that work in blocks: the operations on lists of tensors."""
    return [name for name, operation in OPERATIONS.items() if operation.takes_lists]


def _unknown_names(saved: Saved) -> set[str]:
    """Return the names of kernels and dtypes that no kernel would look for."""
    unknown = set()
    for by_kernel in saved.values():
        unknown |= by_kernel.keys() - set(kernels())
        for by_dtype in by_kernel.values():
            unknown |= by_dtype.keys() - set(map(str, DTYPES))
    return unknown


def name_of(device: torch.device) -> str:
    """The name of the kind of device that sizes are saved for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def blocks_for(kernel: str, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Return the saved sizes for a kernel over tensors of `dtype`, or the default.

    Raises:
        ValueError: the file holds something else.
    """
    return _forced[-1] if _forced else _usual(kernel, dtype, device)


@contextmanager
def forcing(blocks: Blocks) -> Iterator[None]:
    """A context in which every kernel uses these sizes."""
    _forced.append(blocks)
    try:
        yield
    finally:
        _forced.pop()


_forced: list[Blocks] = []


@functools.cache
def _usual(kernel: str, dtype: torch.dtype, device: torch.device) -> Blocks:
    return _saved(name_of(device)).get(kernel, {}).get(str(dtype), Blocks())


@functools.cache
def _saved(name: str) -> dict[str, dict[str, Blocks]]:
    if VARIABLE in os.environ and not file().exists():
        raise ValueError(f"{VARIABLE} names {file()}, and there is no such file")
    sizes = read(file()).get(name, {})
    if sizes:
        _logger.info("the sizes of Triton's blocks on %s are those of %s", name, file())
    return sizes
