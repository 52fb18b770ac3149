"""Copies of batches."""

from __future__ import annotations

import enum
import io
import pickle
import threading
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, SimpleNamespace
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


class Kind(enum.Enum):
    TRAIN = 1


class Moved:
    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: Any) -> Moved:
        return self


class Plain:
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y


class Holder:
    """Has its tensors in a dictionary alone."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors = tensors


class SlotsWithTo:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: Any) -> SlotsWithTo:
        return self


@dataclass
class Callable_(Data):
    def __call__(self) -> Any:
        return self.x


class Frame(MutableMapping[str, Any]):
    """A mapping of its own, without a method that copies it."""

    def __init__(self, **entries: Any) -> None:
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._entries[key] = value

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class ListWithMore(list[Any]):
    def __init__(self, values: Any, extra: Any) -> None:
        super().__init__(values)
        self.extra = extra

    def extend(self, values: Any) -> None:
        raise TypeError("fixed length")


class TupleWithMore(tuple[Any, ...]):
    extra: Any

    def __new__(cls, values: Any, extra: Any) -> TupleWithMore:
        made = super().__new__(cls, values)
        made.extra = extra
        return made


class ReadOnly(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("read-only")


class Delegating:
    """Fails where pickling asks an instance without attributes for a method."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getattr__(self, name: str) -> Any:
        return self.entries[name]


class FrozenSlots:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        object.__setattr__(self, "x", x)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen")


class ByAttribute(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


def objects() -> Any:
    array = np.empty(1, dtype=object)
    array[0] = [X]
    return array


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
    "object with a dict": Holder(x=X, y=[X]),
    "slots with to": SlotsWithTo(X),
    "callable dataclass": Callable_(X, [X]),
    "nested namespace": SimpleNamespace(inner=SimpleNamespace(x=X)),
    "data set": torch.utils.data.TensorDataset(X, X + 1),
    "deque": deque([X, [X]], maxlen=3),
    "set": {X},
    "frozen set": frozenset([X]),
    "array of objects": objects(),
    "packed sequence": torch.nn.utils.rnn.pack_sequence([X]),
    "mapping": Frame(x=X, y=[X]),
    "list with attributes": ListWithMore([X], [X]),
    "tuple with attributes": TupleWithMore([X], [X]),
    "read-only dict": ReadOnly(x=X),
    "dict by attribute": ByAttribute(x=X),
    "object by attribute": Delegating(x=X),
    "slots of its own, frozen": FrozenSlots(X),
    "named tuple of torch": torch.arange(6.0).reshape(2, 3).max(0),
}


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """The tensors of BATCHES, found by pickling, and its lists in their place."""
    found = []

    class Finder(pickle.Pickler):
        def persistent_id(self, obj: Any) -> bool | None:
            if isinstance(obj, torch.Tensor):
                found.append(obj)
                return True
            return None

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


def test_contents_that_tensors_do_not_show() -> None:
    batch = ListWithMore([X], {"n": 1}), TupleWithMore([X], {"n": 1}), deque([X], maxlen=3)
    (values, fixed, queue), original = copy_of(batch), batch[1].extra
    assert values.extra == fixed.extra == {"n": 1}
    assert fixed.extra is not original
    assert queue.maxlen == 3
    copied = copy_of(MappingProxyType({"x": X}))
    assert type(copied) is MappingProxyType
    assert copied["x"] is not X
    frame = Frame(x=X)
    copied = copy_of(frame)
    copied["x"] = copied.pop("x") + 1
    assert frame["x"] is X


def test_a_dictionary_that_is_its_own_attributes() -> None:
    class Attributes(dict[str, Any]):
        def __init__(self, **entries: Any) -> None:
            super().__init__(**entries)
            self.__dict__ = self

    copied = copy_of(Attributes(x=X))
    copied.x = 3
    assert copied["x"] == 3


def test_cycles() -> None:
    batch: dict[str, Any] = {"list": [X], "plain": Plain(X, None)}
    batch["list"].append(batch)
    batch["plain"].y = batch["plain"]
    copied = copy_of(batch)
    assert copied["list"][1] is copied
    assert copied["plain"].y is copied["plain"]
    assert copied["plain"].x is copied["list"][0]
    assert copied["list"][0] is not X


def base() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6)


ALIASES: dict[str, Callable[[torch.Tensor], Any]] = {
    "the same": lambda x: (x, x),
    "rows": lambda x: (x, x[2:]),
    "a column": lambda x: (x[1:, 2], x),
    "inputs and targets": lambda x: (x[:, :-1], x[:, 1:]),
    "transposed": lambda x: (x.t(), x.view(-1)[5:]),
    "other numbers": lambda x: (x, x.view(torch.int32)),
    "three, in a chain": lambda x: (x[:2], x[3:], x[1:4]),
    "arrays": lambda x: (x.numpy(), x.numpy()[::-1, 1:]),
    "the same array": lambda x: (a := x.numpy(), a),
}


@pytest.mark.parametrize("name", ALIASES)
def test_what_overlaps_overlaps_in_the_copy(name: str) -> None:
    batch = ALIASES[name](base())
    copied = copy_of(batch)
    for values in (batch, copied):
        values[0][...] = values[0] + 100  # in place
    for value, other in zip(copied, batch, strict=True):
        assert type(value) is type(other)
        assert value.dtype == other.dtype
        assert value.tolist() == other.tolist()
    copied[0][...] = 0
    assert batch[0].min() >= 100


def test_a_copy_of_views_has_only_what_they_cover() -> None:
    data = torch.arange(1000.0)
    x, y, z = copy_of((data[10:20], data[15:25], data[900:]))
    assert x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert x.untyped_storage().nbytes() < 1000
    assert z.untyped_storage().nbytes() == 400


def test_a_copy_is_freed_with_its_last_reference() -> None:
    batch = {"x": Plain(X + 1, None)}
    references = [weakref.ref(copy_of(batch)["x"].x), weakref.ref(batch["x"].x)]
    del batch
    assert [reference() for reference in references] == [None, None]


def test_arrays() -> None:
    array = np.zeros(2)
    copied = copy_of({"x": array})
    copied["x"] += 1
    assert array.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "other",
    [
        torch.nn.Linear(2, 2),
        torch.optim.SGD([X]),
        print,
        lambda x: x,
        torch.Tensor,
        torch.float32,
        "name",
        Moved,
        object(),
        Kind.TRAIN,
        iter(torch.utils.data.DataLoader([X])),
        threading.Lock(),
        iter([X]),
        (value for value in [X]),
        io.StringIO("text"),
        io,
        partial,
    ],
    ids=lambda other: type(other).__name__,
)
def test_what_is_no_batch_is_not_copied(other: Any) -> None:
    assert copy_of([other])[0] is other
    assert copy_of([Plain(other, X)])[0].x is other


class Unmade:
    def __init__(self, x: Any) -> None:
        self.x = x

    def __reduce__(self) -> Any:
        return Unmade, ()


class Unset(Plain):
    def __setstate__(self, state: Any) -> None:
        raise ValueError("no")


@pytest.mark.parametrize("batch", [Unmade(X), [Unset(X, X)]])
def test_what_cannot_be_made_again_is_refused(batch: Any) -> None:
    with pytest.raises(
        TypeError, match=r"A \S+test_batches.Un(made|set) in the batch cannot be co"
    ):
        copy_of(batch)


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
