"""TensorList equals a list, and notices changes of its tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import UPDATES, Update, same_bits
from eigenfilter import _core, kernels

SIZES = (3, 64, 1000)


def tensors(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(n) for n in SIZES]


def updated(update: Update, wrap: type) -> list[Tensor]:
    torch.manual_seed(1)
    lists = update.arena(torch.float32, SIZES).lists
    wrapped = [wrap(tensors) for tensors in lists]
    for _ in range(3):  # the second call finds memory it knows
        update(wrapped)
    return [t for tensors in lists for t in tensors]


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_results_are_a_lists(update: Update) -> None:
    for kind in (_core.TensorList, tuple):
        assert all(map(same_bits, updated(update, kind), updated(update, list)))


def test_norms_are_a_lists() -> None:
    grads, weights = tensors(1), tensors(2)
    tensor_lists = [_core.TensorList(t) for t in (grads, weights)]
    assert kernels.norm(tensor_lists[0]).item() == kernels.norm(grads).item()
    weighted = kernels.norm(tensor_lists[0], weights=tensor_lists[1])
    assert weighted.item() == kernels.norm(grads, weights=weights).item()


def test_only_perturb_fills_backups() -> None:
    for update in UPDATES:
        lists = [_core.TensorList(t) for t in update.arena(torch.float32, SIZES).lists]
        update(lists)
        filled = [role for role, t in zip(update.lists, lists, strict=True) if t.filled]
        assert filled == (["backups"] if "backups" in update.writes else [])


def test_it_is_a_sequence() -> None:
    members = tensors(1)
    tensor_list = _core.TensorList(t for t in members)
    assert len(tensor_list) == 3
    assert [id(t) for t in tensor_list] == [id(t) for t in members]
    assert tensor_list[-1] is members[-1]
    assert tensor_list[-3] is members[0]
    for i in (3, -4):
        with pytest.raises(IndexError, match="no such tensor"):
            tensor_list[i]


def test_it_does_not_follow_the_list_it_was_made_from() -> None:
    members = tensors(1)
    tensor_list = _core.TensorList(members)
    members.pop()
    assert len(tensor_list) == 3


def test_new_memory_behind_a_tensor_is_found() -> None:
    params, grads = [torch.nn.Parameter(t) for t in tensors(1)], tensors(2)
    tensor_list = _core.TensorList(params)
    kernels.sgd_step(tensor_list, grads, lr=0.1)
    old, new = params[1].data, torch.ones(64)
    before = old.clone()
    params[1].data = new
    kernels.sgd_step(tensor_list, grads, lr=0.1)
    assert torch.equal(old, before)
    torch.testing.assert_close(new, 1 - 0.1 * grads[1])


CHANGES = {
    "dtype": (lambda p: torch.ones(64, dtype=torch.float64), r"params\[1\] is float64"),
    "negated": (lambda p: torch._neg_view(torch.ones(64)), r"params\[1\] is lazily negated"),
    "shape": (lambda p: torch.ones(65), r"grads\[1\] has shape \(64\)"),
    "not dense": (lambda p: torch.ones(128)[::2], r"params\[1\] is not dense"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_new_memory_is_checked_as_the_old_was(change: str) -> None:
    make, message = CHANGES[change]
    params, grads = [torch.nn.Parameter(t) for t in tensors(1)], tensors(2)
    tensor_list = _core.TensorList(params)
    kernels.sgd_step(tensor_list, grads, lr=0.1)
    before = params[0].detach().clone()
    params[1].data = make(params[1])
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.sgd_step(tensor_list, grads, lr=0.1)
    assert torch.equal(params[0], before)


def test_memory_that_was_freed_is_noticed() -> None:
    params, grads = tensors(1), tensors(2)
    tensor_list = _core.TensorList(params)
    kernels.sgd_step(tensor_list, grads, lr=0.1)
    params[2].untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"params\[2\] has no memory of its own"):
        kernels.sgd_step(tensor_list, grads, lr=0.1)


def test_no_tensor_in_it_is_named_at_its_use() -> None:
    listed = _core.TensorList([torch.ones(3), None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"params\[1\] cannot be used: NoneType is not a tensor"):
        kernels.sgd_step(listed, [torch.ones(3)] * 2, lr=0.1)
