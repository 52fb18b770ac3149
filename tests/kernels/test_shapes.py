"""Tensors of any shape: without elements, and with dimensions in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import UPDATES, KernelBackend, Update, nonzero, same_bits
from eigenfilter import kernels


def results(update: Update, lists: list[list[Tensor]], backend: str) -> list[Tensor]:
    """All tensors after the update of copies, which keep their strides."""
    copies = [[t.clone() for t in tensors] for tensors in lists]
    update(copies, backend=backend)
    return [t for tensors in copies for t in tensors]


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_dimensions_in_any_order(
    fast_backend: KernelBackend, dtype: torch.dtype, update: Update
) -> None:
    def permuted() -> Tensor:
        t = nonzero((2, 3, 5, 7), dtype).to(fast_backend.device)
        return (t.abs() if "exp_avg_sqs" in update.lists else t).permute(0, 2, 3, 1)

    lists = [[permuted()] for _ in update.lists]
    result, expected = (results(update, lists, b) for b in (fast_backend.name, "reference"))
    assert result[0].stride() == lists[0][0].stride()
    assert all(map(same_bits, result, expected))


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_updates_of_nothing(backend: KernelBackend, dtype: torch.dtype, update: Update) -> None:
    shapes = ((0,), (0, 3))
    lists = [
        [torch.zeros(s, dtype=dtype, device=backend.device) for s in shapes] for _ in update.lists
    ]
    update(lists, backend=backend.name)


def test_reductions_of_nothing(backend: KernelBackend, dtype: torch.dtype) -> None:
    empty = [torch.zeros(shape, dtype=dtype, device=backend.device) for shape in ((0,), (0, 3))]
    result = torch.zeros(1, device=backend.device)
    kernels.flag_nonfinite(empty, result, backend=backend.name)
    assert result == 0
    options: dict[str, Any] = {"out": None, "backend": backend.name}
    for weights in (None, empty):
        assert kernels.norm(empty, weights=weights, **options) == 0
