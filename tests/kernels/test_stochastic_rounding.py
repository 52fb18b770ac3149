"""Stochastic rounding: to one of two neighbors, right on average, by bits that have no pattern.

All backends use the same bits (`test_rounding.py`), so a test of their distribution in one backend
holds for all. Bounds are in standard errors of independent roundings.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import SEED, KernelBackend, bits, every_pattern, nonzero, same_bits, spacing
from eigenfilter import kernels

NARROW = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
SIGMAS = 5  # one in 1.7 million of normally distributed values exceeds it

narrow_dtypes = pytest.mark.parametrize("narrow", NARROW, ids=str)


def sgd_step(x: Tensor, g: Tensor, seed: Any, lr: float = 1.0, **options: Any) -> Tensor:
    x = x.clone()
    kernels.sgd_step([x], [g], lr=lr, rounding_seed=seed, **options)
    return x


def neighbors(y: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of a narrow dtype that is not above y, and the least not below it."""
    nearest = y.to(narrow)
    order = bits(nearest).int()
    order = torch.where(order < 0, -(order & 0x7FFF), order)  # rises by 1 from number to number
    low, high = order - (nearest.float() > y).int(), order + (nearest.float() < y).int()

    def number(order: Tensor) -> Tensor:
        pattern = torch.where(order < 0, -order - 2**15, order)
        return pattern.to(torch.int16).view(narrow)

    return number(low), number(high)


@pytest.mark.parametrize("part", [0.0, 0.25, -0.5, 1.0, 0.999, -0.001, 1.5])
@narrow_dtypes
def test_every_number_goes_to_a_neighbor(
    backend: KernelBackend, narrow: torch.dtype, part: float
) -> None:
    """Exact numbers stay; beyond the largest, rounding is to nearest; NaN stays NaN."""
    x = every_pattern(narrow)
    g = spacing(x)
    y = x.float() + part * g.float()
    there, grads = x.to(backend.device), g.to(backend.device)
    perturbed = sgd_step(there, grads, SEED, -part, backend=backend.name).cpu()
    largest = torch.finfo(narrow).max
    inside, beyond = y.abs() <= largest, y.abs() > largest
    low, high = (n[inside].float() for n in neighbors(y, narrow))
    result = perturbed[inside].float()
    assert ((result == low) | (result == high)).all()
    assert same_bits(perturbed[beyond], y[beyond].to(narrow))
    assert torch.equal(perturbed.isnan(), y.isnan())
    if part % 1:
        between = low != high
        assert between.sum() > 60_000
        ups = (result == high)[between].double().mean().item()
        assert 0 < ups < 1


@narrow_dtypes
def test_a_step_of_length_zero_returns_every_number(
    backend: KernelBackend, narrow: torch.dtype
) -> None:
    x = every_pattern(narrow).to(backend.device)
    perturbed = sgd_step(x, torch.ones_like(x), SEED, 0.0, backend=backend.name)
    saved = ~x.isnan()
    assert same_bits(perturbed[saved], x[saved])
    assert perturbed[~saved].isnan().all()


@pytest.mark.parametrize("T", WIDE, ids=str)
def test_wide_dtypes_are_not_rounded(backend: KernelBackend, T: torch.dtype) -> None:
    x, g = (nonzero((1000,), T).to(backend.device) for _ in range(2))
    perturbed = sgd_step(x, g, SEED, 0.3, backend=backend.name)
    assert same_bits(perturbed, sgd_step(x, g, None, 0.3, backend=backend.name))


@narrow_dtypes
def test_found_inf_restores_x_and_keeps_m(backend: KernelBackend, narrow: torch.dtype) -> None:
    x, g, m, b = (nonzero((1000,), narrow).to(backend.device) for _ in range(4))
    saved = m.clone()
    kernels.sgd_step(
        [x],
        [g],
        [m],
        [b],
        lr=0.3,
        momentum=0.9,
        rounding_seed=SEED,
        found_inf=torch.ones((), device=backend.device),
        backend=backend.name,
    )
    assert same_bits(x, b)
    assert same_bits(m, saved)


# Values y that lie at a part of the way between two neighbors, from a start and a gradient.
STARTS = {
    "one": {torch.bfloat16: (1.0, 2.0**-7), torch.float16: (1.0, 2.0**-10)},
    "negative": {torch.bfloat16: (-3.0, 2.0**-6), torch.float16: (-3.0, 2.0**-9)},
    "smallest": {torch.bfloat16: (0.0, 2.0**-133), torch.float16: (0.0, 2.0**-24)},
    "subnormal": {torch.bfloat16: (2.0**-128, 2.0**-133), torch.float16: (-(2.0**-17), 2.0**-24)},
}


@pytest.mark.parametrize("part", [2.0**-10, 0.0437, 0.5, 0.93])
@pytest.mark.parametrize("start", STARTS)
@narrow_dtypes
def test_the_mean_is_exact(narrow: torch.dtype, start: str, part: float) -> None:
    """Rounding to nearest would lose small steps altogether."""
    origin, step = STARTS[start][narrow]
    n, calls = 4096, 512
    x = torch.full((n,), origin, dtype=narrow)
    g = torch.full((n,), step, dtype=narrow)
    y = (x[0].float() + np.float32(part) * g[0].float()).double().item()
    total = torch.zeros(n, dtype=torch.float64)
    for seed in range(calls):
        perturbed = sgd_step(x, g, seed, -part)
        assert ((perturbed == x) | (perturbed == x + g)).all()
        total += (perturbed.double() - origin) / step
    exact = (y - origin) / step
    error = math.sqrt(exact * (1 - exact) / (n * calls))
    assert abs(total.mean().item() / calls - exact) < SIGMAS * error
    each = total / calls - exact  # also of every element over the seeds
    deviation = math.sqrt(exact * (1 - exact) / calls)
    assert each.square().mean().sqrt().item() == pytest.approx(
        deviation, rel=SIGMAS * math.sqrt((2 + 1 / (exact * calls)) / n)
    )
    if part < 0.5:
        lost = abs((sgd_step(x, g, None, -part)[0].double().item() - y) / step)
        assert lost > SIGMAS * error


@functools.cache
def ups(seed: int, narrow: torch.dtype) -> tuple[Tensor, ...]:
    """How x and m of two tensors of many elements, each half way between numbers, are rounded."""
    n = 2**18
    ulp = torch.finfo(narrow).eps
    x, m, g = (
        [torch.full((n,), value, dtype=narrow) for _ in range(2)] for value in (3.0, 2.0, ulp / 2)
    )
    kernels.sgd_step(x, g, m, lr=1.0, momentum=0.5, rounding_seed=seed)  # 1 + ulp / 2; 2 - ulp / 2
    return tuple(torch.where(t > t.min(), 1.0, -1.0) for t in (x[0], x[1], m[0], m[1]))


@pytest.mark.parametrize("seed", [0, 1, 2**16, SEED, 2**24 - 2])
@narrow_dtypes
def test_elements_tensors_outputs_and_seeds_are_independent(seed: int, narrow: torch.dtype) -> None:
    x, other, m, other_m = ups(seed, narrow)
    next_x, _, next_m, _ = ups(seed + 1, narrow)
    pairs = [(x, other), (x, m), (m, other_m), (other, m), (x, next_x), (m, next_m), (x, next_m)]
    pairs += [(x[:-lag], x[lag:]) for lag in (1, 2, 3, 4, 7, 8, 16, 64, 256, 4096, 2**16)]
    for a, b in pairs:
        assert abs((a * b).sum().item()) < SIGMAS * math.sqrt(a.numel())
    for t in (x, other, m, other_m):
        assert abs(t.sum().item()) < SIGMAS * math.sqrt(t.numel())


@narrow_dtypes
def test_second_moments_have_bits_of_their_own(narrow: torch.dtype) -> None:
    """m <- 0 + 0.3 d, v <- 0 + 0.3 d^2: each between two numbers, as x is."""
    d = torch.full((2**16,), 1 + 5 * torch.finfo(narrow).eps, dtype=narrow)
    x, m, v = (torch.zeros_like(d) for _ in range(3))
    options = {"lr": 1e-3, "beta1": 0.7, "beta2": 0.7, "step": 3, "rounding_seed": SEED}
    kernels.adamw_step([x], [d], [m], [v], **options)
    output = [torch.where(t == t.max(), 1.0, 0.0) for t in (x, m, v)]
    assert all(0.1 < t.mean().item() < 0.9 for t in output)
    correlation = torch.corrcoef(torch.stack(output)) - torch.eye(3)
    assert correlation.abs().max().item() < SIGMAS / math.sqrt(d.numel())


@narrow_dtypes
def test_bits_depend_on_where_an_element_is_and_on_nothing_else(
    backend: KernelBackend, narrow: torch.dtype
) -> None:
    """They depend on the tensor's index in its list, not on alignment or other tensors."""
    n = 777
    values, grads = (nonzero((n,), narrow).to(backend.device) for _ in range(2))

    def third(shift: int, *before: int) -> Tensor:
        x = [torch.ones(size, dtype=narrow, device=backend.device) for size in before]
        g = [torch.ones_like(t) for t in x]
        memory = torch.zeros(n + shift, dtype=narrow, device=backend.device)
        x.append(memory[shift:].copy_(values))
        g.append(grads)
        kernels.sgd_step(x, g, lr=0.01, rounding_seed=SEED, backend=backend.name)
        return x[-1].clone()

    expected = third(0, 0, 0)
    for shift in range(1, 18):
        assert same_bits(third(shift, 5, 0), expected)
    assert same_bits(third(0, 4099, 1), expected)
    assert not same_bits(third(0, 0), expected)


@narrow_dtypes
def test_elements_are_numbered_as_they_lie_in_memory(
    backend: KernelBackend, narrow: torch.dtype
) -> None:
    flat, grads = (nonzero((210,), narrow).to(backend.device) for _ in range(2))
    expected = sgd_step(flat, grads, SEED, 0.01, backend=backend.name)
    x = flat.clone()
    kernels.sgd_step(
        [x.view(2, 3, 5, 7).permute(0, 3, 1, 2)],
        [grads.view(2, 3, 5, 7).permute(0, 3, 1, 2)],
        lr=0.01,
        rounding_seed=SEED,
        backend=backend.name,
    )
    assert same_bits(x, expected)


BAD_SEEDS = [
    -1,
    0.5,
    2**24,
    math.nan,
    math.inf,
    np.float32(-0.5),
    torch.tensor(-1.0),
    torch.tensor([2.0**24], dtype=torch.float64),
]


@pytest.mark.parametrize("seed", BAD_SEEDS, ids=str)
@pytest.mark.parametrize("backend_name", ["native", "reference"])
def test_a_seed_out_of_range_is_refused(backend_name: str, seed: Any) -> None:
    lists = [[torch.ones(4, dtype=torch.bfloat16)] for _ in range(4)]
    message = r"^rounding_seed must be a whole number from 0 to 2\*\*24 - 1, and is "
    with pytest.raises(ValueError, match=message):
        kernels.sgd_step(*lists[:3], lr=0.1, rounding_seed=seed, backend=backend_name)
    with pytest.raises(ValueError, match=message):
        kernels.adamw_step(*lists, lr=0.1, step=1, rounding_seed=seed, backend=backend_name)
    assert all((t == 1).all() for (t,) in lists)


@narrow_dtypes
def test_small_steps_arrive(narrow: torch.dtype) -> None:
    """Gradient descent on x^2 / 2 from 1 with a step that is lost: exp(-3) after 3 / lr steps.

    Every step adds a variance of at most ulp lr x <= eps lr x^2, and earlier ones shrink as x^2
    does: 3 eps exp(-6) in all.
    """
    eps = torch.finfo(narrow).eps
    lr, n = eps / 8, 512
    steps = int(3 / lr)
    stalled, x = (torch.ones(n, dtype=narrow) for _ in range(2))
    for seed in range(steps):
        kernels.sgd_step([x], [x.clone()], lr=lr, rounding_seed=seed)
    for _ in range(3):
        kernels.sgd_step([stalled], [stalled.clone()], lr=lr)
    assert (stalled == 1).all()
    error = math.sqrt(3 * eps * math.exp(-6) / n)
    assert abs(x.double().mean().item() - (1 - lr) ** steps) < SIGMAS * error
