"""Functions of a user that compute a loss, and are called again with their micro-batch."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from eigenfilter.integrations._window import Window

# A function, whether it is its argument, what it reads ("x", "self.batch"), the keys of an entry.
_Key = tuple[Any, ...]

_WRITERS = {"append", "extend", "insert"}  # methods by which a function leaves something in a list


def evaluate(
    window: Window,
    function: Callable[..., Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backward: Callable[[Tensor], object],
) -> Tensor:
    """Evaluate a micro-batch at x, recorded in the window.

    Later evaluations call the function with copies of its arguments. What else it reads must be
    the same then. Buffers of modules that it reads stay those of x.

    Args:
        window: window of the step.
        function: function that returns the loss of its arguments.
        args, kwargs: arguments of the function.
        backward: function that takes the loss backward.

    Returns:
        The loss, detached.

    Raises:
        TypeError: the function returns no tensor.
        RuntimeError: in a later evaluation, a variable that the function reads has another value.
    """
    variables = Variables(function) if window.keeps else None

    def compute(call: tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]) -> Tensor:
        function, args, kwargs = call
        loss = function(*args, **kwargs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"{function} must return the loss, and returned {type(loss)}")
        backward(loss)
        return loss.detach()

    def again(call: Any) -> None:
        assert variables is not None
        variables.refuse_changes()
        compute(call)

    call = function, args, kwargs
    read = [] if variables is None else variables.values.values()
    with window.recording(again, call, [*_arguments(call), *read]):
        loss = compute(call)
        if variables is not None:
            variables.forget_written()
    return loss


def _arguments(call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Iterator[Any]:
    function, args, kwargs = call
    yield from (function, *args, *kwargs.values())
    if isinstance(function, functools.partial):
        yield from _arguments((function.func, function.args, function.keywords))


class Variables:
    """What a function reads from around it, which a loop may have changed by a later call.

        variables = Variables(function)
        function()
        variables.forget_written()
        ...
        variables.refuse_changes()
        function()

    What the function itself assigns is not compared: the names and the attributes in its code, and
    whatever else its first call has replaced. What its first call has written in place is, and
    what it has replaced in a default of its arguments: that may be its batch.

    Attributes:
        values: the values of the variables around it, of the entries of those that are containers,
            and of the defaults of its arguments, by function and name.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.values = _read(function)
        self._versions = {k: t._version for k, t in self.values.items() if _is_data(t)}

    def forget_written(self) -> None:
        """Compare no more what the call since has replaced."""
        for key in self._changed():
            _, is_argument, *_ = key
            if not is_argument:
                del self.values[key]

    def refuse_changes(self) -> None:
        """Raise RuntimeError if the function would read other values than at first."""
        for key in self._changed():
            raise RuntimeError(
                f"the function that computes the loss reads {_name(key)}, which was assigned "
                "again before the step was over, so that its micro-batch is lost: pass what it "
                "reads as an argument, of which later evaluations get copies"
            )
        for key, version in self._versions.items():
            if key in self.values and self.values[key]._version != version:
                raise RuntimeError(
                    f"the function that computes the loss reads {_name(key)}, a tensor that was "
                    "written in place before the step was over, so that its micro-batch is lost: "
                    "pass it as an argument, of which later evaluations get copies, or work on a "
                    "clone of it"
                )

    def _changed(self) -> list[_Key]:
        now = _read(self._function)
        return [key for key, value in self.values.items() if not _is_same(now.get(key), value)]


def _is_data(value: Any) -> bool:
    """Whether it is a tensor that counts its writes, and that ascents do not write."""
    if not isinstance(value, Tensor) or value.is_inference():
        return False
    return not (value.requires_grad and value.is_leaf)


def _name(key: _Key) -> str:
    _, _, name, *keys = key
    return repr(name + "".join(f"[{k!r}]" for k in keys))


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
    for variables, is_argument in ((around | attributes, False), (defaults, True)):
        for name, value in variables.items():
            is_written = isinstance(value, list) and name.rpartition(".")[2] in names.written
            found[function.__qualname__, is_argument, name] = value, is_written
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
