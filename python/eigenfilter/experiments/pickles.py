"""A reader of the few pickle opcodes that data files use; it executes nothing from a file.

It is a stack machine over numbers, strings, bytes, tuples, lists and dictionaries. The name of a
global is never looked up. Instead the caller lists the calls that a file may make, and its
functions get the arguments unchecked. All results are plain values, at most one per opcode.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class ForbiddenPickle(ValueError):
    """A pickle contains something that files of its kind do not need."""


@dataclass(frozen=True)
class GlobalName:
    """The name of an object that a pickle would import; no value in a file can equal it."""

    module: str
    name: str


def reject(*args: Any) -> Any:
    """Reject a kind of opcode that a kind of file does not use.

    Raises:
        ForbiddenPickle: always.
    """
    raise ForbiddenPickle("it contains more than plain data")


def load(
    raw: bytes,
    calls: Mapping[GlobalName, Callable[..., Any]],
    *,
    set_state: Callable[[Any, Any], None] = reject,
    fetch: Callable[[Any], Any] = reject,
    max_opcodes: int,
) -> Any:
    """Return the content of a pickle.

    Args:
        raw: the pickle, of protocol 2 to 4.
        calls: functions that the pickle may call, by name. Each function must check the types of
            its arguments.
        set_state: function of an object that one of the calls returned, and its state.
        fetch: function from a persistent id to the object.
        max_opcodes: largest number of opcodes in a file of this kind.

    Raises:
        ForbiddenPickle: the pickle has other opcodes or calls, or too many opcodes.
        ValueError, IndexError, KeyError, TypeError: the pickle is damaged.

    Source: Python's pickletools, which documents every opcode.
    """
    machine = _PickleMachine(calls, set_state, fetch)
    for count, (opcode, arg, _) in enumerate(pickletools.genops(raw)):
        if count >= max_opcodes:
            raise ForbiddenPickle(f"it has more than {max_opcodes} opcodes")
        machine.execute(opcode.name, arg)
    [result] = machine.stack
    _check_no_names(result)
    return result


def _check_no_names(result: Any) -> None:
    """Reject a global name in the place of data, such as a dtype among the entries."""
    pending, visited = [result], set()
    while pending:
        value = pending.pop()
        if type(value) is GlobalName:
            raise ForbiddenPickle(f"it has {f'{value.module}.{value.name}'!a:.80} in place of data")
        if isinstance(value, (dict, list, tuple)) and id(value) not in visited:
            visited.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_LITERALS = frozenset(_NUMBERS + _TEXTS + _BYTES)
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES: Mapping[str, int] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _PickleMachine:
    """The stack and the memo of a pickle.

    The method `_NAME` in lower case executes the opcode NAME; `execute` handles the simple ones.
    """

    def __init__(
        self,
        calls: Mapping[GlobalName, Callable[..., Any]],
        set_state: Callable[[Any, Any], None],
        fetch: Callable[[Any], Any],
    ) -> None:
        self._calls, self._set_state, self._fetch = calls, set_state, fetch
        self._memo: dict[int, Any] = {}
        self.stack: list[Any] = []

    def execute(self, name: str, arg: Any) -> None:
        """Execute one opcode."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._pop_values(_TUPLES[name])))
        elif name not in ("PROTO", "FRAME", "STOP"):  # these have no effect here
            action = getattr(self, f"_{name.lower()}", None)
            if action is None:
                raise ForbiddenPickle(f"it has the opcode {name}")
            action(arg)

    def _pop_values(self, count: int) -> list[Any]:
        """Pop values, and return them in the order in which they were pushed."""
        values = [self.stack.pop() for _ in range(count)][::-1]
        if any(value is _MARK for value in values):
            raise ValueError("a mark is out of place")
        return values

    def _pop_to_mark(self) -> list[Any]:
        """Pop the values after the last mark, and the mark."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _mark(self, arg: Any) -> None:
        self.stack.append(_MARK)

    def _tuple(self, arg: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _append(self, arg: Any) -> None:
        self._extend(self._pop_values(1))

    def _appends(self, arg: Any) -> None:
        self._extend(self._pop_to_mark())

    def _setitem(self, arg: Any) -> None:
        self._update(self._pop_values(2))

    def _setitems(self, arg: Any) -> None:
        self._update(self._pop_to_mark())

    def _global(self, arg: Any) -> None:
        self.stack.append(GlobalName(*arg.split(" ", 1)))

    def _stack_global(self, arg: Any) -> None:
        module, name = self._pop_values(2)
        if type(module) is not str or type(name) is not str:
            raise ValueError("a global name is not text")
        self.stack.append(GlobalName(module, name))

    def _reduce(self, arg: Any) -> None:
        function, args = self._pop_values(2)
        if type(function) is not GlobalName or type(args) is not tuple:
            raise ValueError("it calls an object that is not a global name")
        if function not in self._calls:
            raise ForbiddenPickle(f"it names {f'{function.module}.{function.name}'!a:.80}")
        self.stack.append(self._calls[function](*args))

    def _build(self, arg: Any) -> None:
        target, state = self._pop_values(2)
        self._set_state(target, state)
        self.stack.append(target)

    def _binpersid(self, arg: Any) -> None:
        self.stack.append(self._fetch(*self._pop_values(1)))

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to an object that is not a list")
        self.stack[-1].extend(values)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it sets entries of an object that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples may take exponential time, and large integers may be chosen to
            # collide.
            if type(key) is not str and not (type(key) is int and -(2**31) <= key < 2**31):
                raise ForbiddenPickle("a key is neither text nor a 32-bit integer")
            target[key] = value
