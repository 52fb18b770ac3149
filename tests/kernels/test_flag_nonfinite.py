"""flag_nonfinite finds one bad element anywhere, and nothing where there is none."""

from __future__ import annotations

import pytest
import torch

from cases import Arena, KernelBackend
from eigenfilter import kernels


def flagged(arena: Arena, backend: KernelBackend, before: float = 0.0) -> float:
    result = torch.tensor([before], device=backend.device)
    kernels.flag_nonfinite(arena.lists[0], result, backend=backend.name)
    return result.item()


@pytest.mark.parametrize("before", [0.0, 1.0, 3.0])
def test_finite_elements_leave_the_flag(
    backend: KernelBackend, dtype: torch.dtype, before: float
) -> None:
    arena = Arena(dtype, 1, device=backend.device)
    arena.fill(0)
    limits = torch.finfo(dtype)
    for t in arena.lists[0][4:]:
        t[:4] = torch.tensor([limits.max, limits.min, limits.tiny, 0.0], dtype=dtype)
        t[-1] = limits.max
    assert flagged(arena, backend, before) == before


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_one_bad_element_is_found_wherever_it_is(
    backend: KernelBackend, dtype: torch.dtype, bad: float
) -> None:
    arena = Arena(dtype, 1, device=backend.device)
    arena.fill(0)
    for t in arena.lists[0]:
        size = t.numel()
        for index in {0, size // 2, max(size - 2, 0), size - 1} if size else ():
            good = t[index].clone()
            t[index] = bad
            assert flagged(arena, backend) == 1, f"element {index} of {size}"
            t[index] = good
    assert flagged(arena, backend) == 0


def test_the_margins_are_not_looked_at(backend: KernelBackend, dtype: torch.dtype) -> None:
    arena = Arena(dtype, 1, device=backend.device, shifts=[3])
    arena.fill(0)
    assert flagged(arena, backend) == 0
    arena.assert_margins_untouched()
