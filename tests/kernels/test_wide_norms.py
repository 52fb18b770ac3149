"""Norms and searches for what is not finite, of gradients wider than their parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cases import WIDER, Arena, KernelBackend, places
from eigenfilter import _core, kernels
from tolerances import NORM, exact

# What rounds to infinity in the parameter's dtype.
BEYOND = {torch.float16: 1e5, torch.bfloat16: 3.399e38, torch.float32: 1e39}

pairs = pytest.mark.parametrize(("dtype", "wide", "big"), WIDER.values(), ids=WIDER)
mixtures = pytest.mark.parametrize("mixed", [False, True], ids=["wide", "mixed"])


@pairs
@mixtures
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_norms_beyond_the_parameters_range(
    backend: KernelBackend,
    dtype: torch.dtype,
    wide: torch.dtype,
    big: float,
    mixed: bool,
    weighted: bool,
) -> None:
    arena, narrow = (Arena(t, 1, places(dtype), backend.device) for t in (wide, dtype))
    weights = Arena(dtype, 1, device=backend.device, shifts=[1])
    for a in (arena, narrow, weights):
        a.fill(0)
    arena.memory[0].mul_(big)
    tensors = [narrow.lists[0][i] if mixed and i % 2 else t for i, t in enumerate(arena.lists[0])]
    by = weights.lists[0] if weighted else None
    expected = np.longdouble(0)
    for i, t in enumerate(tensors):
        w = exact(by[i]) if by is not None else 1
        expected = expected + ((exact(t).astype(np.longdouble) * w) ** 2).sum()
    out = torch.empty((), dtype=torch.float64, device=backend.device)
    kernels.norm(tensors, weights=by, out=out, backend=backend.name)
    assert out.item() == pytest.approx(float(np.sqrt(expected)), rel=NORM[torch.float64])
    allocated = kernels.norm(tensors, weights=by, backend=backend.name)
    assert allocated.dtype == (torch.float64 if wide == torch.float64 else torch.float32)
    assert allocated.item() == pytest.approx(out.item(), rel=NORM[allocated.dtype])


@pairs
@mixtures
@pytest.mark.usefixtures("threads")
def test_norms_are_the_same_for_every_instruction_set_and_number_of_threads(
    dtype: torch.dtype, wide: torch.dtype, big: float, mixed: bool
) -> None:
    arena, narrow = Arena(wide, 1, places(dtype)), Arena(dtype, 2)
    arena.fill(0)
    narrow.fill(0, 1)
    tensors = [narrow.lists[0][i] if mixed and i % 2 else t for i, t in enumerate(arena.lists[0])]
    for weights in (None, narrow.lists[1]):
        results = set()
        for isa in _core.isas():
            _core.set_isa(isa)
            for count in (1, 2, 8):
                torch.set_num_threads(count)
                out = torch.empty((), dtype=torch.float64)
                results.add(kernels.norm(tensors, weights=weights, out=out).item())
        assert len(results) == 1


def test_a_norm_of_float32_may_exceed_it(backend: KernelBackend) -> None:
    t = torch.full((40,), 3e38, device=backend.device)
    assert kernels.norm([t], backend=backend.name).isinf()
    out = torch.empty((), dtype=torch.float64, device=backend.device)
    kernels.norm([t], out=out, backend=backend.name)
    assert out.item() == pytest.approx(t[0].item() * 40**0.5, rel=1e-14)


@pairs
@mixtures
def test_only_what_is_not_finite_is_flagged(
    backend: KernelBackend, dtype: torch.dtype, wide: torch.dtype, big: float, mixed: bool
) -> None:
    tensors = [
        torch.full((67,), BEYOND[dtype], dtype=wide, device=backend.device) for _ in range(3)
    ]
    assert tensors[0].to(dtype).isinf().all()
    if mixed:
        tensors[1] = torch.ones(67, dtype=dtype, device=backend.device)
    flag_value = torch.zeros(1, device=backend.device)
    kernels.flag_nonfinite(tensors, flag_value, backend=backend.name)
    assert flag_value == 0
    for i in range(3):
        for bad in (torch.inf, torch.nan):
            spoiled = [t.clone() for t in tensors]
            spoiled[i][66] = bad
            kernels.flag_nonfinite(spoiled, flag_value.zero_(), backend=backend.name)
            assert flag_value == 1
