"""Lists of any length: few tensors and many go to a GPU in two forms, and in several launches."""

from __future__ import annotations

import pytest
import torch

from cases import UPDATES, KernelBackend, Update, same_bits
from eigenfilter import kernels


def fitting(roles: int, argument_bytes: int) -> int:
    """How many tensors go into one launch whose arguments take so much; see multi_tensor.cuh."""
    return (argument_bytes - 512 - 16) // (8 * roles + 8)


def numbers(roles: int, backend: KernelBackend) -> list[int]:
    """Below, at and above what one launch takes, in either form; others have no such forms."""
    few, many = fitting(roles, 4096), fitting(roles, 32764)
    if backend.name != "native":
        return [1, few]
    return [1, few - 1, few, few + 1, many, many + 1, many + few]


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_updates_of_any_number_of_tensors(fast_backend: KernelBackend, update: Update) -> None:
    for n in numbers(len(update.lists), fast_backend):
        results = []
        for backend in (fast_backend, KernelBackend("reference", fast_backend.device)):
            torch.manual_seed(n)
            arena = update.arena(torch.float32, [3] * n, backend.device)
            update(arena.lists, backend=backend.name)
            arena.assert_margins_untouched()
            results.append([arena.values(i).cpu() for i in range(len(arena.lists))])
        assert all(map(same_bits, *results)), n


@pytest.mark.parametrize("lists", [1, 2])
def test_norms_of_any_number_of_tensors(fast_backend: KernelBackend, lists: int) -> None:
    for n in numbers(lists, fast_backend):
        tensors, weights = (
            torch.rand(2, n, 3, dtype=torch.float64, device=fast_backend.device) + 0.5
        )
        inputs = {"weights": list(weights)} if lists == 2 else {}
        norm = kernels.norm(list(tensors), **inputs, backend=fast_backend.name)
        expected = torch.linalg.vector_norm(tensors * weights if lists == 2 else tensors)
        torch.testing.assert_close(norm, expected, rtol=1e-13, atol=0)


def test_the_flag_of_any_number_of_tensors(fast_backend: KernelBackend) -> None:
    for n in numbers(1, fast_backend):
        tensors = list(torch.ones(n, 3, device=fast_backend.device))
        result = torch.zeros(1, device=fast_backend.device)
        kernels.flag_nonfinite(tensors, result, backend=fast_backend.name)
        assert result.item() == 0, n
        tensors[-1][-1] = torch.inf
        kernels.flag_nonfinite(tensors, result, backend=fast_backend.name)
        assert result.item() == 1, n
