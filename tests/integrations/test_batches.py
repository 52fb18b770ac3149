"""Copies of batches."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch

from eigenfilter.integrations._batches import copy_of

Pair = namedtuple("Pair", "x y")
X = torch.arange(3.0)
BATCHES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, "name", None),
    "named tuple": Pair(X, [X]),
    "list": [X, {"deep": (X,)}],
    "dict": {"x": X, "label": 3},
    "ordered": OrderedDict(b=X, a=X),
    "default": defaultdict(list, x=[X]),
    "of a framework": UserDict({"x": X}),
}


def tensors(batch: Any) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, (dict, UserDict)):
        batch = list(batch.values())
    return [t for each in batch for t in tensors(each)] if isinstance(batch, (list, tuple)) else []


@pytest.mark.parametrize("name", BATCHES)
def test_a_copy_has_its_own_containers_and_tensors(name: str) -> None:
    batch = BATCHES[name]
    for copied, is_same in ((copy_of(batch), False), (copy_of(batch, tensors=False), True)):
        assert type(copied) is type(batch)
        assert str(copied) == str(batch)
        assert copied is not batch or name == "tensor"
        for t, original in zip(tensors(copied), tensors(batch), strict=True):
            assert (t is original) == is_same
            assert torch.equal(t, original)


def test_a_dictionary_can_lose_an_entry() -> None:
    batch = {"x": X, "nested": {"labels": X}}
    copied = copy_of(batch)
    copied["nested"].pop("labels")
    del copied["x"]
    assert list(batch) == ["x", "nested"]
    assert list(batch["nested"]) == ["labels"]


def test_gradients_reach_what_is_trained() -> None:
    """A parameter that is passed with a batch, and a tensor that is computed from one."""
    leaf = torch.nn.Parameter(torch.ones(2))
    copied, computed = copy_of((leaf, 2 * leaf))
    (copied + computed).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [3.0, 3.0]


def test_batches_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for kind in (transformers.BatchEncoding, transformers.BatchFeature):
        batch = kind({"input_ids": X, "labels": X})
        copied = copy_of(batch)
        assert type(copied) is kind
        copied.pop("labels")
        assert set(batch.keys()) == {"input_ids", "labels"}
        assert copied["input_ids"] is not batch["input_ids"]
