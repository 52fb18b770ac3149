"""Copies of batches."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from eigenfilter.integrations._batches import copy_of

Pair = namedtuple("Pair", "x y")
X = torch.arange(3.0)


@dataclass
class Data:
    x: Any
    y: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any


@dataclass(slots=True)
class Slots:
    x: Any
    y: Any


class Moved:
    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: Any) -> Moved:
        return self


class Plain:
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y


BATCHES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, "name", None),
    "named tuple": Pair(X, [X]),
    "list": [X, {"deep": (X,)}],
    "dict": {"x": X, "label": 3},
    "ordered": OrderedDict(b=X, a=X),
    "default": defaultdict(list, x=[X]),
    "of a framework": UserDict({"x": X}),
    "arguments": partial(print, X, 3, end=[X]),
    "dataclass": Data(X, {"deep": [X]}),
    "frozen": Frozen(X, (X,)),
    "slots": Slots(X, [X]),
    "object with to": Moved([X]),
    "object with tensors": Plain(X, {"deep": X}),
    "object in a dict": {"inside": Plain(X, Data(X, None))},
}


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """The tensors of BATCHES, found by pickling."""
    found = []

    class Finder(pickle.Pickler):
        def persistent_id(self, obj: Any) -> None:
            if isinstance(obj, torch.Tensor):
                found.append(obj)

    Finder(io.BytesIO()).dump(batch)
    return found


@pytest.mark.parametrize("name", BATCHES)
def test_a_copy_has_its_own_containers_and_tensors(name: str) -> None:
    batch = BATCHES[name]
    copied = copy_of(batch)
    assert type(copied) is type(batch)
    assert copied is not batch
    assert len(tensors_of(batch)) > 0
    for t, original in zip(tensors_of(copied), tensors_of(batch), strict=True):
        assert t is not original
        assert torch.equal(t, original)


@pytest.mark.parametrize("name", ["dataclass", "slots", "object with tensors"])
def test_an_attribute_can_be_replaced(name: str) -> None:
    batch = BATCHES[name]
    copied = copy_of(batch)
    copied.x = copied.x + 1
    copied.y.clear()
    assert batch.x is X
    assert len(batch.y) == 1


def test_arrays() -> None:
    array = np.zeros(2)
    copied = copy_of({"x": array})
    copied["x"] += 1
    assert array.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), print, torch.Tensor, "name", Moved])
def test_what_is_no_batch_is_not_copied(other: Any) -> None:
    assert copy_of([other])[0] is other


def test_a_dictionary_can_lose_an_entry() -> None:
    batch = {"x": X, "nested": {"labels": X}}
    copied = copy_of(batch)
    copied["nested"].pop("labels")
    del copied["x"]
    assert list(batch) == ["x", "nested"]
    assert list(batch["nested"]) == ["labels"]


def test_a_parameter_stays() -> None:
    leaf = torch.nn.Parameter(torch.ones(2))
    copied, _ = copy_of((leaf, X))
    assert copied is leaf


@pytest.mark.parametrize("holder", [list, UserDict, Plain])
def test_what_is_computed_from_a_parameter_is_refused(holder: Any) -> None:
    computed = 2 * torch.nn.Parameter(torch.ones(2))
    batch = {list: [computed], UserDict: UserDict(x=computed), Plain: Plain(computed, None)}[holder]
    with pytest.raises(RuntimeError, match="A tensor of the batch was computed from one that requ"):
        copy_of(batch)


def test_batches_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for kind in (transformers.BatchEncoding, transformers.BatchFeature):
        batch = kind({"input_ids": X, "labels": X})
        copied = copy_of(batch)
        assert type(copied) is kind
        copied.pop("labels")
        assert set(batch.keys()) == {"input_ids", "labels"}
        assert copied["input_ids"] is not batch["input_ids"]
