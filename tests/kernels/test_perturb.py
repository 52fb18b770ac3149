"""perturb against exact arithmetic: b <- x, x <- x + alpha g / grad_scale (adaptive: x^2 g)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import ALPHA, SCALE, Arena, KernelBackend, same_bits
from eigenfilter import kernels
from tolerances import assert_near, exact

X, G, B = range(3)


def assert_perturbs(
    backend: KernelBackend,
    dtype: torch.dtype,
    scale: float | None,
    flag: float | None,
    adaptive: bool = False,
) -> None:
    arena = Arena(dtype, 3, device=backend.device)
    arena.fill(X, G)
    x, g = arena.values(X), arena.values(G)
    kernels.perturb(
        *arena.lists,
        ALPHA,
        adaptive=adaptive,
        grad_scale=tensor(scale, backend),
        found_inf=tensor(flag, backend),
        backend=backend.name,
    )
    arena.assert_margins_untouched()
    assert same_bits(arena.values(B), x)
    assert same_bits(arena.values(G), g)
    if flag:
        assert same_bits(arena.values(X), x)
        return
    move = np.longdouble(ALPHA) / np.longdouble(np.float32(scale or 1.0)) * exact(g)
    if adaptive:
        move *= exact(x) ** 2
    assert_near(arena.values(X), exact(x) + move, np.abs(exact(x)) + np.abs(move))


def tensor(value: float | None, backend: KernelBackend) -> Tensor | None:
    return None if value is None else torch.tensor([value], device=backend.device)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("scale", [None, SCALE])
def test_perturb(
    backend: KernelBackend, dtype: torch.dtype, scale: float | None, adaptive: bool
) -> None:
    assert_perturbs(backend, dtype, scale, None, adaptive)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("flag", [0.0, 1.0, 2.0])
def test_found_inf_keeps_x_and_still_saves_it(
    backend: KernelBackend, dtype: torch.dtype, flag: float, adaptive: bool
) -> None:
    assert_perturbs(backend, dtype, SCALE, flag, adaptive)


def test_the_ascent_of_a_scaled_gradient_does_not_overflow_on_its_way(
    backend: KernelBackend, dtype: torch.dtype
) -> None:
    """1 / grad_scale enters the coefficient, so that alpha g is never stored."""
    largest = torch.finfo(dtype).max
    x = torch.zeros(33, dtype=dtype, device=backend.device)
    g = torch.full_like(x, largest)
    scale = torch.tensor(1024.0, device=backend.device)
    kernels.perturb([x], [g], [torch.empty_like(x)], 4.0, grad_scale=scale, backend=backend.name)
    assert torch.equal(x, torch.full_like(x, largest / 256))


def test_where_a_parameter_is_zero_an_adaptive_ascent_leaves_it(
    backend: KernelBackend, dtype: torch.dtype
) -> None:
    x = torch.zeros(33, dtype=dtype, device=backend.device)
    x[::2] = 2.0
    expected = torch.where(x == 0, x, 2 - 4 * 0.25)
    kernels.perturb(
        [x], [torch.ones_like(x)], [torch.empty_like(x)], -0.25, adaptive=True, backend=backend.name
    )
    assert torch.equal(x, expected)
