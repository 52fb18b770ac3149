"""The variables that a loss function reads from around it, and whether they are still the same."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

_Key = tuple[Any, ...]  # a function, what it reads ("x", "self.batch"), and the keys of an entry

_WRITERS = {"append", "extend", "insert"}  # methods by which a function leaves something in a list


class Variables:
    """What a function reads from around it, which a loop may have assigned again by a later call.

        variables = Variables(function)
        function()
        variables.forget_written()
        ...
        variables.refuse_changes()
        function()

    What the function itself assigns is not compared: the names and the attributes in its code, and
    whatever else its first call has changed.

    Attributes:
        values: the values of the variables around it, of the entries of those that are containers,
            and of its own arguments that have them, by function and name.
        tensors: the tensors among them, and the arguments that the function was given.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.values = _read(function)
        tensors = [value for value in self.values.values() if isinstance(value, Tensor)]
        self.tensors = tensors, _given(function)

    def forget_written(self) -> None:
        """Compare no more what the call since has changed."""
        for key in self._changed():
            del self.values[key]

    def refuse_changes(self) -> None:
        """Raise RuntimeError if the function would read other values than at first."""
        for _, name, *keys in self._changed():
            name += "".join(f"[{key!r}]" for key in keys)
            raise RuntimeError(
                f"the function that computes the loss reads {name!r}, which was assigned "
                "again before the step was over, so that its micro-batch is lost: make what it "
                "reads an argument, or one with a default, as in def forward(input=input)"
            )

    def _changed(self) -> list[_Key]:
        now = _read(self._function)
        return [key for key, value in self.values.items() if not _is_same(now.get(key), value)]


def _given(function: Any) -> list[Any]:
    """The arguments that a function has, without a call."""
    if isinstance(function, functools.partial):
        return [function.args, function.keywords, *_given(function.func)]
    return [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b)


def _read(function: Any) -> dict[_Key, Any]:
    found: dict[_Key, tuple[Any, bool]] = {}
    _collect(function, found, set())
    return {
        path: leaf
        for variable, (value, is_written) in found.items()
        for path, leaf in ([(variable, value)] if is_written else _leaves(variable, value, ()))
    }


def _leaves(path: _Key, value: Any, above: tuple[int, ...]) -> Iterator[tuple[_Key, Any]]:
    """What is in a container, and how much; a container that is in itself is a leaf."""
    if not isinstance(value, (dict, list, tuple)) or id(value) in above:
        yield path, value
        return
    yield path, len(value)
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in list(entries):
        if isinstance(entry, (dict, list, tuple)):
            yield from _leaves((*path, key), entry, (*above, id(value)))
        else:
            yield (*path, key), entry


def _collect(
    function: Any, found: dict[_Key, tuple[Any, bool]], seen: set[tuple[Any, int]]
) -> None:
    """Add what a function and those of its module that it calls read from around them.

    Args:
        function: it.
        found: values, each with whether it is a list in which the function leaves something.
        seen: functions and the ids of their `self`.
    """
    if isinstance(function, functools.partial):
        given = dict(enumerate(function.args)) | function.keywords
        found |= {("partial", str(name)): (value, False) for name, value in given.items()}
        _collect(function.func, found, seen)
        return
    function, owner = _function_and_owner(function)
    if function is None or (function, id(owner)) in seen:
        return
    seen.add((function, id(owner)))
    names = _names(function.__code__)
    around = {} if owner is None else {"self": owner}
    around |= _nonlocals(function)
    around |= {n: function.__globals__[n] for n in names.globals if n in function.__globals__}
    attributes, methods = _attributes(around, names)
    called = [*around.values(), *attributes.values(), *methods]
    defaults = _defaults(function)
    around = {n: v for n, v in around.items() if n not in names.stored}
    for name, value in (around | attributes | defaults).items():
        is_written = isinstance(value, list) and name.rpartition(".")[2] in names.written
        found[function.__qualname__, name] = value, is_written
    for value in [*called, *defaults.values()]:
        inner, _ = _function_and_owner(value)
        if inner is not None and inner.__globals__ is function.__globals__:
            _collect(value, found, seen)
    if hasattr(function, "__wrapped__"):
        _collect(function.__wrapped__, found, seen)


def _attributes(around: dict[str, Any], names: _Names) -> tuple[dict[str, Any], list[Any]]:
    """The attributes and the methods that a function reads of the objects around it."""
    attributes: dict[str, Any] = {}
    methods: list[Any] = []
    for name, value in around.items():
        if isinstance(value, (type, FunctionType, ModuleType)):
            continue
        own = getattr(value, "__dict__", {})
        read = names.attributes - names.stored_attributes
        attributes |= {f"{name}.{a}": own[a] for a in read if a in own}
        of_class = (getattr(type(value), a, None) for a in names.attributes - own.keys())
        methods += [MethodType(m, value) for m in of_class if isinstance(m, FunctionType)]
    return attributes, methods


def _function_and_owner(function: Any) -> tuple[FunctionType | None, Any]:
    """The function in Python of a callable and its `self`; those of modules are not looked into."""
    if not isinstance(function, (FunctionType, MethodType, type, nn.Module)):
        call = type(function).__call__
        return (call, function) if isinstance(call, FunctionType) else (None, None)
    owner = getattr(function, "__self__", None)
    function = getattr(function, "__func__", function)
    return (function, owner) if isinstance(function, FunctionType) else (None, None)


def _defaults(function: FunctionType) -> dict[str, Any]:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = function.__defaults__ or ()
    given = zip(names[len(names) - len(values) :], values, strict=True)
    return dict(given) | (function.__kwdefaults__ or {})


def _nonlocals(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    return found


class _Names(NamedTuple):
    """The names in the code of a function and of those inside it.

    Attributes:
        globals, attributes: those that are read.
        stored: those outside that are assigned.
        stored_attributes: attributes that are assigned.
        written: those of which a writing method is called.
    """

    globals: frozenset[str]
    attributes: frozenset[str]
    stored: frozenset[str]
    stored_attributes: frozenset[str]
    written: frozenset[str]


@functools.lru_cache(maxsize=128)
def _names(code: CodeType) -> _Names:
    used = [(i.opname, i.argval) for i in dis.get_instructions(code)]
    read = "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD"
    own = _Names(
        frozenset(name for op, name in used if op == "LOAD_GLOBAL"),
        frozenset(name for op, name in used if op in ("LOAD_ATTR", "LOAD_METHOD")),
        frozenset(
            name
            for op, name in used
            if op == "STORE_GLOBAL" or (op == "STORE_DEREF" and name in code.co_freevars)
        ),
        frozenset(name for op, name in used if op == "STORE_ATTR"),
        frozenset(
            name
            for (op, name), (after, method) in pairwise(used)
            if op in read and after in read and method in _WRITERS
        ),
    )
    inside = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    # What a function inside assigns may be a variable of this one.
    inside = [each._replace(stored=each.stored - set(code.co_cellvars)) for each in inside]
    return _Names(*(names.union(*more) for names, *more in zip(own, *inside, strict=True)))
