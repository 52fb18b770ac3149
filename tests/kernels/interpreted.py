"""Tests of the Triton kernels under TRITON_INTERPRET=1; `test_triton_interpreter.py` runs them.

Every call gets several tensors: of sizes below, at and above the blocks and chunks, aligned to 16
bytes or not. Memory that a kernel has to overwrite, and all around its tensors, is NaN before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenfilter.kernels import reference, triton_device, triton_kernels
from eigenfilter.kernels.triton_blocks import Blocks
from eigenfilter.kernels.triton_tables import BLOCKS_IN_CHUNK
from refusals import KERNELS, refused, spoilt

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A parameter's dtype, the wider one of its gradients, and a size that the latter alone holds.
WIDE = {
    "bfloat16": (torch.bfloat16, torch.float32, 3.4e38),
    "float16": (torch.float16, torch.float32, 1e5),
    "float32": (torch.float32, torch.float64, 1e39),
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Distance of each list's tensor from a 16-byte boundary, in bytes.
ALIGNED = (0, 0, 0, 0, 0)
UNALIGNED = (
    (4, 4, 4, 4, 4),
    (8, 0, 8, 0, 8),
    (0, 12, 0, 8, 0),
    (0, 0, 4, 0, 0),
    (0, 0, 0, 0, 8),
    (2, 6, 2, 2, 2),
    (0, 2, 0, 0, 0),
)
MARGIN = 16  # elements before and after a tensor


class Lists:
    """Lists of NaN tensors of equal sizes, each tensor with a margin of NaN around it."""

    def __init__(self, dtype: torch.dtype, lists: int) -> None:
        block = Blocks().elements(dtype)
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

    adaptive: bool = False
    momenta: bool = False
    backups: bool = False
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    step: float = 1
    seed: float | None = None
    scale: float | None = None
    found: float | None = None
    kind: str = "float"

    def scalar(self, value: float) -> float | Tensor:
        if self.kind == "float":
            return value
        return torch.tensor(value, dtype=getattr(torch, self.kind))

    def rounding(self) -> dict[str, float | Tensor | None]:
        return {"rounding_seed": None if self.seed is None else self.scalar(self.seed)}

    @property
    def exact(self) -> bool:
        """Whether the interpreter has nothing to round: see `assert_same`."""
        return self.found == 1 or self.seed is not None

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
    Case(adaptive=True),
    Case(adaptive=True, kind="float64", scale=3.7, found=0.0),
    Case(adaptive=True, kind="float32", found=1.0),
]
ASCENTS_AGAIN = [
    Case(),
    Case(kind="float32", scale=3.7, found=0.0),
    Case(scale=3.7, found=1.0),
    Case(backups=True),
    Case(backups=True, kind="float64", scale=3.7, found=0.0),
    Case(backups=True, scale=3.7, found=1.0),
]
ASCENTS_HVP = [
    Case(),
    Case(kind="float32", scale=3.7),
    Case(kind="float64", scale=3.7, found=0.0),
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
    Case(weight_decay=0.07, seed=0.0),
    Case(momenta=True, backups=True, dampening=0.3, seed=77.0, scale=3.7, kind="float64"),
    Case(momenta=True, nesterov=True, seed=2.0**24 - 1, found=0.0, kind="float32"),
    Case(momenta=True, backups=True, seed=77.0, found=1.0),
    Case(momenta=True, nesterov=True, backups=True, maximize=True, scale=3.7, found=0.0),
    Case(momenta=True, nesterov=True, backups=True, weight_decay=0.07, scale=3.7, kind="float64"),
    Case(momenta=True, nesterov=True, backups=True, weight_decay=0.07, scale=3.7, found=1.0),
]
ADAMW_DESCENTS = [
    Case(),
    Case(step=2**24, weight_decay=0.07, scale=3.7, kind="float32"),
    Case(step=7, maximize=True, found=0.0, kind="float64"),
    Case(step=1000, weight_decay=0.07, scale=3.7, found=1.0),
    Case(step=7, weight_decay=0.07, seed=77.0),
    Case(backups=True, step=7, seed=2.0**24 - 1, scale=3.7, found=0.0, kind="float32"),
    Case(backups=True, step=7, seed=77.0, found=1.0),
    Case(backups=True, weight_decay=0.07, scale=3.7, kind="float64"),
    Case(backups=True, step=341, weight_decay=0.07, maximize=True, scale=3.7, found=0.0),
    Case(backups=True, step=7, weight_decay=0.07, scale=3.7, found=1.0, kind="float64"),
]


ADAMW: dict[str, Any] = {
    "lr": 0.1,
    "beta1": 0.8,
    "beta2": 0.7,
    "eps": 1e-3,
    "weight_decay": 0.2,
    "step": 3,
}


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

    The interpreter cuts float32 off to bfloat16 where it should round; what was rounded
    stochastically fits.
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
    for room, lists in ((triton_kernels, (params, grads, backups)), (reference, (x, g, b))):
        room.ascend(*lists, case.scalar(-0.137), adaptive=case.adaptive, **case.flags())
    assert_same(params, x, exact=case.found == 1)
    assert_same(backups, b, exact=True)
    assert_same(grads, g, exact=True)
    memory.check_margins()


@pytest.mark.parametrize("case", ASCENTS_AGAIN, ids=str)
def test_ascend_again(dtype: torch.dtype, case: Case) -> None:
    memory = Lists(dtype, 3)
    memory.fill(1, 2 if case.backups else 0)
    params, grads, backups = memory.lists
    x, g, b = memory.copy()
    for room, lists in ((triton_kernels, (params, grads, backups)), (reference, (x, g, b))):
        origin = lists[2] if case.backups else None
        room.ascend_again(lists[0], lists[1], case.scalar(0.137), origin, **case.flags())
    assert_same(params, x, exact=case.found == 1)
    assert_same(grads, g, exact=True)
    assert_same(backups, b, exact=True)
    memory.check_margins()


@pytest.mark.parametrize("case", ASCENTS_HVP, ids=str)
def test_ascend_hvp(dtype: torch.dtype, case: Case) -> None:
    memory = Lists(dtype, 4)
    memory.fill(1, 2, 3)
    copies = memory.copy()
    for room, lists in ((triton_kernels, memory.lists), (reference, copies)):
        room.ascend_hvp(*lists, case.scalar(-0.137), case.scalar(0.0213), **case.flags())
    assert_same(memory.lists[0], copies[0], exact=case.found == 1)
    for read, before in zip(memory.lists[1:], copies[1:], strict=True):
        assert_same(read, before, exact=True)
    memory.check_margins()


@pytest.mark.parametrize("backups", [False, True])
def test_where_ascents_stop_parameters_keep_their_values(dtype: torch.dtype, backups: bool) -> None:
    memory = Lists(dtype, 4)
    memory.fill(0, 1, 2, 3)
    params, grads, base_grads, saved = memory.lists
    before = [x.clone() for x in params]
    found = torch.ones(())
    origin = saved if backups else None
    triton_kernels.ascend_again(params, grads, 0.137, origin, found_inf=found)
    triton_kernels.ascend_hvp(params, grads, base_grads, saved, 0.137, 0.0213, found_inf=found)
    assert_same(params, before, exact=True)


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
            **case.rounding(),
            **case.flags(),
        )
    params, grads, momenta, backups = memory.lists
    assert_same(params, x, exact=case.exact)
    assert_same(momenta, m, exact=case.exact)
    assert_same(grads, g, exact=True)
    assert_same(backups, b, exact=True)
    memory.check_margins()


@pytest.mark.parametrize("case", ADAMW_DESCENTS, ids=str)
def test_descend_adamw(dtype: torch.dtype, case: Case) -> None:
    memory = Lists(dtype, 5)
    memory.fill(1, 4 if case.backups else 0)
    if case.step > 1:
        memory.fill(2, 3)
        for v in memory.lists[3]:
            v.square_()
    else:
        for t in memory.lists[2] + memory.lists[3]:
            t.zero_()
    copies = memory.copy()
    for room, lists in ((triton_kernels, memory.lists), (reference, copies)):
        room.descend_adamw(
            *lists[:4],
            lists[4] if case.backups else None,
            lr=case.scalar(0.0313),
            beta1=case.scalar(0.87),
            beta2=case.scalar(0.9937),
            eps=case.scalar(1.7e-5),
            weight_decay=case.scalar(case.weight_decay),
            step=case.scalar(case.step),
            maximize=case.maximize,
            **case.rounding(),
            **case.flags(),
        )
    for i in (0, 2, 3):
        assert_same(memory.lists[i], copies[i], exact=case.exact)
    for i in (1, 4):
        assert_same(memory.lists[i], copies[i], exact=True)
    memory.check_margins()


class Mixture:
    """Lists some of whose gradients are wide; `copy` gives the same lists once more."""

    def __init__(self, dtype: torch.dtype, wide: torch.dtype, lists: int, grads: int) -> None:
        self.memory = Lists(dtype, lists)
        self.memory.fill(*range(lists))
        self.lists = [list(tensors) for tensors in self.memory.lists]
        for k in range(1, 1 + grads):
            for i, t in enumerate(self.lists[k]):
                if i % 3:
                    room = torch.full((t.numel() + 2 * MARGIN,), torch.nan, dtype=wide)
                    first = MARGIN + i % 2 * (i > 8)  # aligned to 16 bytes or not
                    self.lists[k][i] = room[first : first + t.numel()].normal_()

    def copy(self) -> list[list[Tensor]]:
        return [[t.clone() for t in tensors] for tensors in self.lists]


wides = pytest.mark.parametrize(("narrow", "wide", "big"), WIDE.values(), ids=WIDE)


@wides
@pytest.mark.parametrize("backups", [False, True])
@pytest.mark.parametrize("seed", [None, 77.0])
def test_wide_gradients_among_others(
    narrow: torch.dtype, wide: torch.dtype, big: float, backups: bool, seed: float | None
) -> None:
    options = {"rounding_seed": seed, "grad_scale": torch.tensor(3.7)}
    scale = {"grad_scale": torch.tensor(3.7)}
    calls: list[tuple[int, int, Callable[..., None]]] = [
        (3, 1, lambda room, x, g, b: room.ascend(x, g, b, 0.137, **scale)),
        (3, 1, lambda room, x, g, b: room.ascend(x, g, b, 0.137, adaptive=True, **scale)),
        (
            3,
            1,
            lambda room, x, g, b: room.ascend_again(x, g, 0.137, b if backups else None, **scale),
        ),
        (4, 2, lambda room, x, g, g0, b: room.ascend_hvp(x, g, g0, b, 0.137, 0.0213, **scale)),
        (
            4,
            1,
            lambda room, x, g, m, b: room.descend(
                x, g, m, b if backups else None, lr=0.3, momentum=0.8, nesterov=True, **options
            ),
        ),
        (
            5,
            1,
            lambda room, x, g, m, v, b: room.descend_adamw(
                x, g, m, v, b if backups else None, **ADAMW, **options
            ),
        ),
    ]
    for count, grads, call in calls:
        memory = Mixture(narrow, wide, count, grads)
        if count == 5:
            for v in memory.lists[3]:
                v.abs_()
        copies = memory.copy()
        call(triton_kernels, *memory.lists)
        call(reference, *copies)
        for actual, expected in zip(memory.lists, copies, strict=True):
            assert_same(actual, expected, exact=seed is not None and count > 3 and grads == 1)
        memory.memory.check_margins()


@wides
@pytest.mark.parametrize("weighted", [False, True])
def test_norms_and_flags_of_wide_gradients(
    narrow: torch.dtype, wide: torch.dtype, big: float, weighted: bool
) -> None:
    memory = Mixture(narrow, wide, 2, 1)
    tensors = memory.lists[1]
    tensors[1].fill_(big)
    assert tensors[1].dtype == wide
    weights = memory.lists[0] if weighted else None
    out, expected = torch.full((2,), torch.nan, dtype=torch.float64)
    triton_kernels.norm(tensors, out, weights=weights)
    reference.norm(tensors, expected, weights=weights)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)
    assert expected > big / 1e3
    found = torch.zeros(1)
    triton_kernels.flag_nonfinite(tensors, found)
    assert found == 0
    for i in (3, 4):
        good, tensors[i][2] = tensors[i][2].clone(), torch.nan
        triton_kernels.flag_nonfinite(tensors, found.zero_())
        tensors[i][2] = good
        assert found == 1


@wides
def test_wide_gradients_beyond_the_parameters_range(
    narrow: torch.dtype, wide: torch.dtype, big: float
) -> None:
    x, b = (torch.ones(70, dtype=narrow) for _ in range(2))
    g = torch.full((70,), big, dtype=wide)
    triton_kernels.ascend([x], [g], [b], 0.25 / big)
    assert_same([x], [torch.full_like(x, 1.25)], exact=False)
    triton_kernels.descend([x], [g], None, [b], lr=0.25 / big)
    assert_same([x], [torch.full_like(x, 0.75)], exact=False)


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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [None, torch.tensor([3.7])])
def test_norm(dtype: torch.dtype, scale: Tensor | None, weighted: bool) -> None:
    memory = Lists(dtype, 2)
    memory.fill(0, 1)
    tensors, weights = memory.lists[0], memory.lists[1] if weighted else None
    out, again, expected = torch.full((3,), torch.nan, dtype=reference.arithmetic_dtype(dtype))
    triton_kernels.norm(tensors, out, weights=weights, grad_scale=scale)
    reference.norm(tensors, expected, weights=weights, grad_scale=scale)
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(out.dtype).eps, atol=0)
    aligned = [[t.clone() for t in tensors] for tensors in memory.lists]
    triton_kernels.norm(
        aligned[0], again, weights=aligned[1] if weighted else None, grad_scale=scale
    )
    assert torch.equal(out, again), "alignment changed the order of the sum"
    memory.check_margins()


def test_weights_multiply_in_float64() -> None:
    t = torch.full((5,), 1e-30)
    out, expected = torch.empty(2)
    for room, result in ((triton_kernels, out), (reference, expected)):
        room.norm([t], result, weights=[3 * t], grad_scale=torch.tensor(1e-35))
    assert expected > 1e-25
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def test_norm_sums_more_chunks_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_device, "NORM_BLOCK", 4)
    t = torch.randn(9 * BLOCKS_IN_CHUNK * Blocks().elements(torch.float32))
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
    triton_kernels.ascend_again(empty, empty, 0.1, empty)
    triton_kernels.ascend_hvp(empty, empty, empty, empty, 0.1, 0.2)
    triton_kernels.descend(empty, empty, empty, empty, lr=0.1)
    triton_kernels.descend_adamw(empty, empty, empty, empty, empty, **ADAMW)
    found, out = torch.zeros(1), torch.empty((), dtype=reference.arithmetic_dtype(dtype))
    triton_kernels.flag_nonfinite(empty, found)
    triton_kernels.norm(empty, out)
    assert found == 0
    assert out == 0
    triton_kernels.norm(empty, out.fill_(torch.nan), weights=empty)
    assert out == 0


def test_wrong_arguments_change_nothing() -> None:
    room = triton_kernels
    tensors = [[torch.randn(4)] for _ in range(5)]
    x, g, m, v, b = tensors
    before = [t.clone() for [t] in tensors]
    double = torch.zeros((), dtype=torch.float64)
    whole, elsewhere = torch.tensor(1), torch.tensor(0.1, device="meta")
    with pytest.raises(ValueError, match="backups"):
        room.ascend(x, g, [], 0.1)
    with pytest.raises(TypeError, match="alpha must be a number"):
        room.ascend(x, g, b, whole)
    with pytest.raises(TypeError, match=r"alpha cannot be used: .*meta"):
        room.ascend(x, g, b, elsewhere)
    with pytest.raises(ValueError, match=r"found_inf must be a .*float32 tensor"):
        room.ascend(x, g, b, 0.1, found_inf=double)
    with pytest.raises(ValueError, match="backups"):
        room.ascend_again(x, g, 0.1, [])
    with pytest.raises(TypeError, match="alpha must be a number"):
        room.ascend_again(x, g, whole, None)
    with pytest.raises(ValueError, match="base_grads"):
        room.ascend_hvp(x, g, [], b, 0.1, 0.2)
    with pytest.raises(TypeError, match=r"eps cannot be used: .*meta"):
        room.ascend_hvp(x, g, m, b, 0.1, elsewhere)
    with pytest.raises(TypeError, match=r"grad_scale must be a .*one-element float32"):
        room.descend(x, g, None, b, lr=0.1, grad_scale=torch.ones(2))
    with pytest.raises(ValueError, match="rounding_seed must be a whole number"):
        room.descend(x, g, None, b, lr=0.1, rounding_seed=0.5)
    with pytest.raises(ValueError, match="rounding_seed must be a whole number"):
        room.descend_adamw(x, g, m, v, b, **ADAMW, rounding_seed=-1.0)
    with pytest.raises(ValueError, match="exp_avg_sqs"):
        room.descend_adamw(x, g, m, [], b, **ADAMW)
    with pytest.raises(ValueError, match="share memory"):
        room.descend_adamw(x, g, m, m, b, **ADAMW)
    with pytest.raises(TypeError, match="step must be a number"):
        room.descend_adamw(x, g, m, v, b, **ADAMW | {"step": whole})
    with pytest.raises(ValueError, match=r"found_inf must be a .*float32 tensor"):
        room.descend_adamw(x, g, m, v, b, **ADAMW, found_inf=double)
    with pytest.raises(ValueError, match="out must be a dense float64 tensor"):
        room.norm(x, whole)
    with pytest.raises(ValueError, match="weights"):
        room.norm(x, torch.empty(()), weights=[torch.ones(3)])
    assert_same([t for [t] in tensors], before, exact=True)


def test_what_is_true_is_one_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *args, **chosen: seen.append(chosen["ADAPTIVE"])

    monkeypatch.setattr(triton_device, "ascend_kernel", Kernel())
    x, g, b = ([torch.randn(4)] for _ in range(3))
    for adaptive in (True, 1, False, 0):
        triton_kernels.ascend(x, g, b, 0.1, adaptive=adaptive)  # type: ignore[arg-type]
    assert [str(value) for value in seen] == ["True", "True", "False", "False"]


@pytest.mark.parametrize("name", KERNELS)
def test_bad_arguments_are_refused_as_everywhere(name: str) -> None:
    kernel = KERNELS[name]
    kernel("triton", **kernel.make())
    for argument, what, arguments, bad in spoilt(kernel):
        message = refused(kernel, "triton", argument, arguments, bad)
        if argument != "backend":
            assert message == refused(kernel, "reference", argument, arguments, bad), what
