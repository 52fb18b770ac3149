"""Operations: a kernel is declared once, as a function, and the rest follows from that.

    @op
    def perturb_hvp(params, grads, base_grads, backups, alpha, eps, *, ..., backend=None):
        \"\"\"The docstring that users read.\"\"\"
        ...  # the reference: the same arithmetic in plain PyTorch

The core states which arguments an operation has, in which order, and which of them it writes to
(`_core.operations`, from csrc/core): the declaration must have the same. From both follow the
choice of the backend, the checks, version counters, the operator `torch.ops.eigenfilter.<name>` for
compiled code, and a row and an entry in the API reference. Each backend has one function of an
operation, which takes all arguments, in this order:

    native       _core.<name>(*arguments, num_threads)
    triton       eigenfilter.kernels.triton.<name>.run(table, call), the arguments as attributes
    reference    the body of the declaration, the arguments by name

The compiled function checks all arguments before anything is written. With `num_threads` 0 it does
nothing else, and returns a table of what it has read, or None where there is nothing to do: it is
the check of the other backends, too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eigenfilter import _core
from eigenfilter.kernels import dispatch
from eigenfilter.kernels.conventions import Table

_P = ParamSpec("_P")

_CHECK = 0  # threads: the compiled function then checks its arguments and computes nothing

# The schema's type for each annotation. Scalars become tensors, lists that are None empty ones.
_TYPES = {
    "Sequence[Tensor]": "Tensor[]",
    "Sequence[Tensor] | None": "Tensor[]",
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Scalar": "Tensor",
    "Scalar | None": "Tensor?",
    "bool": "bool",
    "int": "int",
    "str | None": "str?",
}


def op(reference: Callable[_P, None]) -> Callable[_P, None]:
    """Declare an operation by its reference."""
    operation = Operation(reference)
    OPERATIONS[operation.name] = operation
    return operation.function()


class Operation(Generic[_P]):
    """What a declaration says, and the functions that follow from it.

    Attributes:
        name: name of the operation in all backends and in torch.ops.eigenfilter.
        arguments: names of all arguments except `backend`, in order.
        annotations: their types, as the declaration writes them.
        writes: names of the arguments that it writes to; for each the flag that decides it, or
            None if it always does. The core states them.
        takes_lists: whether it works on lists of tensors, not on the rows of single ones.
        reference: the declared function.

    Raises:
        TypeError: the declaration has no `backend`, an annotation that there is no schema for, or
            other arguments than the core's function.
    """

    def __init__(self, reference: Callable[_P, None]) -> None:
        self.name = reference.__name__.lstrip("_")
        self.reference: Callable[..., None] = reference
        self._parameters = dict(inspect.signature(reference).parameters)
        self.arguments = tuple(name for name in self._parameters if name != "backend")
        self.annotations = {name: self._parameters[name].annotation for name in self.arguments}
        self._refuse_mistakes()
        stated = _core.operations[self.name].items()
        self.writes = {name: None if when == "always" else when for name, when in stated if when}
        self.takes_lists = self.annotations[self.arguments[0]] != "Tensor"
        self._implementations: dict[str, Callable[..., None]] = {}

    def _refuse_mistakes(self) -> None:
        if "backend" not in self._parameters:
            raise TypeError(f"{self.name} needs the argument backend: str | None = None")
        for name, annotation in self.annotations.items():
            if annotation not in _TYPES:
                known = ", ".join(_TYPES)
                raise TypeError(f"{self.name}: {name} is {annotation!r}, which is none of {known}")
        stated = tuple(_core.operations.get(self.name, ()))
        if self.arguments != stated:
            raise TypeError(f"{self.name} takes {self.arguments}, and in the core {stated}")

    def on(self, backend: str) -> Callable[..., None]:
        """Return the operation on one backend, with the declared arguments except `backend`.

        It leaves version counters and autograd to its caller.
        """
        return self._bound(["_run({arguments}, _threads())"], run=self._implementation(backend))

    def check(self, *arguments: Any) -> Table | None:
        """Raise what the operation raises for these arguments; return what was read of them."""
        table: Table | None = getattr(_core, self.name)(*arguments, _CHECK)
        return table

    def function(self) -> Callable[_P, None]:
        """Return the public function: it chooses the backend and counts versions.

        In code that torch compiles, its calls become the operator torch.ops.eigenfilter.<name>.
        """
        body = [
            "_run = _choose({first}, backend)",
            "_run({arguments}, _threads())",
            f"_increment_version([{self._written()}])",
        ]
        called: dict[str, Callable[..., Any]] = {
            "choose": self._choose,
            "increment_version": increment_version,
        }
        kernel = self._bound(
            ["if _is_compiling(): return _compiled({arguments}, backend)", *body],
            is_compiling=torch.compiler.is_compiling,
            compiled=self._register(self._bound(body, **called)),
            **called,
        )
        return functools.wraps(self.reference)(kernel)

    def _choose(self, first: Any, backend: str | None) -> Callable[..., None]:
        """The function of the backend that serves a call, of which this is the first argument."""
        find = dispatch.first if self.takes_lists else dispatch.tensor
        tensor = find(self.arguments[0], first)
        return self._implementation(dispatch.choose(tensor.device, backend))

    def _implementation(self, backend: str) -> Callable[..., None]:
        """The function of one backend; it takes all arguments, and threads, by position."""
        made = self._implementations.get(backend)
        if made is None:
            made = self._implementations[backend] = self._implement(backend)
        return made

    def _implement(self, backend: str) -> Callable[..., None]:
        if backend == "native":
            core: Callable[..., None] = getattr(_core, self.name)
            return core
        if backend == "triton":
            run = importlib.import_module(f"eigenfilter.kernels.triton.{self.name}").run
        elif backend == "reference":
            run = self._run_reference
        else:
            raise ValueError(dispatch.unknown(backend))

        def check_and_run(*values: Any) -> None:
            *arguments, _threads = values
            table = self.check(*arguments)
            if table is not None:
                run(table, SimpleNamespace(**dict(zip(self.arguments, arguments, strict=True))))

        return check_and_run

    def _run_reference(self, table: Table, call: SimpleNamespace) -> None:
        with torch.no_grad():
            self.reference(**vars(call))

    def _written(self) -> str:
        """The source of the elements of a list: the tensors that a call has written."""
        elements = []
        for name, flag in self.writes.items():
            each = (
                f"({name} or ())" if self.annotations[name].startswith("Sequence") else f"[{name}]"
            )
            elements.append(f"*{each}" if flag is None else f"*({each} if {flag} else ())")
        return ", ".join(elements)

    def _bound(self, body: list[str], **functions: Callable[..., Any]) -> Callable[..., None]:
        """Return a function with the declared parameters.

        It is made as the standard library makes a dataclass' __init__: Python then binds names and
        defaults itself, and its errors are those of a function with this signature.

        Args:
            body: its lines; "{arguments}" stands for the arguments except `backend`, "{first}" for
                the first of them. The function has the parameter `backend` if the body needs it.
            functions: what the body calls, under these names with an underscore before them.
        """
        namespace: dict[str, Any] = {f"_{name}": value for name, value in functions.items()}
        namespace["_threads"] = torch.get_num_threads
        parameters = []
        takes_backend = any("backend" in line for line in body)
        for name in (*self.arguments, *(["backend"] if takes_backend else [])):
            parameter = self._parameters[name]
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
                parameters.append("*")
            if parameter.default is parameter.empty:
                parameters.append(name)
            else:
                namespace[f"_default_{name}"] = parameter.default
                parameters.append(f"{name}=_default_{name}")
        lines = [f"def {self.name}({', '.join(parameters)}):", *body]
        names = {"arguments": ", ".join(self.arguments), "first": self.arguments[0]}
        exec("\n    ".join(lines).format(**names), namespace)
        function: Callable[..., None] = namespace[self.name]
        return function

    def _register(self, run_now: Callable[..., None]) -> Callable[..., None]:
        """Register the operator of compiled code; return the function that calls it.

        That function takes all declared arguments by position.

        An operation that does not write to an argument unless a flag is true has an overload,
        `unless_<flag>`, whose schema says so.
        """
        types = {name: parameter.annotation for name, parameter in self._parameters.items()}
        lists = {name for name, of in types.items() if of == "Sequence[Tensor] | None"}
        scalars = {name for name, of in types.items() if of.startswith("Scalar")}

        def run(*args: Any, **kw: Any) -> None:
            named = dict(zip(types, args, strict=False)) | kw
            for argument, value in named.items():
                if argument in lists:
                    named[argument] = value or None
                elif argument in scalars and value is not None and _is_host_number(value):
                    named[argument] = float(value)
            run_now(**named)

        always = self._define("default", self.writes, run)
        flags = {flag for flag in self.writes.values() if flag is not None}
        unless = {
            flag: self._define(
                f"unless_{flag}", [n for n, f in self.writes.items() if f != flag], run
            )
            for flag in flags
        }

        def run_compiled(*values: Any) -> None:
            named = dict(zip(types, values, strict=True))
            for argument in scalars:
                named[argument] = _tensor(named[argument])
            for argument in lists:
                if named[argument] is not None and not named[argument]:
                    raise ValueError(f"{argument} has no tensors: pass at least one, or None")
                named[argument] = list(named[argument] or ())
            operator = always
            for flag, overload in unless.items():
                if not named[flag]:
                    operator = overload
            operator(**named)

        return run_compiled

    def _define(
        self, overload: str, writes: Collection[str], run: Callable[..., None]
    ) -> Callable[..., None]:
        """Define one overload of the operator, which writes to these arguments."""
        name = f"eigenfilter::{self.name}" + ("" if overload == "default" else f".{overload}")
        arguments: list[str] = []
        for argument, parameter in self._parameters.items():
            of = _TYPES[parameter.annotation]
            if argument in writes:
                of = of.replace("Tensor", f"Tensor({chr(ord('a') + len(arguments))}!)", 1)
            arguments.append(f"{of} {argument}")
        schema = ", ".join(arguments)

        def shape(*args: Any, **kw: Any) -> None:
            """Nothing is returned: only the arguments change, and not in shape."""

        torch.library.define(name, f"({schema}) -> ()")
        torch.library.impl(name, "CompositeExplicitAutograd", run)
        torch.library.register_fake(name, shape)
        operator: Callable[..., None] = getattr(getattr(torch.ops.eigenfilter, self.name), overload)
        return operator


OPERATIONS: dict[str, Operation[...]] = {}
"""All operations by name, in the order of their declarations."""


def table() -> str:
    """Return a Markdown table of the operations, for the documentation."""
    rows = ["| operation | writes | reads | numbers and flags |", "| --- | --- | --- | --- |"]
    for operation in OPERATIONS.values():
        writes: list[str] = []
        tensors: list[str] = []
        others: list[str] = []
        for name, of in operation.annotations.items():
            if name in operation.writes:
                flag = operation.writes[name]
                writes.append(f"`{name}`" if flag is None else f"`{name}` with `{flag}`")
            else:
                (tensors if "Tensor" in of else others).append(f"`{name}`")
        cells = (f"`{operation.name}`", *map(", ".join, (writes, tensors, others)))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def entries() -> str:
    """Return the entries of the operations in the documentation, below a heading of their own."""
    entry = "::: eigenfilter.kernels.{}\n    options:\n      heading_level: 3"
    return "\n\n".join(map(entry.format, OPERATIONS))


class OnBackend(Generic[_P]):
    """An operation as an attribute of a backend: the function on it, with the declared arguments.

    It leaves version counters and autograd to its caller. A `backend` that it is passed is refused.
    Of the class itself the attribute is the reference.
    """

    def __init__(self, function: Callable[_P, None]) -> None:
        self._operation = OPERATIONS[function.__name__.lstrip("_")]

    def __get__(self, backend: Any, owner: type) -> Callable[_P, None]:
        if backend is None:
            return self._operation.reference
        function = self._operation.on(backend.name)
        setattr(backend, self._operation.name, function)
        return function


def _is_host_number(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)


def _tensor(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float64)
