"""The one table of cases: sizes, dtypes, hyperparameters, and tensors that notice stray writes.

Hyperparameters are never at their defaults and gradients never zero, so that nothing a kernel
forgets goes unnoticed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import backends
from eigenfilter import kernels
from eigenfilter.kernels._op import OPERATIONS
from eigenfilter.kernels.triton.blocks import Blocks
from eigenfilter.kernels.triton.tables import BLOCKS_IN_CHUNK

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A parameter's dtype, a wider one of its gradients, and a power of two that only the latter holds.
WIDER = {
    "float16-float32": (torch.float16, torch.float32, 2.0**17),
    "bfloat16-float32": (torch.bfloat16, torch.float32, 2.0**60),
    "float32-float64": (torch.float32, torch.float64, 2.0**130),
}

# Below, at and above the SIMD widths (2 to 16 elements and blocks of them), a thread's least share
# (64 KiB) and the chunk of a sum (16 Ki elements).
SIZES = (0, 1, 3, 15, 16, 17, 63, 64, 65, 1000, 16383, 16385, 70001)

# By how many bytes the tensors of the lists miss a 16-byte boundary, list by list: all of them
# alike, or some only.
MISSES = (
    (4, 4, 4, 4, 4),
    (8, 0, 8, 0, 8),
    (0, 12, 0, 8, 0),
    (0, 0, 4, 0, 0),
    (0, 0, 0, 0, 8),
    (2, 6, 2, 2, 2),
    (0, 2, 0, 0, 0),
)

LR = 0.313
MOMENTUM = 0.87
DAMPENING = 0.31
WEIGHT_DECAY = 0.073
ALPHA = -0.137
RHO = 0.137
DISPLACEMENT = 0.019
BETA1 = 0.83
BETA2 = 0.973
EPS = 0.037  # large enough that where it is added shows
STEPS = (1, 9, 12345)
EXTRAPOLATION = 0.6
SEED = 11_184_811  # fills the 24 bits of a seed
SCALE = 3.3  # no power of two: dividing by it rounds, and multiplying by 1 / it rounds otherwise

MARGIN = 32  # elements before and after every tensor of an Arena

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class KernelBackend:
    """An implementation of the kernels, where it runs and, on the CPU, its instruction set."""

    name: str
    device: str = "cpu"
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.isa or self.device}"


@dataclass(frozen=True)
class Descent:
    """The lists and options of a call of `sgd_step`."""

    momentum: str  # "none", "heavy", "nesterov" or "ahead": heavy ball with an extrapolation
    backups: bool
    decay: bool
    maximize: bool

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `kernels.sgd_step`."""
        with_momentum = self.momentum != "none"
        ahead = {"extrapolation": EXTRAPOLATION} if self.momentum == "ahead" else {}
        return ahead | {
            "lr": LR,
            "momentum": MOMENTUM if with_momentum else 0.0,
            "dampening": DAMPENING if self.momentum in ("heavy", "ahead") else 0.0,
            "weight_decay": WEIGHT_DECAY if self.decay else 0.0,
            "nesterov": self.momentum == "nesterov",
            "maximize": self.maximize,
        }

    def __str__(self) -> str:
        names = ("backups", "decay", "maximize")
        return "-".join([self.momentum, *(name for name in names if getattr(self, name))])


DESCENTS = [
    Descent(*choice)
    for choice in itertools.product(
        ("none", "heavy", "nesterov", "ahead"), (False, True), (False, True), (False, True)
    )
]


@dataclass(frozen=True)
class AdamWDescent:
    """The lists and options of a call of `adamw_step`."""

    ahead: bool  # with an extrapolation
    backups: bool
    decay: bool
    maximize: bool
    step: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `kernels.adamw_step`."""
        ahead = {"extrapolation": EXTRAPOLATION} if self.ahead else {}
        return ahead | {
            "lr": LR,
            "beta1": BETA1,
            "beta2": BETA2,
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY if self.decay else 0.0,
            "step": self.step,
            "maximize": self.maximize,
        }

    def __str__(self) -> str:
        names = ("ahead", "backups", "decay", "maximize")
        return "-".join([*(name for name in names if getattr(self, name)), str(self.step)])


ADAMW_DESCENTS = [
    AdamWDescent(*choice, STEPS[i % len(STEPS)])
    for i, choice in enumerate(itertools.product((False, True), repeat=4))
]


class Place(NamedTuple):
    """One tensor of every list: its elements, and by how many bytes it misses a boundary."""

    size: int
    misses: tuple[int, ...] = (0,)


@functools.cache
def places(dtype: torch.dtype, *, few: bool = False) -> tuple[Place, ...]:
    """The tensors of a call: aligned ones of every size, then tensors that are not aligned.

    Triton's interpreter takes its time by blocks. Its sizes lie below, at and above Triton's blocks
    (and a quarter of one, as the tails are cut) and chunks, whatever the dtype.

    Args:
        dtype: of the parameters.
        few: leave the largest one out, where many calls are made.
    """
    sizes, shifted = SIZES[:-1] if few else SIZES, 1003
    if backends.INTERPRETED:
        block = Blocks().elements(dtype)
        chunk = BLOCKS_IN_CHUNK * block
        sizes = (0, 1, 7, block // 4, block - 1, block, block + 1, chunk, chunk + block + 3)
        shifted = block // 4 + 5
    fitting = [misses for misses in MISSES if all(m % dtype.itemsize == 0 for m in misses)]
    return (*map(Place, sizes), *(Place(shifted, misses) for misses in fitting))


def columns(*sizes: int) -> tuple[int, ...]:
    """The lengths of rows that a test takes: `sizes`, or those around a tile of Triton's."""
    return (1, 17, 1023, 1024, 1025, 2049) if backends.INTERPRETED else sizes


class Arena:
    """Lists of tensors of equal sizes, NaN at first, in memory with margins of NaN between them.

    Args:
        dtype, device: of all tensors.
        lists: how many lists.
        sizes: elements of the tensors of every list, or their places; None is `places(dtype)`.
        shifts: by how many elements each list's tensors miss 64-byte alignment.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        lists: int,
        sizes: Sequence[int | Place] | None = None,
        device: str = "cpu",
        shifts: Sequence[int] | None = None,
    ) -> None:
        self.memory = []
        self.lists = []
        self._inside = []
        wanted = places(dtype) if sizes is None else sizes
        all_places = tuple(size if isinstance(size, Place) else Place(size) for size in wanted)
        for i, shift in enumerate(shifts or [0] * lists):
            misses = [shift + p.misses[i % len(p.misses)] // dtype.itemsize for p in all_places]
            spans, inside = _layout(tuple(p.size for p in all_places), tuple(misses))
            memory = torch.full((inside.numel(),), torch.nan, dtype=dtype, device=device)
            self.memory.append(memory)
            self.lists.append([memory[first:last] for first, last in spans])
            self._inside.append(inside.to(device))

    def fill(self, *indices: int) -> None:
        """Give the lists at `indices` random values that are not zero."""
        for i in indices:
            memory = self.memory[i]
            values = nonzero(memory.shape, memory.dtype).to(memory.device)
            torch.where(self._inside[i], values, memory, out=memory)

    def values(self, i: int) -> Tensor:
        """All elements of list `i`, a copy."""
        return torch.cat(self.lists[i])

    def assert_margins_untouched(self) -> None:
        """Fail if anything was written outside of the tensors."""
        for i, (memory, inside) in enumerate(zip(self.memory, self._inside, strict=True)):
            assert (memory.isnan() | inside).all(), f"written outside of list {i}"


@functools.cache
def _layout(
    sizes: tuple[int, ...], shifts: tuple[int, ...]
) -> tuple[list[tuple[int, int]], Tensor]:
    """Where each tensor begins and ends in an arena's memory, and which elements are in one."""
    spans, end = [], MARGIN
    for size, shift in zip(sizes, shifts, strict=True):
        spans.append((end + shift, end + shift + size))
        end += -(-(size + 2 * MARGIN) // MARGIN) * MARGIN
    inside = torch.zeros(end, dtype=torch.bool)
    for first, last in spans:
        inside[first:last] = True
    return spans, inside


@dataclass(frozen=True)
class Update:
    """A kernel that updates: its lists, those that it writes, and its other arguments."""

    kernel: str
    lists: tuple[str, ...]
    writes: tuple[str, ...]
    options: Mapping[str, Any] = field(hash=False)
    variant: str = ""

    def __call__(self, lists: Sequence[Sequence[Tensor]], **options: Any) -> None:
        named = dict(zip(self.lists, lists, strict=True))
        getattr(kernels, self.kernel)(**named, **{**self.options, **options})

    def __str__(self) -> str:
        return f"{self.kernel}-{self.variant}" if self.variant else self.kernel

    @property
    def hyperparameters(self) -> list[str]:
        """Options that are numbers."""
        return [name for name, value in self.options.items() if not isinstance(value, bool | None)]

    @property
    def restores(self) -> bool:
        """Whether a stopped update restores x from backups: steps do, perturbations do not."""
        return "backups" in self.lists and not self.kernel.startswith("perturb")

    @property
    def starts_from(self) -> str:
        """The list that is read for x, the other being only written or absent."""
        reads_backups = "backups" in self.lists and "backups" not in self.writes
        return "backups" if reads_backups else "params"

    def arena(
        self,
        dtype: torch.dtype,
        sizes: Sequence[int | Place] | None = None,
        device: str = "cpu",
    ) -> Arena:
        """The update's lists with values: NaN in what it must not read, positive second moments."""
        arena = Arena(dtype, len(self.lists), sizes, device)
        only_written = {"params", "backups"} - {self.starts_from}
        arena.fill(*(i for i, role in enumerate(self.lists) if role not in only_written))
        if "exp_avg_sqs" in self.lists:
            arena.memory[self.lists.index("exp_avg_sqs")].abs_()
        return arena


_ASCENT = ("params", "grads", "backups")
_DESCENT = ("params", "grads", "momenta", "backups")
_ADAMW = ("params", "grads", "exp_avgs", "exp_avg_sqs", "backups")

# Every kernel that updates, with and without what is optional.
UPDATES = [
    Update("perturb", _ASCENT, ("params", "backups"), {"alpha": ALPHA}),
    Update(
        "perturb", _ASCENT, ("params", "backups"), {"alpha": ALPHA, "adaptive": True}, "adaptive"
    ),
    Update(
        "perturb",
        _ASCENT[:2],
        ("params",),
        {"alpha": ALPHA, "save": False, "backups": None},
        "unsaved",
    ),
    Update("perturb", _ASCENT, ("params",), {"alpha": ALPHA, "save": False}, "unsaved-backups"),
    Update(
        "perturb_hvp",
        ("params", "grads", "base_grads", "backups"),
        ("params",),
        {"alpha": ALPHA, "eps": DISPLACEMENT},
    ),
    Update(
        "sgd_step",
        ("params", "grads", "backups"),
        ("params",),
        {"lr": LR, "weight_decay": WEIGHT_DECAY},  # momentum and nesterov need momenta
        "backups",
    ),
    Update(
        "sgd_step",
        _DESCENT,
        ("params", "momenta"),
        Descent("nesterov", True, True, True).options() | {"dampening": DAMPENING},
        "nesterov-backups",
    ),
    Update(
        "sgd_step",
        _DESCENT[:3],
        ("params", "momenta"),
        Descent("ahead", False, True, False).options(),
        "ahead",
    ),
    Update(
        "sgd_step",
        _DESCENT,
        ("params", "momenta"),
        Descent("heavy", True, True, False).options() | {"rounding_seed": SEED},
        "stochastic",
    ),
    Update(
        "adamw_step",
        _ADAMW,
        ("params", "exp_avgs", "exp_avg_sqs"),
        AdamWDescent(False, True, True, False, 9).options() | {"rounding_seed": SEED},
        "stochastic",
    ),
    Update(
        "adamw_step",
        _ADAMW,
        ("params", "exp_avgs", "exp_avg_sqs"),
        AdamWDescent(True, True, True, False, 9).options() | {"rounding_seed": SEED},
        "ahead-stochastic",
    ),
    Update(
        "adamw_step",
        _ADAMW[:4],
        ("params", "exp_avgs", "exp_avg_sqs"),
        AdamWDescent(True, False, True, True, 9).options(),
        "ahead",
    ),
    Update(
        "adamw_step",
        _ADAMW[:4],
        ("params", "exp_avgs", "exp_avg_sqs"),
        AdamWDescent(False, False, True, False, 1).options(),
    ),
    Update(
        "adamw_step",
        _ADAMW,
        ("params", "exp_avgs", "exp_avg_sqs"),
        AdamWDescent(False, True, True, True, 9).options(),
        "backups",
    ),
]

_NUMBERS = {
    "alpha": ALPHA,
    "beta1": BETA1,
    "beta2": BETA2,
    "dampening": DAMPENING,
    "eps": EPS,
    "lr": LR,
    "momentum": MOMENTUM,
    "step": STEPS[1],
    "weight_decay": WEIGHT_DECAY,
}


def _all_of(kernel: str) -> Update:
    """An update with all its lists, and numbers by their names."""
    operation = OPERATIONS[kernel]
    lists = tuple(a for a, of in operation.annotations.items() if of.startswith("Sequence"))
    writes = tuple(name for name in lists if name in operation.writes)
    numbers = {a: _NUMBERS[a] for a, of in operation.annotations.items() if of == "Scalar"}
    return Update(kernel, lists, writes, numbers)


# A kernel that has no row needs none, if it has no variants.
UPDATES[:0] = [
    _all_of(name)
    for name, operation in OPERATIONS.items()
    if operation.arguments[0] == "params" and name not in {u.kernel for u in UPDATES}
]


def nonzero(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random values of both signs, between 0.5 and 2 in size."""
    t = torch.empty(tuple(shape), dtype=torch.float64).uniform_(-1.5, 1.5)
    return (t + t.sign() * 0.5).to(dtype)


def bits(t: Tensor) -> Tensor:
    """The tensor's elements as integers: equal where all bits are, NaN or not."""
    return t.detach().contiguous().view(_BITS[t.element_size()])


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree in dtype and bit for bit."""
    return actual.dtype == expected.dtype and torch.equal(bits(actual), bits(expected))


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All numbers of a dtype of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def spacing(x: Tensor) -> Tensor:
    """Distance from |x| to the next larger number of its dtype; 1 where x is not finite."""
    info = torch.finfo(x.dtype)
    _, exponent = np.frexp(np.maximum(x.double().abs().numpy(), info.tiny))
    ulp = torch.from_numpy(np.ldexp(info.eps, exponent - 1))
    return ulp.where(x.isfinite(), 1.0).to(x.dtype)
