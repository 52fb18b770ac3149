"""Copies of batches, for evaluations that come after the first."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eigenfilter.integrations._memory import copies_of

_PROTOCOL = 4
# The types that pickle copies, or that need no copy: asking them first saves time.
_BASIC = frozenset({int, float, bool, type(None), list, dict, tuple, set})


def copy_of(batch: Any) -> Any:
    """A copy of a batch: of its tensors and arrays, and of the objects that hold them.

    An evaluation may take an entry from its batch (label smoothing pops the labels), or write to a
    tensor of it (noise, masks). One that comes later must see the batch as it was.

    The copy is that of pickling, as of batches from the workers of a loader, in memory: an object
    that is in the batch twice is one object in the copy, and tensors (or arrays) that overlap in
    memory overlap in the copy; a tensor and an array of one memory do not. Shared with the copy
    are parameters, modules, optimizers, functions, and other objects that can be called, except
    containers, dataclasses and the arguments of a `functools.partial`; iterators; and what cannot
    be pickled (locks, files).

    Args:
        batch: any object.

    Raises:
        RuntimeError: a tensor was computed from one that requires grad.
        TypeError: an object cannot be made again from what pickling takes from it.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, _PROTOCOL)
    pickler.dump(batch)
    file.seek(0)
    return _Unpickler(file, pickler.leaves).load()


class _Pickler(pickle.Pickler):
    """Pickles the objects of a batch, except its tensors and arrays and what is not copied.

    Attributes:
        leaves: the latter, each once.
    """

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.leaves: list[Any] = []
        self._positions: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if type(value) in _BASIC:
            return None
        if isinstance(value, _Shared):
            value = value.value
        elif not (isinstance(value, Tensor) or _is_flat_array(value) or _is_shared(value)):
            return None
        position = self._positions.setdefault(id(value), len(self.leaves))
        if position == len(self.leaves):
            self.leaves.append(value)
        return position

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, MappingProxyType):
            return MappingProxyType, (dict(value),)
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            reduced = reduce(value) if reduce is not None else value.__reduce_ex__(_PROTOCOL)
        except Exception:  # of any type: the object says that it cannot be copied
            return _Shared.get, (_Shared(value),)
        if isinstance(reduced, str):  # the name of a global object
            return _Shared.get, (_Shared(value),)
        make, args, state, items, entries, set_state = (*reduced, *[None] * 4)[:6]
        is_default = make is copyreg.__newobj__  # type: ignore[attr-defined]
        if is_default and len(args) == 1 and state is items is entries is None:
            # Without content it is a sentinel, which is compared by identity.
            return _Shared.get, (_Shared(value),)
        if is_default and isinstance(value, tuple):  # whose own __new__ may take other arguments
            make, args = tuple.__new__, (type(value), tuple(tuple.__iter__(value)))
        maker = _Maker(type(value), make, set_state)
        content = (
            state,
            None if items is None else list(items),
            None if entries is None else list(entries),
        )
        return maker.make, args, content, None, None, maker.fill


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, leaves: list[Any]) -> None:
        super().__init__(file)
        self._copies = copies_of(leaves)

    def persistent_load(self, position: int) -> Any:
        return self._copies[position]


class _Shared:
    """An object that is found to be shared only when it is pickled."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @staticmethod
    def get(value: Any) -> Any:
        return value


class _Maker:
    """Makes an object again, as pickle does, but past methods of a class that refuse writes.

    Args:
        kind: class of the object.
        make: function that makes it from the arguments that pickling took from it.
        set_state: function that sets its state, if its class has a special one.
    """

    def __init__(
        self, kind: type, make: Callable[..., Any], set_state: Callable[[Any, Any], object] | None
    ) -> None:
        self._kind = kind
        self._make = make
        self._set_state = set_state

    def make(self, *args: Any) -> Any:
        with self._naming_the_class():
            return self._make(*args)

    def fill(self, value: Any, content: tuple[Any, Any, Any]) -> None:
        state, items, entries = content
        with self._naming_the_class():
            if items:
                (list.extend if isinstance(value, list) else type(value).extend)(value, items)
            for key, entry in entries or ():
                kinds: tuple[Any, ...] = (OrderedDict, dict, type(value))
                next(c for c in kinds if isinstance(value, c)).__setitem__(value, key, entry)
            if state is not None:
                self._fill_attributes(value, state)

    def _fill_attributes(self, value: Any, state: Any) -> None:
        set_state = self._set_state or getattr(type(value), "__setstate__", None)
        if set_state is not None:
            set_state(value, state)
        elif state is value:  # a dictionary that is its own `__dict__`
            object.__setattr__(value, "__dict__", state)
        else:
            attributes, slots = state if isinstance(state, tuple) else (state, None)
            vars(value).update(attributes) if attributes else None
            for name, entry in (slots or {}).items():
                object.__setattr__(value, name, entry)  # of frozen dataclasses, too

    @contextmanager
    def _naming_the_class(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            name = f"{self._kind.__module__}.{self._kind.__qualname__}"
            raise TypeError(
                f"A {name} in the batch cannot be copied, and later evaluations need copies: pass "
                "its tensors in a tuple, a list or a dictionary, or give the class a __reduce__ "
                "from which copy.deepcopy makes it again"
            ) from error


def _is_flat_array(value: Any) -> bool:
    """Whether it is an array of numbers or strings; those of objects are pickled."""
    return isinstance(value, np.ndarray) and not value.dtype.hasobject


def _is_shared(value: Any) -> bool:
    if isinstance(value, (str, bytes, type, nn.Module, torch.optim.Optimizer, Iterator)):
        return True
    if isinstance(value, (list, tuple, dict, functools.partial)):
        return False
    return callable(value) and not dataclasses.is_dataclass(value)
