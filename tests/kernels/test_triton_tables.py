"""How tensors are cut into chunks, and when a table is used again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eigenfilter import _core
from eigenfilter.kernels.triton import tables as triton_tables
from eigenfilter.kernels.triton.blocks import Blocks
from eigenfilter.kernels.triton.tables import BLOCKS_IN_CHUNK, cut, tables

BLOCK = 512
CHUNK = BLOCKS_IN_CHUNK * BLOCK
SIZES = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 0, CHUNK, CHUNK + 1, 3 * CHUNK + BLOCK + 7, 0])


def updated(x: list[torch.Tensor], g: list[torch.Tensor]) -> triton_tables.Tables:
    return tables("perturb", x[0], _core.check(["params", "grads"], [x, g], [True, False]))


def test_chunks_cover_every_tensor_once() -> None:
    tensor, first, length, _ = cut(SIZES, np.ones(SIZES.size, dtype=bool), BLOCK)
    for i, size in enumerate(SIZES):
        mine = tensor == i
        assert length[mine].sum() == size
        assert first[mine].tolist() == list(range(0, size, CHUNK))
        assert np.all(first[mine][:-1] + length[mine][:-1] == first[mine][1:])


def test_whole_blocks_of_aligned_tensors_are_wide() -> None:
    aligned = np.arange(SIZES.size) % 3 != 1
    tensor, _, length, wide = cut(SIZES, aligned, BLOCK)
    assert np.all(wide[~aligned[tensor]] == 0)
    whole = aligned[tensor]
    assert np.all(wide[whole] == length[whole] // BLOCK * BLOCK)


def test_offsets_beyond_32_bits() -> None:
    size = 2**33 + 5
    _, first, length, wide = cut(np.array([size]), np.array([True]), 2048)
    assert first.dtype == np.int64
    assert length.sum() == size
    assert first[-1] == 2**33
    assert length[-1] == 5
    assert wide.sum() == 2**33


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tensor_is_aligned_if_it_is_in_all_lists(dtype: torch.dtype) -> None:
    n = Blocks().elements(dtype)
    step = 16 // dtype.itemsize
    whole, shifted = (torch.zeros(n + step, dtype=dtype)[i : i + n] for i in (step, 1))
    x = [torch.zeros(n, dtype=dtype) for _ in range(2)]
    work = updated(x, [whole, shifted])
    assert work.chunks[dtype][3].tolist() == [n, 0]
    assert work.pointers.tolist() == [
        [t.data_ptr() for t in x],
        [whole.data_ptr(), shifted.data_ptr()],
    ]


def of(*tensors: torch.Tensor) -> triton_tables.Tables:
    return tables("norm", tensors[0], _core.check(["tensors"], [list(tensors)], [False]))


def test_tables_are_used_again() -> None:
    a, b = torch.zeros(2, 9)[:, :8]
    first = of(a, b)
    again = of(a, b)
    assert again.pointers is first.pointers
    assert again.chunks[torch.float32] is first.chunks[torch.float32]


def test_tensors_at_new_addresses_get_a_new_table_of_pointers_alone() -> None:
    a, b, c = torch.zeros(3, 8)
    first = of(a, b)
    perturbed = of(a, c)
    assert perturbed.pointers.tolist() == [[a.data_ptr(), c.data_ptr()]]
    assert perturbed.chunks[torch.float32] is first.chunks[torch.float32]


def test_resized_and_recast_tensors_get_a_new_table_of_chunks() -> None:
    a = torch.zeros(5000)
    assert of(a).chunks[torch.float32][2].sum() == 5000
    assert of(a[:4999]).chunks[torch.float32][2].sum() == 4999
    assert of(a.view(torch.bfloat16)[:5000]).chunks[torch.bfloat16][3, 0] == 4096


def test_tensors_of_several_dtypes_are_cut_apart_and_keep_their_numbers() -> None:
    sizes = (700, 5, 0, 9000)
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)
    x = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    g = [torch.zeros(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    work = updated(x, g)
    assert set(work.chunks) == set(dtypes)
    assert work.programs == sum(chunks.shape[1] for chunks in work.chunks.values())
    for dtype, (tensor, first, length, wide) in work.chunks.items():
        for i, size in enumerate(sizes):
            assert length[tensor == i].sum() == (size if dtypes[i] == dtype else 0)
        assert (wide % Blocks().elements(torch.bfloat16) == 0).all()
        assert (first[1:] > first[:-1]).logical_or(tensor[1:] > tensor[:-1]).all()


def test_the_tables_last_used_are_kept() -> None:
    tensor = torch.zeros(3)
    table = of(tensor).pointers
    for _ in range(100):
        of(torch.zeros(3))
        assert of(tensor).pointers is table
    others = [torch.zeros(3) for _ in range(100)]
    for other in others:
        of(other)
    assert of(tensor).pointers is not table
    assert len(triton_tables._recent._entries) <= 32


def test_lists_are_checked() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="grads"):
        updated([x], [])
