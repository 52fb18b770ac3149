"""perturb without saving against exact arithmetic: x <- x + alpha g / grad_scale, or from b."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import ALPHA, SCALE, Arena, KernelBackend, same_bits
from eigenfilter import kernels
from tolerances import assert_near, exact

X, G, B = range(3)

anchors = pytest.mark.parametrize("anchored", [False, True], ids=["from x", "from b"])


def assert_perturbed(
    backend: KernelBackend,
    dtype: torch.dtype,
    anchored: bool,
    scale: float | None,
    flag: float | None,
) -> None:
    """Fail unless x is perturbed as it should be; with backups it must not be read, and is NaN."""
    arena = Arena(dtype, 3, device=backend.device)
    arena.fill(G, B if anchored else X)
    before = [arena.values(i) for i in (X, G, B)]
    x, g, b = arena.lists
    kernels.perturb(
        x,
        g,
        b if anchored else None,
        ALPHA,
        save=False,
        grad_scale=tensor(scale, backend),
        found_inf=tensor(flag, backend),
        backend=backend.name,
    )
    arena.assert_margins_untouched()
    assert same_bits(arena.values(G), before[G])
    assert same_bits(arena.values(B), before[B])
    if flag:
        assert same_bits(arena.values(X), before[X])
        return
    origin = exact(before[B if anchored else X])
    move = np.longdouble(ALPHA) / np.longdouble(np.float32(scale or 1.0)) * exact(before[G])
    assert_near(arena.values(X), origin + move, np.abs(origin) + np.abs(move))


def tensor(value: float | None, backend: KernelBackend) -> Tensor | None:
    return None if value is None else torch.tensor([value], device=backend.device)


@anchors
@pytest.mark.parametrize("scale", [None, SCALE])
def test_perturb_unsaved(
    backend: KernelBackend, dtype: torch.dtype, anchored: bool, scale: float | None
) -> None:
    assert_perturbed(backend, dtype, anchored, scale, None)


@anchors
@pytest.mark.parametrize("flag", [0.0, 1.0, 2.0])
def test_found_inf_leaves_x_where_it_is(
    backend: KernelBackend, dtype: torch.dtype, anchored: bool, flag: float
) -> None:
    assert_perturbed(backend, dtype, anchored, SCALE, flag)


@anchors
@pytest.mark.parametrize("adaptive", [False, True])
def test_it_perturbs_as_after_saving(
    backend: KernelBackend, dtype: torch.dtype, anchored: bool, adaptive: bool
) -> None:
    """The bits agree: from backups, whatever x is by then, or from x where the ascent began."""
    arena = Arena(dtype, 3, device=backend.device)
    arena.fill(X, G)
    x, g, b = arena.lists
    kernels.perturb(x, g, b, ALPHA, adaptive=adaptive, backend=backend.name)
    expected = arena.values(X)
    if anchored:
        arena.memory[X].fill_(torch.nan)
    else:
        torch._foreach_copy_(x, b)
    origin = b if anchored else None
    kernels.perturb(x, g, origin, ALPHA, save=False, adaptive=adaptive, backend=backend.name)
    assert same_bits(arena.values(X), expected)
