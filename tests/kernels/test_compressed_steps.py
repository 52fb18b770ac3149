"""Steps of compressed tensors: every backend has the bits of the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import backends
from cases import (
    ADAMW_DESCENTS,
    DESCENTS,
    AdamWDescent,
    Descent,
    KernelBackend,
    same_bits,
)
from eigenfilter import kernels
from eigenfilter.kernels.compression import encode

SIZES = (0, 1, 63, 64, 65, 200, 1000, 8192, 40001)
SHIFTS = (0, 3)  # elements by which tensors miss 64 bytes
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


def name_of(form: Format) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in form if part is not None)


@dataclass
class Compressed:
    """The lists of a call, in memory with margins."""

    device: str
    whole: list[Tensor] = field(default_factory=list)
    margins: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def tensor(self, values: Tensor, shift: int) -> Tensor:
        n = values.numel()
        memory = torch.full((n + 2 * MARGIN,), 77, dtype=values.dtype, device=self.device)
        start = MARGIN - 16 + shift
        memory[start : start + n] = values
        outside = torch.ones(memory.numel(), dtype=torch.bool, device=self.device)
        outside[start : start + n] = False
        self.margins.append((memory, outside))
        inside = memory[start : start + n]
        self.whole.append(inside)
        return inside

    def assert_margins_untouched(self) -> None:
        for memory, outside in self.margins:
            assert (memory[outside] == 77).all()


def sizes() -> tuple[int, ...]:
    return SIZES[:-1] if backends.INTERPRETED or backends.EMULATED else SIZES


def random(n: int, generator: torch.Generator, spread: float) -> Tensor:
    """Values of many magnitudes, some of them 0."""
    value = torch.randn(n, generator=generator) * torch.exp2(
        torch.randn(n, generator=generator) * spread
    )
    return torch.where(torch.rand(n, generator=generator) < 0.05, 0.0, value)


def lists(form: Format, *, states: int, device: str, grad: torch.dtype, seed: int = 0) -> Iterator:
    """Parameters, gradients, backups, corrections, states, and scales of the states."""
    param, correction, state = form
    generator = torch.Generator().manual_seed(seed)
    memory = Compressed(device)
    rows: list[list[Tensor]] = [[] for _ in range(4)]
    kept: list[list[Tensor]] = [[] for _ in range(states)]
    scales: list[list[Tensor]] = [[] for _ in range(states)]
    for n, shift in itertools.product(sizes(), SHIFTS):
        rows[0].append(memory.tensor(random(n, generator, 3).to(param), shift))
        rows[1].append(memory.tensor(random(n, generator, 3).to(grad), shift))
        rows[2].append(memory.tensor(random(n, generator, 3).to(param), shift))
        if correction is not None:
            bits = 8 * correction.itemsize
            whole = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n,), generator=generator)
            rows[3].append(memory.tensor(whole.to(correction), shift))
        for k in range(states):
            value = random(n, generator, 4)
            value = value * value if k == 1 else value
            if state == CODES:
                codes, scale = encode(value, torch.uint8 if k == 1 else torch.int8)
                kept[k].append(memory.tensor(codes, shift))
                scales[k].append(memory.tensor(scale, shift))
            else:
                kept[k].append(memory.tensor(value.to(state), shift))
    yield memory
    yield from rows[:3]
    yield rows[3] or None
    for k in range(states):
        yield kept[k]
        yield scales[k] if state == CODES else None


def step_sgd(backend: KernelBackend, form: Format, case: Descent, **options: Any) -> list[Tensor]:
    memory, params, grads, backups, corrections, momenta, scales = lists(
        form, states=1, device=backend.device, grad=options.pop("grad", form[0])
    )
    has_momenta = case.momentum != "none"
    for _ in range(2):
        kernels.sgd_step(
            params,
            grads,
            momenta if has_momenta else None,
            backups if case.backups else None,
            corrections,
            scales if has_momenta else None,
            **case.options(),
            **options,
            backend=backend.name,
        )
    memory.assert_margins_untouched()
    return memory.whole


def step_adamw(
    backend: KernelBackend, form: Format, case: AdamWDescent, **options: Any
) -> list[Tensor]:
    memory, params, grads, backups, corrections, m, m_scales, v, v_scales = lists(
        form, states=2, device=backend.device, grad=options.pop("grad", form[0])
    )
    for i in range(2):
        kernels.adamw_step(
            params,
            grads,
            m,
            v,
            backups if case.backups else None,
            corrections,
            m_scales,
            v_scales,
            **case.options() | {"step": case.step + i},
            **options,
            backend=backend.name,
        )
    memory.assert_margins_untouched()
    return memory.whole


def assert_as_reference(step: Any, backend: KernelBackend, *args: Any, **options: Any) -> None:
    got = step(backend, *args, **options)
    wanted = step(KernelBackend("reference", backend.device), *args, **options)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert same_bits(a, b), f"tensor {i}: {a.dtype} [{a.numel()}]"


# Without momenta, corrections are all that there is to compress.
SGD_STEPS = [
    pytest.param(form, case, id=f"{case}-{name_of(form)}")
    for form, case in itertools.product(FORMATS, DESCENTS[::3])
    if case.momentum != "none" or (form[1] is not None and form[2] == CODES)
]


@pytest.mark.parametrize(("form", "case"), SGD_STEPS)
def test_sgd_step(fast_backend: KernelBackend, form: Format, case: Descent) -> None:
    assert_as_reference(step_sgd, fast_backend, form, case)


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
@pytest.mark.parametrize("case", ADAMW_DESCENTS[::3], ids=str)
def test_adamw_step(fast_backend: KernelBackend, form: Format, case: AdamWDescent) -> None:
    assert_as_reference(step_adamw, fast_backend, form, case)
