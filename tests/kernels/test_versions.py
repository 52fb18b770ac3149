"""Autograd learns what was written: versions grow, and those of what was only read do not."""

from __future__ import annotations

import pytest
import torch

from cases import UPDATES, KernelBackend, Update
from eigenfilter import kernels


@pytest.mark.parametrize("flag_value", [None, 0.0, 1.0])
@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_updates_bump_the_versions_of_what_they_write(
    backend: KernelBackend, update: Update, flag_value: float | None
) -> None:
    """Versions grow also where a flag on the device stops the update."""
    flag = None if flag_value is None else torch.tensor(flag_value, device=backend.device)
    lists = [[torch.ones(3, device=backend.device) for _ in range(2)] for _ in update.lists]
    update(lists, found_inf=flag, backend=backend.name)
    for role, tensors in zip(update.lists, lists, strict=True):
        assert all((t._version > 0) == (role in update.writes) for t in tensors), role


def test_a_norm_reads(backend: KernelBackend) -> None:
    t, w = torch.ones(3, device=backend.device), torch.ones(3, device=backend.device)
    kernels.norm([t], weights=[w], backend=backend.name)
    assert t._version == w._version == 0


def test_a_backward_pass_through_an_overwritten_parameter_is_refused(
    backend: KernelBackend,
) -> None:
    for update in UPDATES:
        lists = [[torch.ones(3, device=backend.device)] for _ in update.lists]
        x = lists[0][0].requires_grad_()
        loss = x.square().sum()
        update(lists, backend=backend.name)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
