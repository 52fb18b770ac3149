"""All backends round alike: nothing is fused, and narrow types round as torch rounds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    ADAMW_DESCENTS,
    ALPHA,
    DESCENTS,
    SCALE,
    SEED,
    UPDATES,
    AdamWDescent,
    Descent,
    KernelBackend,
    Update,
    bits,
    every_pattern,
    places,
    same_bits,
    spacing,
)
from eigenfilter import kernels

NARROW = (torch.bfloat16, torch.float16)
ULPS = (0.5, -0.5, 0.25, 0.75, 1.5, 2.5, 0.5 + 2.0**-20, 0.5 - 2.0**-20, -0.5 - 2.0**-20)
FACTORS = (1.0, -1.0, 0.5, 1.2345e-3, 0.7071, 2.0**-11, 3.0001e4)


def assert_agrees_with_reference(
    update: Update, backend: KernelBackend, dtype: torch.dtype, **options: Any
) -> None:
    """Fail unless the backend's result equals the reference's in every bit of all lists."""
    results = []
    for name in (backend.name, "reference"):
        torch.manual_seed(5)
        arena = update.arena(dtype, places(dtype, few=True), backend.device)
        scale = torch.tensor(SCALE, device=backend.device)
        update(arena.lists, **options, grad_scale=scale, backend=name)
        arena.assert_margins_untouched()
        results.append([arena.values(i) for i in range(len(update.lists))])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_updates_are_the_references_bit_for_bit(
    fast_backend: KernelBackend, dtype: torch.dtype, update: Update
) -> None:
    assert_agrees_with_reference(update, fast_backend, dtype)


@pytest.mark.parametrize("rounding_seed", [None, 0, SEED])
@pytest.mark.parametrize("case", DESCENTS, ids=str)
def test_sgd_step_is_the_reference_bit_for_bit(
    fast_backend: KernelBackend, dtype: torch.dtype, case: Descent, rounding_seed: int | None
) -> None:
    lists = ["params", "grads"]
    lists += ["momenta"] if case.momentum != "none" else []
    lists += ["backups"] if case.backups else []
    options = case.options() | {"rounding_seed": rounding_seed}
    assert_agrees_with_reference(Update("sgd_step", tuple(lists), (), options), fast_backend, dtype)


@pytest.mark.parametrize("rounding_seed", [None, SEED])
@pytest.mark.parametrize("step", [2, 3, 100, 4097])
@pytest.mark.parametrize("case", ADAMW_DESCENTS[4:], ids=str)
def test_adamw_step_is_the_reference_bit_for_bit(
    fast_backend: KernelBackend,
    dtype: torch.dtype,
    case: AdamWDescent,
    step: int,
    rounding_seed: int | None,
) -> None:
    """Betas near 1: how their powers round shows in float64, 1 - beta^step being small."""
    options = case.options() | {"beta1": 0.9951, "beta2": 0.99973, "step": step}
    assert_agrees_with_reference(
        UPDATES[-1], fast_backend, dtype, **options, rounding_seed=rounding_seed
    )


@pytest.mark.parametrize("alpha", [ALPHA, 0.05, 1 / 3])
@pytest.mark.parametrize("update", [u for u in UPDATES if "alpha" in u.options], ids=str)
def test_ascents_are_the_references_bit_for_bit(
    fast_backend: KernelBackend, dtype: torch.dtype, update: Update, alpha: float
) -> None:
    """Several alphas: alpha (1 / scale) and alpha / scale often round alike."""
    assert_agrees_with_reference(update, fast_backend, dtype, alpha=alpha)


def perturb(x: Tensor, g: Tensor, alpha: float, backend: KernelBackend) -> Tensor:
    x, g = x.to(backend.device), g.to(backend.device)
    kernels.perturb([x], [g], [torch.empty_like(x)], alpha, backend=backend.name)
    return x.cpu()


def assert_rounded(actual: Tensor, wide: Tensor) -> None:
    """Fail unless `actual` is `wide` rounded by torch, apart from which NaN it is."""
    expected = wide.to(actual.dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(bits(actual[~actual.isnan()]), bits(expected[~expected.isnan()]))


@pytest.mark.parametrize("narrow", NARROW)
def test_the_spacing_used_below_is_that_of_the_dtype(narrow: torch.dtype) -> None:
    x = every_pattern(narrow)
    x = x[x.isfinite() & (bits(x) >= 0)]  # from +0 on, in order
    assert torch.equal(x[1:], (x.double() + spacing(x).double())[:-1].to(narrow))
    assert (spacing(x) > 0).all()


@pytest.mark.parametrize("ulps", ULPS)
@pytest.mark.parametrize("narrow", NARROW)
def test_every_number_with_every_kind_of_rounding(
    backend: KernelBackend, narrow: torch.dtype, ulps: float
) -> None:
    """Ties and near ties at every number; at the largest they decide between it and infinity."""
    x = every_pattern(narrow)
    g = spacing(x)
    assert_rounded(perturb(x.clone(), g, ulps, backend), x.float() + ulps * g.float())


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("narrow", NARROW)
def test_every_number_times_a_factor(
    backend: KernelBackend, narrow: torch.dtype, factor: float
) -> None:
    """x starts at 0, so that the product alone is rounded: to subnormals, to infinity."""
    g = every_pattern(narrow)
    zero = torch.zeros_like(g)
    wide = zero.float() + torch.tensor(factor, dtype=torch.float32) * g.float()
    assert_rounded(perturb(zero.clone(), g, factor, backend), wide)


@pytest.mark.parametrize("narrow", NARROW)
def test_a_step_of_length_zero_returns_every_number(
    backend: KernelBackend, narrow: torch.dtype
) -> None:
    x = every_pattern(narrow).to(backend.device)
    before, g = x.clone(), torch.ones_like(x)
    kernels.sgd_step([x], [g], lr=0.0, backend=backend.name)
    saved = ~before.isnan()
    assert torch.equal(bits(x[saved]), bits(before[saved]))
    assert x[~saved].isnan().all()


def test_products_are_rounded_before_they_are_added(backend: KernelBackend) -> None:
    """(1 + e)^2 - 1 - 2 e is e^2 with a fused multiply-add, and 0 without."""
    for dtype, e in ((torch.float32, 2.0**-13), (torch.float64, 2.0**-28)):
        x = torch.full((67,), -1 - 2 * e, dtype=dtype, device=backend.device)
        g = torch.full_like(x, 1 + e)
        kernels.perturb([x], [g], [torch.empty_like(x)], 1 + e, backend=backend.name)
        assert (x == 0).all()
