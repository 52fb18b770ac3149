"""Backups are bit-for-bit copies, whatever the bits mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import UPDATES, KernelBackend, Update, bits, same_bits
from eigenfilter import kernels

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_bits(dtype: torch.dtype, n: int = 70_001) -> Tensor:
    """Random patterns, a third of them NaN with every kind of payload, quiet and signaling."""
    integer = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integer)
    t = torch.randint(limits.min, limits.max, (n,), dtype=integer)
    exponent = bits(torch.tensor(torch.inf, dtype=dtype))
    t[::3] |= exponent
    return t.view(dtype)


def test_the_patterns_hold_what_they_promise(dtype: torch.dtype) -> None:
    t = any_bits(dtype)
    assert t.isnan().sum() > t.numel() // 4
    assert len(set(bits(t[t.isnan()]).tolist())) > 100


@pytest.mark.parametrize("flag_value", [None, 0.0, 1.0])
def test_the_backup_has_every_bit(
    backend: KernelBackend, dtype: torch.dtype, flag_value: float | None
) -> None:
    x = any_bits(dtype).to(backend.device)
    before, g, b = x.clone(), torch.ones_like(x), torch.zeros_like(x)
    flag = None if flag_value is None else torch.tensor(flag_value, device=backend.device)
    kernels.perturb([x], [g], [b], 0.1, found_inf=flag, backend=backend.name)
    assert same_bits(b, before)
    assert same_bits(x, before) == bool(flag_value)


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_a_stopped_update_has_every_bit(
    backend: KernelBackend, dtype: torch.dtype, update: Update
) -> None:
    """Descents restore the parameters, perturb saves them, and nothing else is written."""
    lists = [[any_bits(dtype).to(backend.device)] for _ in update.lists]
    expected = {role: t.clone() for role, (t,) in zip(update.lists, lists, strict=True)}
    if "backups" in update.writes:
        expected["backups"] = expected["params"]
    elif update.restores:
        expected["params"] = expected[update.starts_from]
    update(lists, found_inf=torch.ones((), device=backend.device), backend=backend.name)
    for role, (t,) in zip(update.lists, lists, strict=True):
        assert same_bits(t, expected[role]), role


def test_a_stopped_descent_without_backups_leaves_every_bit(
    backend: KernelBackend, dtype: torch.dtype
) -> None:
    x = any_bits(dtype).to(backend.device)
    before, stop = x.clone(), torch.ones((), device=backend.device)
    kernels.sgd_step([x], [torch.ones_like(x)], lr=0.1, found_inf=stop, backend=backend.name)
    assert same_bits(x, before)
