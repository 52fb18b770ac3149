"""Checks that a launch of a Triton kernel fits its signature, its assembly and its tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.triton_stub import Launch
from eigenfilter.kernels.triton.blocks import Blocks
from eigenfilter.kernels.triton.tables import BLOCKS_IN_CHUNK

POINTEES = {
    "*fp64": torch.float64,
    "*fp32": torch.float32,
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*i64": torch.int64,
    "*i32": torch.int32,
}
# Types of parameters in assembly.
IN_PTX = {"i32": ("u32", "b32"), "i64": ("u64", "b64"), "fp64": ("f64", "b64")}
SCRATCH = 2  # pointers that Triton gives every kernel after its own


def assert_arguments_fit(launch: Launch) -> None:
    """Fail unless the arguments fit the signature, and the code was compiled for them."""
    source = launch.source
    assert list(source.signature) == source.fn.arg_names
    assert len(launch.args) == len(source.signature)
    for i, (kind, value) in enumerate(zip(source.signature.values(), launch.args, strict=True)):
        where = f"{launch.kernel}: {source.fn.arg_names[i]}"
        if kind == "constexpr":
            assert source.constants[(i,)] == value, where
        elif kind.startswith("*"):
            assert value.dtype == POINTEES[kind], where
        elif kind == "fp64":
            assert type(value) is float, where
        else:
            bits = int(kind.removeprefix("i"))
            assert type(value) is int, where
            assert -(2 ** (bits - 1)) <= value < 2 ** (bits - 1), where
        if ["tt.divisibility", 16] in source.attrs.get((i,), []):
            number = value.data_ptr() if isinstance(value, Tensor) else value
            assert number % 16 == 0, where
    passed = [kind for kind in source.signature.values() if kind != "constexpr"]
    result = parameters(launch.ptx, launch.kernel)
    assert len(result) == len(passed) + SCRATCH
    for kind, parameter in zip(passed + ["*"] * SCRATCH, result, strict=True):
        assert parameter in IN_PTX.get(kind, ("u64", "b64")), launch.kernel
    x, y, z = launch.grid
    assert 0 < x < 2**31
    assert 0 < y < 2**16
    assert z == 1


def parameters(ptx: Path, kernel: str) -> list[str]:
    """The types of a kernel's parameters in its PTX, where its name is not mangled."""
    entry = re.search(rf"\.visible \.entry {kernel}\((.*?)\)", ptx.read_text(), re.DOTALL)
    assert entry is not None
    return re.findall(r"\.param \.(\w+)", entry[1])


def assert_tables_cover(
    launches: Sequence[Launch], lists: Sequence[Sequence[Tensor]], gradients: Sequence[Tensor]
) -> None:
    """Fail unless the programs of a call's launches have every element of its tensors once.

    Args:
        launches: one for each dtype of gradients.
        lists: those given, in the order of the table.
        gradients: that list of them whose dtype may differ.
    """
    for launch in launches:
        pointers, chunks = launch["pointers"], launch["chunks"]
        assert pointers.tolist() == [[t.data_ptr() for t in tensors] for tensors in lists]
        assert launch["n"] == len(lists[0])
        assert launch.grid == (chunks.shape[1], 1, 1)
    ranges: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(gradients))}
    for launch in launches:
        block = Blocks().elements(dtype_of(launch["DTYPE"]))
        assert launch["BLOCK"] == block
        for i, first, length, wide in launch["chunks"].T.tolist():
            ranges[i].append((first, length))
            assert 0 < length <= BLOCKS_IN_CHUNK * block
            assert gradients[i].dtype == dtype_of(launch["GRAD"])
            starts = [t[i].data_ptr() + first * t[i].element_size() for t in lists]
            aligned = all(t[i].data_ptr() % 16 == 0 for t in lists)
            assert wide == (length // block * block if aligned else 0)
            assert not wide or all(start % 16 == 0 for start in starts)
    for i, parts in ranges.items():
        ends = [first + length for first, length in sorted(parts)]
        assert [first for first, _ in sorted(parts)] == [0, *ends][: len(parts)]
        assert (ends or [0])[-1] == gradients[i].numel()


def dtype_of(constant: Any) -> torch.dtype:
    """torch's name of a Triton type."""
    return POINTEES[f"*{constant.name}"]
