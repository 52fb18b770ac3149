"""A reader of the few opcodes of pickle that data files are made of; nothing in a file is executed.

A stack machine over numbers, strings, bytes, tuples, lists and dictionaries. A global is text that
is never looked up: the caller lists the calls that a file may make, and gets the arguments as they
are. Everything that is made is a plain value, and there are as many as the file has opcodes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class ForbiddenPickle(ValueError):
    """A pickle does what its kind of file has no use for."""


@dataclass(frozen=True)
class GlobalName:
    """The name of what a pickle would import; no value that a file can hold equals it."""

    module: str
    name: str


def reject(*args: Any) -> Any:
    """Take the place of what a kind of file does not do.

    Raises:
        Refused: always.
    """
    raise ForbiddenPickle("it holds more than plain data")


def load(
    raw: bytes,
    calls: Mapping[GlobalName, Callable[..., Any]],
    *,
    set_state: Callable[[Any, Any], None] = reject,
    fetch: Callable[[Any], Any] = reject,
    max_opcodes: int,
) -> Any:
    """Return what a pickle holds.

    Args:
        raw: the pickle, of protocol 2 to 4.
        calls: what it may call, by name; each checks its arguments, whatever they are.
        set_state: gets an object that one of the calls made, and its state.
        fetch: gets a persistent id, and returns the object.
        most: opcodes that a file of this kind has at most.

    Raises:
        Refused: it has another opcode, calls something else, or is longer.
        ValueError, IndexError, KeyError, TypeError: it is damaged.

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
    """Refuse a name that stands where data are wanted, such as a dtype among the entries."""
    left, seen = [result], set()
    while left:
        value = left.pop()
        if type(value) is GlobalName:
            raise ForbiddenPickle(f"it has {f'{value.module}.{value.name}'!a:.80} in place of data")
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)


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
    """The stack and the memo."""

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
        """Take one opcode."""
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
        elif name not in ("PROTO", "FRAME", "STOP"):  # these tell nothing that is needed
            action = getattr(self, f"_{name.lower()}", None)
            if action is None:
                raise ForbiddenPickle(f"it has the opcode {name}")
            action(arg)

    def _pop_values(self, count: int) -> list[Any]:
        """The last values, in their order."""
        values = [self.stack.pop() for _ in range(count)][::-1]
        if any(value is _MARK for value in values):
            raise ValueError("a mark is out of its place")
        return values

    def _pop_to_mark(self) -> list[Any]:
        """The values behind the last mark, which goes too."""
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
            raise ValueError("a name is not text")
        self.stack.append(GlobalName(module, name))

    def _reduce(self, arg: Any) -> None:
        function, args = self._pop_values(2)
        if type(function) is not GlobalName or type(args) is not tuple:
            raise ValueError("it calls what has no name")
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
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(values)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it sets entries of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of another type may take forever, and large numbers may share theirs.
            if type(key) is not str and not (type(key) is int and -(2**31) <= key < 2**31):
                raise ForbiddenPickle("a key is neither text nor a number of 32 bits")
            target[key] = value
