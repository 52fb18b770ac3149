"""perturb_hvp against exact arithmetic: x <- b + alpha (g - g0) / (eps grad_scale)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import ALPHA, DISPLACEMENT, SCALE, Arena, KernelBackend, nonzero, same_bits
from eigenfilter import kernels
from tolerances import Exact, assert_near, exact

X, G, G0, B = range(4)


def expected(b: Tensor, g: Tensor, g0: Tensor, scale: float) -> tuple[Exact, Exact]:
    """(x, sizes of its terms): b and the step along the difference, which is one term."""
    step = np.longdouble(ALPHA) / np.longdouble(DISPLACEMENT) / np.longdouble(np.float32(scale))
    move = step * (exact(g) - exact(g0))
    return exact(b) + move, np.abs(exact(b)) + np.abs(move)


def assert_perturbs_along_product(
    backend: KernelBackend, dtype: torch.dtype, scale: float | None, flag: float | None
) -> None:
    """Fail unless x is perturbed as it should be; it must not be read, and is NaN before."""
    arena = Arena(dtype, 4, device=backend.device)
    arena.fill(G, G0, B)
    before = [arena.values(i) for i in (X, G, G0, B)]
    kernels.perturb_hvp(
        *arena.lists,
        ALPHA,
        DISPLACEMENT,
        grad_scale=tensor(scale, backend),
        found_inf=tensor(flag, backend),
        backend=backend.name,
    )
    arena.assert_margins_untouched()
    assert all(same_bits(arena.values(i), before[i]) for i in (G, G0, B))
    if flag:
        assert same_bits(arena.values(X), before[X])
        return
    assert_near(arena.values(X), *expected(before[B], before[G], before[G0], scale or 1.0))


def tensor(value: float | None, backend: KernelBackend) -> Tensor | None:
    return None if value is None else torch.tensor([value], device=backend.device)


@pytest.mark.parametrize("scale", [None, SCALE])
def test_perturb_hvp(backend: KernelBackend, dtype: torch.dtype, scale: float | None) -> None:
    assert_perturbs_along_product(backend, dtype, scale, None)


@pytest.mark.parametrize("flag", [0.0, 1.0, 2.0])
def test_found_inf_leaves_x_where_it_is(
    backend: KernelBackend, dtype: torch.dtype, flag: float
) -> None:
    assert_perturbs_along_product(backend, dtype, SCALE, flag)


def test_neighboring_gradients_are_subtracted_before_anything_rounds(
    backend: KernelBackend, dtype: torch.dtype
) -> None:
    """x starts at 0, so that it becomes their difference, a unit in the last place."""
    g0 = nonzero((1000,), dtype)
    g = (g0.double() * (1 + torch.finfo(dtype).eps)).to(dtype)
    assert not torch.equal(g, g0)
    x, zero = torch.full_like(g, torch.nan), torch.zeros_like(g)
    x, b, g, g0 = (t.to(backend.device) for t in (x, zero, g, g0))
    kernels.perturb_hvp([x], [g], [g0], [b], ALPHA, DISPLACEMENT, backend=backend.name)
    assert_near(x, *expected(zero, g, g0, 1.0))


def test_a_list_may_be_both_gradients(backend: KernelBackend, dtype: torch.dtype) -> None:
    arena = Arena(dtype, 3, device=backend.device)
    arena.fill(1, 2)
    x, g, b = arena.lists
    kernels.perturb_hvp(x, g, g, b, ALPHA, DISPLACEMENT, backend=backend.name)
    assert same_bits(arena.values(0), arena.values(2))


def test_of_a_quadratic_it_is_the_product_with_the_hessian(backend: KernelBackend) -> None:
    """x <- b + alpha H grad f(b), up to the rounding of gradients over eps."""
    root = torch.randn(40, 40, dtype=torch.float64, device=backend.device)
    hessian, b = root @ root.T / 40, nonzero((40,), torch.float64).to(backend.device)
    g0 = hessian @ b
    g = hessian @ (b + DISPLACEMENT * g0)
    x = torch.full_like(b, torch.nan)
    kernels.perturb_hvp([x], [g], [g0], [b], ALPHA, DISPLACEMENT, backend=backend.name)
    torch.testing.assert_close(x, b + ALPHA * hessian @ g0, rtol=1e-12, atol=1e-12)
