"""Steps of compressed tensors: their formats, and lists of every format with margins in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import backends
from eigenfilter.kernels.compression import encode

# Tensors of a call: elements, and by how many they miss 64 bytes. Triton's interpreter takes its
# time by blocks, of which these have some and a rest.
PLACES = tuple(itertools.product((0, 1, 63, 64, 65, 200, 1000, 8192, 40001), (0, 3)))
if backends.EMULATED:
    PLACES = PLACES[:-2]
if backends.INTERPRETED:
    PLACES = ((0, 0), (1, 0), (64, 0), (2100, 0), (8200, 0), (65, 3), (700, 3))
FEW_PLACES = ((1, 3), (64, 0), (200, 3), (2100, 0))
MARGIN = 32

PARAMS = (torch.float32, torch.bfloat16, torch.float16)
CODES = "codes"
Format = tuple[torch.dtype, torch.dtype | None, torch.dtype | str]
"""The dtypes of parameters, of corrections or None, and of states."""

FORMATS: list[Format] = [
    (param, correction, state)
    for param, correction, state in itertools.product(
        PARAMS, (None, torch.int8, torch.int16), (torch.float32, torch.bfloat16, None, CODES)
    )
    if (correction is None or param.itemsize == 2)
    and not (correction is None and state in (None, param))
    and state != param
    for state in [param if state is None else state]
]

# Every dtype of parameters, of corrections and of states.
SOME_FORMATS: list[Format] = [
    (torch.float32, None, torch.bfloat16),
    (torch.float32, None, CODES),
    (torch.bfloat16, None, torch.float32),
    (torch.bfloat16, torch.int8, CODES),
    (torch.bfloat16, torch.int16, torch.bfloat16),
    (torch.float16, None, CODES),
    (torch.float16, torch.int8, torch.float16),
    (torch.float16, torch.int16, torch.float32),
]


def name_of(form: Format) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in form if part is not None)


# States and their scales, by how many states a step has.
NAMES: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("momenta", "momentum_scales"),),
    (("exp_avgs", "exp_avg_scales"), ("exp_avg_sqs", "exp_avg_sq_scales")),
)

Values = Callable[[int, torch.Generator], Tensor]


def usual(n: int, generator: torch.Generator) -> Tensor:
    """Values of many magnitudes, some of them 0."""
    size = torch.exp2(3 * torch.randn(n, generator=generator))
    value = torch.randn(n, generator=generator) * size
    return torch.where(torch.rand(n, generator=generator) < 0.05, 0.0, value)


def extreme(n: int, generator: torch.Generator) -> Tensor:
    """Values whose groups have magnitudes from the least number of float32 to the largest."""
    exponents = torch.randint(-152, 128, (-(-n // 64),), generator=generator)
    size = torch.exp2(exponents.double()).repeat_interleave(64)[:n]
    return (torch.randn(n, generator=generator) * size).float()


def not_finite(n: int, generator: torch.Generator) -> Tensor:
    """Values of which some are infinite or NaN, so that some groups have none of them."""
    value = usual(n, generator)
    kind = torch.randint(0, 500, (n,), generator=generator)
    for i, special in enumerate((torch.inf, -torch.inf, torch.nan)):
        value = torch.where(kind == i, special, value)
    return value


@dataclass
class Lists:
    """The lists of a call.

    Attributes:
        params, grads, backups, corrections: the tensors of each, or None.
        states, scales: of each state the tensors, and their scales or None.
        whole: all tensors.
    """

    device: str
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    backups: list[Tensor] = field(default_factory=list)
    corrections: list[Tensor] | None = None
    states: list[list[Tensor]] = field(default_factory=list)
    scales: list[list[Tensor] | None] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)
    _memory: list[tuple[Tensor, int]] = field(default_factory=list)

    def arguments(self, *, backups: bool) -> dict[str, Any]:
        """The lists by the names that they have in `sgd_step` or, with two states, `adamw_step`."""
        given: dict[str, Any] = {"params": self.params, "grads": self.grads}
        given |= {"backups": self.backups if backups else None, "corrections": self.corrections}
        for names, *values in zip(NAMES[len(self.states)], self.states, self.scales, strict=True):
            given |= dict(zip(names, values, strict=True))
        return given

    def tensor(self, values: Tensor, shift: int) -> Tensor:
        """A tensor with these values, in memory of its own with margins."""
        n = values.numel()
        memory = torch.full((n + 2 * MARGIN,), 77, dtype=values.dtype, device=self.device)
        start = MARGIN - 16 + shift
        inside = memory[start : start + n].copy_(values)
        self._memory.append((memory, start))
        self.whole.append(inside)
        return inside

    def assert_margins_untouched(self) -> None:
        for (memory, start), inside in zip(self._memory, self.whole, strict=True):
            assert (memory[:start] == 77).all()
            assert (memory[start + inside.numel() :] == 77).all()


def lists_of(
    form: Format,
    states: int,
    device: str = "cpu",
    *,
    grad: torch.dtype | None = None,
    places: Sequence[tuple[int, int]] = PLACES,
    values: Values = usual,
    shaped: Callable[[Tensor], Tensor] = lambda t: t,
) -> Lists:
    """Lists of a format, with as many states as the step has.

    Args:
        grad: dtype of every second gradient, or None; the others have the parameters'.
        places: elements of the tensors, and by how many they miss 64 bytes.
        values: of parameters, gradients, backups and states.
        shaped: makes a tensor of one dimension one of several, except for scales.
    """
    param, correction, state = form
    generator = torch.Generator().manual_seed(states)
    result = Lists(device, states=[[] for _ in range(states)], scales=[None] * states)
    if correction is not None:
        result.corrections = []
    if state == CODES:
        result.scales = [[] for _ in range(states)]
    for n, shift in places:

        def add(to: list[Tensor], of: Tensor, shift: int = shift) -> None:
            to.append(shaped(result.tensor(of, shift)))

        add(result.params, values(n, generator).to(param))
        own = param if grad is None or len(result.grads) % 2 else grad
        add(result.grads, values(n, generator).to(own))
        add(result.backups, values(n, generator).to(param))
        if result.corrections is not None:
            limits = torch.iinfo(correction)
            whole = torch.randint(limits.min, limits.max + 1, (n,), generator=generator)
            add(result.corrections, whole.to(correction))
        for k, (tensors, scales) in enumerate(zip(result.states, result.scales, strict=True)):
            value = values(n, generator)
            value = value * value if k == 1 else value
            if scales is None:
                add(tensors, value.to(state))
            else:
                codes, scale = encode(value, torch.uint8 if k == 1 else torch.int8)
                add(tensors, codes)
                scales.append(result.tensor(scale, shift))
    return result
