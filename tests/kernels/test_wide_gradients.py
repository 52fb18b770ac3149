"""Gradients of a wider dtype than their parameters are read as they are, and round nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import SCALE, UPDATES, WIDER, Arena, KernelBackend, Update, bits, places, same_bits
from eigenfilter import _core, kernels
from eigenfilter.kernels.conventions import gradient_dtype
from tolerances import Exact, adamw_roundings, assert_near, exact

# Dtypes of which neither holds the other's numbers, and those that are two steps apart.
UNREAD = [
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float64),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
]

GRADIENTS = ("grads", "base_grads")

pairs = pytest.mark.parametrize(("dtype", "wide", "big"), WIDER.values(), ids=WIDER)
mixtures = pytest.mark.parametrize("mixed", [False, True], ids=["wide", "mixed"])


class Operands:
    """An update's lists with gradients of another dtype, every second one with `mixed`."""

    def __init__(
        self, update: Update, dtype: torch.dtype, wide: torch.dtype, mixed: bool, device: str
    ) -> None:
        sizes = places(dtype, few=True)
        self.arenas = [update.arena(dtype, sizes, device)]
        self.lists = list(self.arenas[0].lists)
        for i, role in enumerate(update.lists):
            if role in GRADIENTS:
                arena = Arena(wide, 1, sizes, device, shifts=[i])
                arena.fill(0)
                self.arenas.append(arena)
                self.lists[i] = [
                    narrow if mixed and k % 2 else grad
                    for k, (grad, narrow) in enumerate(
                        zip(arena.lists[0], self.lists[i], strict=True)
                    )
                ]

    def values(self) -> list[Tensor]:
        return [t for tensors in self.lists for t in tensors]

    def assert_margins_untouched(self) -> None:
        for arena in self.arenas:
            arena.assert_margins_untouched()


@mixtures
@pairs
@pytest.mark.parametrize("flag_value", [None, 0.0, 1.0])
@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_updates_are_the_references_bit_for_bit(
    fast_backend: KernelBackend,
    update: Update,
    flag_value: float | None,
    dtype: torch.dtype,
    wide: torch.dtype,
    big: float,
    mixed: bool,
) -> None:
    results = []
    device = fast_backend.device
    flag = None if flag_value is None else torch.tensor(flag_value, device=device)
    for backend_name in (fast_backend.name, "reference"):
        torch.manual_seed(5)
        operands = Operands(update, dtype, wide, mixed, device)
        scale = torch.tensor(SCALE, device=device)
        update(operands.lists, grad_scale=scale, found_inf=flag, backend=backend_name)
        operands.assert_margins_untouched()
        results.append(operands.values())
    assert all(map(same_bits, *results))


@pairs
@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_what_both_dtypes_hold_gives_the_same_step(
    backend: KernelBackend, update: Update, dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    """Bit for bit if gradients of both dtypes are computed with in the same dtype."""
    results = []
    for convert in (False, True):
        torch.manual_seed(5)
        lists = update.arena(dtype, places(dtype, few=True), backend.device).lists
        for i, role in enumerate(update.lists):
            if role in GRADIENTS and convert:
                lists[i] = [g.to(wide) for g in lists[i]]
        update(lists, backend=backend.name)
        results.append(
            [t for i, role in enumerate(update.lists) if role in update.writes for t in lists[i]]
        )
    if wide == torch.float32:
        assert all(map(same_bits, *results))
    else:
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def lists_of(count: int, dtype: torch.dtype, wide: torch.dtype, big: float) -> list[Tensor]:
    """x of size 1, a gradient of size `big`, and `count` - 2 states of size 1."""
    n = 1003
    values = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    signs = torch.ones(n).index_fill(0, torch.arange(0, n, 3), -1)
    x = (values * signs).to(dtype)
    g = (values.flip(0) * (1 + 2.0**-20) * big * signs.roll(1)).to(wide)
    assert g.isfinite().all()
    return [x, g, *(values.roll(i).to(dtype) for i in range(1, count - 1))]


LR, WD, BETA = 0.137, 0.073, 0.87


def perturb(lists: Sequence[Tensor], big: float, backend_name: str) -> tuple[Tensor, Exact, Exact]:
    x, g, b = lists
    before = exact(x)
    kernels.perturb([x], [g], [b], LR / big, backend=backend_name)
    move = np.longdouble(LR / big) * exact(g)
    return x, before + move, np.abs(before) + np.abs(move)


def perturb_adaptive(
    lists: Sequence[Tensor], big: float, backend_name: str
) -> tuple[Tensor, Exact, Exact]:
    x, g, b = lists
    before = exact(x)
    kernels.perturb([x], [g], [b], LR / big, adaptive=True, backend=backend_name)
    move = np.longdouble(LR / big) * before**2 * exact(g)
    return x, before + move, np.abs(before) + np.abs(move)


def perturb_backups(
    lists: Sequence[Tensor], big: float, backend_name: str
) -> tuple[Tensor, Exact, Exact]:
    x, g, b = lists
    kernels.perturb([x], [g], [b], LR / big, save=False, backend=backend_name)
    move = np.longdouble(LR / big) * exact(g)
    return x, exact(b) + move, np.abs(exact(b)) + np.abs(move)


def perturb_unsaved(
    lists: Sequence[Tensor], big: float, backend_name: str
) -> tuple[Tensor, Exact, Exact]:
    x, g, _ = lists
    before = exact(x)
    kernels.perturb([x], [g], None, LR / big, save=False, backend=backend_name)
    move = np.longdouble(LR / big) * exact(g)
    return x, before + move, np.abs(before) + np.abs(move)


def perturb_hvp(
    lists: Sequence[Tensor], big: float, backend_name: str
) -> tuple[Tensor, Exact, Exact]:
    x, g, b = lists
    base = -0.7 * g
    kernels.perturb_hvp([x], [g], [base], [b], LR / big, 0.5, backend=backend_name)
    move = np.longdouble(LR / big) * 2 * (exact(g) - exact(base))
    return x, exact(b) + move, np.abs(exact(b)) + np.abs(move)


def sgd_step(lists: Sequence[Tensor], big: float, backend_name: str) -> tuple[Tensor, Exact, Exact]:
    x, g, _ = lists
    before = exact(x)
    kernels.sgd_step([x], [g], lr=LR / big, weight_decay=WD * big, backend=backend_name)
    terms = [np.longdouble(LR / big) * t for t in (exact(g), np.longdouble(WD * big) * before)]
    return x, before - sum(terms), sum(map(np.abs, terms)) + np.abs(before)


def sgd_step_maximize(
    lists: Sequence[Tensor], big: float, backend_name: str
) -> tuple[Tensor, Exact, Exact]:
    x, g, b = lists
    kernels.sgd_step([x], [g], None, [b], lr=LR / big, maximize=True, backend=backend_name)
    move = np.longdouble(LR / big) * exact(g)
    return x, exact(b) + move, np.abs(exact(b)) + np.abs(move)


def adamw_step(
    lists: Sequence[Tensor], big: float, backend_name: str
) -> tuple[Tensor, Exact, Exact]:
    """Its state overflows, but not before x is computed with it."""
    x, g, b = lists
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    options: Any = {"lr": LR, "beta1": 0.9, "beta2": 0.99, "eps": big / 8, "weight_decay": WD}
    kernels.adamw_step([x], [g], [m], [v], [b], **options, step=1, backend=backend_name)
    size = np.abs(exact(g))
    move = LR * exact(g) / (size + np.longdouble(big / 8))
    decayed = (1 - np.longdouble(LR) * np.longdouble(WD)) * exact(b)
    return x, decayed - move, np.abs(decayed) + np.abs(move)


STEPS: list[Callable[[Sequence[Tensor], float, str], tuple[Tensor, Exact, Exact]]] = [
    perturb,
    perturb_adaptive,
    perturb_backups,
    perturb_unsaved,
    perturb_hvp,
    sgd_step,
    sgd_step_maximize,
    adamw_step,
]


@pairs
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_gradients_beyond_the_parameters_range(
    backend: KernelBackend,
    step: Callable[[Sequence[Tensor], float, str], tuple[Tensor, Exact, Exact]],
    dtype: torch.dtype,
    wide: torch.dtype,
    big: float,
) -> None:
    """The step is the exact one, rounded once, as if the gradient were of size 1."""
    lists = [t.to(backend.device) for t in lists_of(3, dtype, wide, big)]
    actual, expected, terms = step(lists, big, backend.name)
    assert actual.dtype == dtype
    roundings = adamw_roundings(dtype, 0.9, 0.99, 1) + 5
    assert_near(actual, expected, terms, roundings)


@pairs
def test_momentum_is_rounded_once(
    backend: KernelBackend, dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    """The loss scale takes the gradient back into the momentum's range."""
    x, g, m, b = (t.to(backend.device) for t in lists_of(4, dtype, wide, min(big, 2.0**100)))
    scale = torch.tensor(min(big, 2.0**100), device=backend.device)
    d = exact(g) / np.longdouble(scale.item()) + WD * exact(b)
    new = BETA * exact(m) + d
    kernels.sgd_step(
        [x],
        [g],
        [m],
        [b],
        lr=LR,
        momentum=BETA,
        weight_decay=WD,
        grad_scale=scale,
        backend=backend.name,
    )
    terms = np.abs(d) + WD * np.abs(exact(b)) + 2
    assert_near(m, new, terms)
    assert_near(x, exact(b) - LR * new, np.abs(exact(b)) + LR * terms)


@pytest.mark.parametrize("wide", [torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(
    backend: KernelBackend, dtype: torch.dtype, wide: torch.dtype
) -> None:
    """The step would be lost or doubled if the gradient were rounded to nearest first."""
    n = 2**16
    x = torch.ones(n, dtype=dtype, device=backend.device)
    step = 0.3 * torch.finfo(dtype).eps * (1 + 2.0**-13)
    g = torch.full((n,), -step, dtype=wide, device=backend.device)
    kernels.sgd_step([x], [g], lr=1.0, rounding_seed=77, backend=backend.name)
    up = (x > 1).double().mean().item()
    assert up == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / n) ** 0.5)


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@pytest.mark.parametrize("role", GRADIENTS)
@pytest.mark.parametrize(("dtype", "other"), UNREAD)
def test_other_dtypes_are_refused_before_anything_is_written(
    dtype: torch.dtype, other: torch.dtype, role: str, backend_name: str
) -> None:
    for update in UPDATES:
        moves = update.kernel == "perturb" and "backups" not in update.lists
        if role not in update.lists or (moves and other == torch.bfloat16):  # it reads momenta
            continue
        lists = [[torch.ones(5, dtype=dtype) for _ in range(2)] for _ in update.lists]
        lists[update.lists.index(role)][1] = torch.ones(5, dtype=other)
        before = [[bits(t).clone() for t in tensors] for tensors in lists]
        with pytest.raises(_core.LayoutError, match=rf"^{role}\[1\] is .* is not: .*\.to\(\)"):
            update(lists, backend=backend_name)
        for tensors, old in zip(lists, before, strict=True):
            assert all(map(torch.equal, map(bits, tensors), old))


@pairs
@pytest.mark.parametrize("backend_name", ["native", "reference"])
def test_gradients_of_both_points_are_of_one_dtype(
    dtype: torch.dtype, wide: torch.dtype, big: float, backend_name: str
) -> None:
    x, g, b = (torch.ones(5, dtype=dtype) for _ in range(3))
    for grads, base in (([g.to(wide)], [g]), ([g], [g.to(wide)])):
        with pytest.raises(_core.LayoutError, match=r"^base_grads\[0\] is .* and grads\[0\] is"):
            kernels.perturb_hvp([x], grads, base, [b], 0.1, 0.1, backend=backend_name)
    assert (x == 1).all()


@pairs
def test_a_wide_gradient_may_not_reach_into_its_parameter(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    """Its bytes are counted in its own dtype."""
    memory = torch.zeros(24, dtype=wide)
    g = memory[:8]
    x = memory.view(dtype)[8:16]  # half-way through the gradient
    with pytest.raises(ValueError, match="share memory"):
        kernels.sgd_step([x], [g], lr=0.1)
    after = memory.view(dtype)[16:24]
    kernels.sgd_step([after], [g], lr=0.1)


def test_the_dtype_in_which_gradients_are_read() -> None:
    """The parameter's dtype if it holds all their numbers, else the next wider one."""
    half, brain, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    expected_dtypes = {
        half: {half: half, brain: single, single: single, torch.float8_e5m2: half},
        brain: {half: single, brain: brain, single: single, torch.float8_e4m3fn: brain},
        single: {half: single, brain: single, single: single, double: double},
        double: {half: double, brain: double, single: double, double: double},
    }
    for param, by_grad in expected_dtypes.items():
        for grad, expected in by_grad.items():
            assert gradient_dtype(param, grad) == expected
    for param in (half, brain):
        with pytest.raises(TypeError, match=r"a gradient is torch\.float64 and its parameter"):
            gradient_dtype(param, double)
    with pytest.raises(TypeError, match=r"a gradient is torch\.complex64"):
        gradient_dtype(single, torch.complex64)
