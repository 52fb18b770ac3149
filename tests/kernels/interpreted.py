"""Tests of the Triton kernels under TRITON_INTERPRET=1; `test_triton_interpreter.py` runs them.

Every call gets several tensors: of sizes below, at and above the blocks and chunks, aligned to 16
bytes or not. Memory that a kernel has to overwrite, and all around its tensors, is NaN before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eigenfilter.kernels import reference, triton_device, triton_kernels
from eigenfilter.kernels.triton_tables import BLOCKS_IN_CHUNK, block_size

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Distance of each list's tensor from a 16-byte boundary, in bytes.
ALIGNED = (0, 0, 0, 0)
UNALIGNED = ((4, 4, 4, 4), (8, 0, 8, 0), (0, 12, 0, 8), (0, 0, 4, 0), (2, 6, 2, 2), (0, 2, 0, 0))
MARGIN = 16  # elements before and after a tensor


class Lists:
    """Lists of NaN tensors of equal sizes, each tensor with a margin of NaN around it."""

    def __init__(self, dtype: torch.dtype, lists: int) -> None:
        block = block_size(dtype)
        chunk = BLOCKS_IN_CHUNK * block
        whole = (0, 1, 7, block // 4, block - 1, block, block + 1, chunk, chunk + block + 3)
        places = [(size, ALIGNED) for size in whole]
        places += [(block + 5, shift) for shift in UNALIGNED] + [(chunk + 5, UNALIGNED[1])]
        places = [p for p in places if all(byte % dtype.itemsize == 0 for byte in p[1])]
        self._rooms = [
            [torch.full((size + 2 * MARGIN,), torch.nan, dtype=dtype) for size, _ in places]
            for _ in range(lists)
        ]
        self.lists = [
            [
                room[MARGIN + shift[i] // dtype.itemsize :][:size]
                for room, (size, shift) in zip(rooms, places, strict=True)
            ]
            for i, rooms in enumerate(self._rooms)
        ]
        assert all(room.data_ptr() % 16 == 0 for rooms in self._rooms for room in rooms)

    def fill(self, *lists: int) -> None:
        for i in lists:
            for t in self.lists[i]:
                t.normal_()

    def copy(self) -> list[list[Tensor]]:
        return [[t.clone() for t in tensors] for tensors in self.lists]

    def check_margins(self) -> None:
        for rooms, tensors in zip(self._rooms, self.lists, strict=True):
            for room, t in zip(rooms, tensors, strict=True):
                assert room[: t.storage_offset()].isnan().all()
                assert room[t.storage_offset() + t.numel() :].isnan().all()


@dataclass(frozen=True)
class Case:
    """What a call is given beside its tensors; `kind` is how it is given hyperparameters."""

    momenta: bool = False
    backups: bool = False
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    scale: float | None = None
    found: float | None = None
    kind: str = "float"

    def scalar(self, value: float) -> float | Tensor:
        if self.kind == "float":
            return value
        return torch.tensor(value, dtype=getattr(torch, self.kind))

    def flags(self) -> dict[str, Tensor | None]:
        return {
            "grad_scale": None if self.scale is None else torch.tensor(self.scale),
            "found_inf": None if self.found is None else torch.tensor([self.found]),
        }


ASCENTS = [
    Case(),
    Case(kind="float32", scale=3.7),
    Case(kind="float64", scale=3.7, found=0.0),
    Case(kind="float64", found=0.0),
    Case(scale=3.7, found=1.0),
]
DESCENTS = [
    Case(),
    Case(weight_decay=0.07, scale=3.7, kind="float64"),
    Case(backups=True, maximize=True, found=0.0),
    Case(backups=True, weight_decay=0.07, scale=3.7, found=1.0),
    Case(momenta=True, dampening=0.3, kind="float32"),
    Case(momenta=True, dampening=0.3, weight_decay=0.07, scale=3.7, found=1.0),
    Case(momenta=True, backups=True, maximize=True, scale=3.7, kind="float64"),
    Case(momenta=True, backups=True, dampening=0.3, weight_decay=0.07, found=0.0, kind="float32"),
    Case(momenta=True, nesterov=True, weight_decay=0.07),
    Case(momenta=True, nesterov=True, backups=True, maximize=True, scale=3.7, found=0.0),
    Case(momenta=True, nesterov=True, backups=True, weight_decay=0.07, scale=3.7, kind="float64"),
    Case(momenta=True, nesterov=True, backups=True, weight_decay=0.07, scale=3.7, found=1.0),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def bits(t: Tensor) -> Tensor:
    return t.view(BITS[t.element_size()])


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], *, exact: bool) -> None:
    """Compare bit for bit or, in bfloat16 and not `exact`, to one unit in the last place.

    The interpreter cuts float32 off to bfloat16 where it should round.
    """
    for a, e in zip(actual, expected, strict=True):
        distance = (bits(a).long() - bits(e).long()).abs()
        allowed = 1 if a.dtype == torch.bfloat16 and not exact else 0
        assert (distance <= allowed).all()


@pytest.mark.parametrize("case", ASCENTS, ids=str)
def test_ascend(dtype: torch.dtype, case: Case) -> None:
    memory = Lists(dtype, 3)
    memory.fill(0, 1)
    params, grads, backups = memory.lists
    x, g, b = memory.copy()
    triton_kernels.ascend(params, grads, backups, case.scalar(-0.137), **case.flags())
    reference.ascend(x, g, b, case.scalar(-0.137), **case.flags())
    assert_same(params, x, exact=case.found == 1)
    assert_same(backups, b, exact=True)
    assert_same(grads, g, exact=True)
    memory.check_margins()


@pytest.mark.parametrize("case", DESCENTS, ids=str)
def test_descend(dtype: torch.dtype, case: Case) -> None:
    memory = Lists(dtype, 4)
    memory.fill(1, 2, 3 if case.backups else 0)
    x, g, m, b = memory.copy()
    for room, lists in ((triton_kernels, memory.lists), (reference, (x, g, m, b))):
        room.descend(
            lists[0],
            lists[1],
            lists[2] if case.momenta else None,
            lists[3] if case.backups else None,
            lr=case.scalar(0.313),
            momentum=case.scalar(0.87),
            dampening=case.scalar(case.dampening),
            weight_decay=case.scalar(case.weight_decay),
            nesterov=case.nesterov,
            maximize=case.maximize,
            **case.flags(),
        )
    params, grads, momenta, backups = memory.lists
    assert_same(params, x, exact=case.found == 1)
    assert_same(momenta, m, exact=case.found == 1)
    assert_same(grads, g, exact=True)
    assert_same(backups, b, exact=True)
    memory.check_margins()


def test_no_decay_is_no_multiplication_by_zero(dtype: torch.dtype) -> None:
    x = torch.full((5,), torch.inf, dtype=dtype)
    triton_kernels.descend([x], [torch.ones_like(x)], None, None, lr=0.3, weight_decay=0.0)
    assert x.isposinf().all()


def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    special = [torch.inf, -torch.inf, 0.0, -0.0, info.max, info.tiny, info.tiny / 4, torch.nan]
    memory = Lists(dtype, 3)
    memory.fill(1)
    params, grads, backups = memory.lists
    for x in params:
        values = torch.tensor(special * (x.numel() // len(special) + 1), dtype=dtype)
        payload = torch.arange(values.numel()) % 97
        bits(values).add_(payload.where(values.isnan(), 0).to(bits(values).dtype))
        x.copy_(values[: x.numel()])
    before = [x.clone() for x in params]
    triton_kernels.ascend(params, grads, backups, 1e-3, found_inf=torch.ones(()))
    assert_same(params, before, exact=True)
    triton_kernels.ascend(params, grads, backups, 1e-3)
    assert_same(backups, before, exact=True)
    triton_kernels.descend(params, grads, None, backups, lr=1e-3, found_inf=torch.ones(()))
    assert_same(params, before, exact=True)


def test_any_order_of_dimensions(dtype: torch.dtype) -> None:
    x, g, m = (torch.randn(2, 3, 5, 7, dtype=dtype).permute(0, 2, 3, 1) for _ in range(3))
    y, n = x.clone(), m.clone()
    triton_kernels.descend([x], [g], [m], None, lr=0.3, momentum=0.8)
    reference.descend([y], [g], [n], None, lr=0.3, momentum=0.8)
    assert_same([x.permute(0, 3, 1, 2)], [y.permute(0, 3, 1, 2)], exact=False)


@pytest.mark.parametrize("scale", [None, torch.tensor([3.7])])
def test_norm(dtype: torch.dtype, scale: Tensor | None) -> None:
    memory = Lists(dtype, 1)
    memory.fill(0)
    (tensors,) = memory.lists
    out = torch.full((), torch.nan, dtype=reference.arithmetic_dtype(dtype))
    triton_kernels.norm(tensors, out, grad_scale=scale)
    expected = torch.cat(tensors).double().norm() / (1 if scale is None else scale.double())
    torch.testing.assert_close(
        out, expected.to(out.dtype).reshape(()), rtol=4 * torch.finfo(out.dtype).eps, atol=0
    )
    again = torch.empty_like(out)
    triton_kernels.norm([t.clone() for t in tensors], again, grad_scale=scale)
    assert torch.equal(out, again), "alignment changed the order of the sum"


def test_norm_sums_more_chunks_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_device, "NORM_BLOCK", 4)
    t = torch.randn(9 * BLOCKS_IN_CHUNK * block_size(torch.float32))
    out = torch.empty(())
    triton_kernels.norm([t], out)
    torch.testing.assert_close(out, t.double().norm().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_nonfinite_element_is_found_anywhere(dtype: torch.dtype, bad: float) -> None:
    memory = Lists(dtype, 1)
    memory.fill(0)
    (tensors,) = memory.lists
    for t in tensors[1:]:
        for index in {0, t.numel() // 2, t.numel() - 1}:
            found, good = torch.zeros(1), t[index].clone()
            t[index] = bad
            triton_kernels.flag_nonfinite([tensors[0], t], found)
            t[index] = good
            assert found == 1


@pytest.mark.parametrize("before", [0.0, 1.0])
def test_finite_elements_leave_the_flag(dtype: torch.dtype, before: float) -> None:
    memory = Lists(dtype, 1)
    memory.fill(0)
    memory.lists[0][1][0] = torch.finfo(dtype).max
    memory.lists[0][-1][-1] = torch.finfo(dtype).min
    found = torch.tensor([before])
    triton_kernels.flag_nonfinite(memory.lists[0], found)
    assert found == before


def test_empty_tensors_alone(dtype: torch.dtype) -> None:
    empty = [torch.zeros(0, dtype=dtype), torch.zeros(0, 3, dtype=dtype)]
    triton_kernels.ascend(empty, empty, empty, 0.1)
    triton_kernels.descend(empty, empty, empty, empty, lr=0.1)
    found, out = torch.zeros(1), torch.empty((), dtype=reference.arithmetic_dtype(dtype))
    triton_kernels.flag_nonfinite(empty, found)
    triton_kernels.norm(empty, out)
    assert found == 0
    assert out == 0


def test_wrong_arguments_change_nothing() -> None:
    x, g, b = (torch.randn(4) for _ in range(3))
    before = x.clone(), b.clone()
    double = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match="backups"):
        triton_kernels.ascend([x], [g], [], 0.1)
    with pytest.raises(TypeError, match="alpha must be a number"):
        triton_kernels.ascend([x], [g], [b], torch.tensor(1))
    with pytest.raises(ValueError, match="alpha is on meta"):
        triton_kernels.ascend([x], [g], [b], torch.tensor(0.1, device="meta"))
    with pytest.raises(ValueError, match=r"found_inf must be a .*float32 tensor"):
        triton_kernels.ascend([x], [g], [b], 0.1, found_inf=double)
    with pytest.raises(ValueError, match=r"grad_scale must be a .*float32 tensor"):
        triton_kernels.descend([x], [g], None, [b], lr=0.1, grad_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"out must be a .*float32 tensor"):
        triton_kernels.norm([x], double)
    assert_same([x, b], before, exact=True)
