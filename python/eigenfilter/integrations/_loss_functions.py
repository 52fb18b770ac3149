"""Functions of a user that compute a loss, and are called again with their micro-batch."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from eigenfilter.integrations._bytecode import Names, names_of
from eigenfilter.integrations._window import Window

# A function, whether it is its argument, what it reads ("x", "self.batch"), the keys of an entry.
_Key = tuple[Any, ...]

_CONTAINERS = (dict, list, tuple)
_MAX_ENTRIES = 1000  # of the containers of a variable that are compared one by one
_MAX_BYTES = 2**20  # of the arrays that a function reads, whose contents are compared


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

    def compute(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Tensor:
        bound, args, kwargs = call
        loss = (bound or function)(*args, **kwargs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"{function} must return the loss, and returned {type(loss)}")
        backward(loss)
        return loss.detach()

    def again(call: Any) -> None:
        assert variables is not None
        variables.refuse_changes()
        compute(call)

    # Of a function itself only the arguments that it has already are copied.
    call = function if isinstance(function, functools.partial) else None, args, kwargs
    read = [] if variables is None else variables.values.values()
    with window.recording(again, call, [*_arguments((function, args, kwargs)), *read]):
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
    whatever else its first call has replaced. A tensor that its first call has written in place is
    compared no more if the code of the function only writes it, as a meter (`total.add_(loss)`);
    one that it also reads may be its batch, and is refused (`model(x.mul_(2))`), and so is all that
    it has replaced or written in a default of its arguments.

    Compared are identities, the values of numbers, the counts of the writes to tensors, and the
    contents of NumPy arrays, of 1 MiB in all. Attributes are followed through objects, and entries
    through containers; one whose entries would be more than 1,000 with those before is compared
    by its identity and its length.

    Attributes:
        values: the values of the variables around it, of the entries of those that are containers,
            and of the defaults of its arguments, by function and name.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.values, self._used = _read(function)
        self._contents = _contents_of(self.values)

    def forget_written(self) -> None:
        """Compare no more what the call since has replaced, or written and not read."""
        for key in self._changed():
            _, is_argument, *_ = key
            if not is_argument:
                del self.values[key]
        for key in self._written():
            _, is_argument, *_ = key
            # An array that it writes and reads is its scratch memory.
            if not is_argument and not (key in self._used and isinstance(self.values[key], Tensor)):
                del self._contents[key]

    def refuse_changes(self) -> None:
        """Raise RuntimeError if the function would read other values than at first."""
        for key in self._changed():
            raise RuntimeError(
                f"the function that computes the loss reads {_name(key)}, which was assigned "
                "again before the step was over, so that its micro-batch is lost: pass what it "
                "reads as an argument, of which later evaluations get copies"
            )
        for key in self._written():
            kind = "a tensor" if isinstance(self.values[key], Tensor) else "an array"
            raise RuntimeError(
                f"the function that computes the loss reads {_name(key)}, {kind} that was "
                "written in place before the step was over, so that its micro-batch is lost: "
                "pass it as an argument, of which later evaluations get copies, or work on a "
                "clone of it; a state of the function itself can be assigned again"
            )

    def _changed(self) -> list[_Key]:
        now, _ = _read(self._function)
        return [key for key, value in self.values.items() if not _is_same(now.get(key), value)]

    def _written(self) -> list[_Key]:
        before = {k: content for k, content in self._contents.items() if k in self.values}
        now = _contents_of({k: self.values[k] for k in before})
        return [key for key, content in before.items() if now.get(key) != content]


def _contents_of(values: dict[_Key, Any]) -> dict[_Key, int | bytes]:
    """What tells whether tensors and arrays were written."""
    contents: dict[_Key, int | bytes] = {}
    left = _MAX_BYTES
    for key, value in values.items():
        if _is_data(value):
            contents[key] = value._version
        elif isinstance(value, np.ndarray) and value.nbytes <= left:
            left -= value.nbytes
            contents[key] = value.tobytes()
    return contents


def _is_data(value: Any) -> bool:
    """Whether it is a tensor that counts its writes, and that ascents do not write."""
    if not isinstance(value, Tensor) or value.is_inference():
        return False
    return not (value.requires_grad and value.is_leaf)


def _name(key: _Key) -> str:
    _, _, name, *keys = key
    return repr(name + "".join(f"[{k!r}]" for k in keys))


class _Large(NamedTuple):
    """A container with too many entries to compare them."""

    container: Any
    length: int


class _Variable(NamedTuple):
    """The value of a variable, and what a function does with it.

    Attributes:
        value: the value.
        is_appended: whether it is a list in which the function leaves something.
        is_used: whether the function reads it for more than to write it in place.
    """

    value: Any
    is_appended: bool
    is_used: bool


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, _Large) and isinstance(b, _Large):
        return a.container is b.container and a.length == b.length
    return a is b or (isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b)


def _read(function: Any) -> tuple[dict[_Key, Any], set[_Key]]:
    """What a function reads from around it, and the keys of what it uses."""
    found: dict[_Key, _Variable] = {}
    _collect(function, found, set())
    values: dict[_Key, Any] = {}
    used: set[_Key] = set()
    for key, variable in found.items():
        leaves = {key: variable.value} if variable.is_appended else dict(_leaves(key, variable[0]))
        values |= leaves
        if variable.is_used:
            used.update(leaves)
    return values, used


def _leaves(variable: _Key, value: Any) -> Iterator[tuple[_Key, Any]]:
    """What is in a container, and how much; a container that is in itself is a leaf."""
    waiting: deque[tuple[_Key, Any, tuple[int, ...]]] = deque([(variable, value, ())])
    count = 0
    while waiting:
        path, value, above = waiting.popleft()
        if not isinstance(value, _CONTAINERS) or id(value) in above:
            yield path, value
            continue
        if count + len(value) > _MAX_ENTRIES:
            yield path, _Large(value, len(value))
            continue
        count += len(value)
        yield path, len(value)
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(entry, _CONTAINERS):
                waiting.append(((*path, key), entry, (*above, id(value))))
            else:
                yield (*path, key), entry


def _collect(function: Any, found: dict[_Key, _Variable], seen: set[tuple[Any, int]]) -> None:
    """Add what a function and those of its module that it calls read from around them.

    Args:
        function: it.
        found: variables.
        seen: functions and the ids of their `self`.
    """
    if isinstance(function, functools.partial):
        _collect(function.func, found, seen)
        return
    function, owner = _function_and_owner(function)
    if function is None or (function, id(owner)) in seen:
        return
    seen.add((function, id(owner)))
    names = names_of(function.__code__)
    around = {} if owner is None else {"self": owner}
    around |= _nonlocals(function)
    around |= {n: function.__globals__[n] for n in names.globals if n in function.__globals__}
    attributes, methods = _attributes(around, names)
    called = [*around.values(), *attributes.values(), *methods]
    defaults = _defaults(function)
    around = {n: v for n, v in around.items() if n not in names.stored}
    for variables, is_argument in ((around | attributes, False), (defaults, True)):
        for name, value in variables.items():
            last = name.rpartition(".")[2]
            is_appended = isinstance(value, list) and last in names.written
            variable = _Variable(value, is_appended, last in names.used)
            found[function.__qualname__, is_argument, name] = variable
    for value in [*called, *defaults.values()]:
        inner, _ = _function_and_owner(value)
        if inner is not None and inner.__globals__ is function.__globals__:
            _collect(value, found, seen)
    if hasattr(function, "__wrapped__"):
        _collect(function.__wrapped__, found, seen)


def _attributes(around: dict[str, Any], names: Names) -> tuple[dict[str, Any], list[Any]]:
    """The attributes and the methods that a function reads of the objects around it.

    And of the objects in those attributes, since a function may read `state.inner.x`.
    """
    attributes: dict[str, Any] = {}
    methods: list[Any] = []
    read = names.attributes - names.stored_attributes
    waiting, seen = deque(around.items()), set()
    while waiting:
        name, value = waiting.popleft()
        if isinstance(value, (type, FunctionType, ModuleType)) or id(value) in seen:
            continue
        seen.add(id(value))
        own = getattr(value, "__dict__", {})
        found = {f"{name}.{a}": own[a] for a in read if a in own}
        attributes |= found
        waiting.extend(found.items())
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
