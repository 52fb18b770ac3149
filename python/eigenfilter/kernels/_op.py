"""Operations: a kernel is declared once, as a function, and the rest follows from that.

    @op(writes=("params",))
    def perturb_hvp(params, grads, base_grads, backups, alpha, eps, *, ..., backend=None):
        \"\"\"The docstring that users read.\"\"\"
        ...  # the reference: the same arithmetic in plain PyTorch

From the declaration follow the choice of the backend, the checks, version counters, the operator
`torch.ops.eigenfilter.<name>` for compiled code, and a row of the table in docs/api/kernels.md.
Each backend has one function of an operation, which takes all arguments, in this order:

    native       _core.<name>(*arguments, num_threads)
    triton       eigenfilter.kernels.triton.<name>.run(table, call), the arguments as attributes
    reference    the body of the declaration, the arguments by name

The compiled function checks all arguments before anything is written. With `num_threads` 0 it does
nothing else, and returns a table of what it has read: it is the check of the other backends, too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eigenfilter import _core
from eigenfilter.kernels import dispatch

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


def op(
    *, writes: tuple[str, ...], writes_if: Mapping[str, str] | None = None
) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Declare an operation by its reference.

    Args:
        writes: names of the arguments that the operation always writes to, if they are there.
        writes_if: names of the arguments that it writes to only where a flag is true, and the
            flag's name for each.
    """

    def declare(reference: Callable[_P, None]) -> Callable[_P, None]:
        operation = Operation(reference, dict.fromkeys(writes) | dict(writes_if or {}))
        OPERATIONS[operation.name] = operation
        return operation.function()

    return declare


class Operation(Generic[_P]):
    """What a declaration says, and the functions that follow from it.

    Attributes:
        name: name of the operation in all backends and in torch.ops.eigenfilter.
        arguments: names of all arguments except `backend`, in order.
        annotations: their types, as the declaration writes them.
        writes: names of the arguments that it writes to; for each the flag that decides it, or
            None if it always does.
        takes_lists: whether it works on lists of tensors, not on the rows of single ones.
        reference: the declared function.
    """

    def __init__(self, reference: Callable[_P, None], writes: Mapping[str, str | None]) -> None:
        self.name = reference.__name__.lstrip("_")
        self.writes = writes
        self.reference: Callable[..., None] = reference
        self._parameters = dict(inspect.signature(reference).parameters)
        self.arguments = tuple(name for name in self._parameters if name != "backend")
        self.annotations = {name: self._parameters[name].annotation for name in self.arguments}
        self.takes_lists = self.annotations[self.arguments[0]] != "Tensor"
        place = self.arguments.index
        self._writes = [(place(n), None if f is None else place(f)) for n, f in writes.items()]
        self._implementations: dict[str, Callable[..., None]] = {}

    def on(self, backend: str) -> Callable[..., None]:
        """Return the operation on one backend, with the declared arguments except `backend`.

        It leaves version counters and autograd to its caller.
        """
        if backend == "native":
            core = getattr(_core, self.name)
            call = "core({arguments}, threads())"
            return self._bound(call, core=core, threads=torch.get_num_threads)
        return self._bound("run({arguments})", run=self._implementation(backend))

    def function(self) -> Callable[_P, None]:
        """Return the public function: it chooses the backend and counts versions.

        In code that torch compiles, its calls become the operator torch.ops.eigenfilter.<name>.
        """
        run_now = self._bound("run(backend, {arguments})", run=self._run)
        run_compiled = self._register(run_now)

        @functools.wraps(self.reference)
        def kernel(*args: _P.args, **kw: _P.kwargs) -> None:
            if torch.compiler.is_compiling():
                run_compiled(*args, **kw)
            else:
                run_now(*args, **kw)

        return kernel

    def _run(self, backend: str | None, *values: Any) -> None:
        tensor = dispatch.first(self.arguments[0], values[0]) if self.takes_lists else values[0]
        self._implementation(dispatch.choose(tensor.device, backend))(*values)
        increment_version(self._written(values))

    def _implementation(self, backend: str) -> Callable[..., None]:
        """The function of one backend, which takes all arguments by position."""
        if backend not in self._implementations:
            self._implementations[backend] = self._implement(backend)
        return self._implementations[backend]

    def _implement(self, backend: str) -> Callable[..., None]:
        core = getattr(_core, self.name)
        if backend == "native":
            threads = torch.get_num_threads
            return lambda *values: core(*values, threads())
        if backend == "triton":
            run = importlib.import_module(f"eigenfilter.kernels.triton.{self.name}").run
            return lambda *values: run(
                core(*values, _CHECK), SimpleNamespace(**self._named(values))
            )

        def check_and_run(*values: Any) -> None:
            core(*values, _CHECK)
            with torch.no_grad():
                self.reference(**self._named(values))

        return check_and_run

    def _named(self, values: Sequence[Any]) -> dict[str, Any]:
        """The values of all arguments by their names."""
        return dict(zip(self.arguments, values, strict=True))

    def _written(self, values: Sequence[Any]) -> list[Tensor]:
        """The tensors that a call has written."""
        written: list[Tensor] = []
        for place, flag in self._writes:
            value = values[place]
            if isinstance(value, Tensor):
                written.append(value)
            elif value is not None and (flag is None or values[flag]):
                written += value
        return written

    def _bound(self, call: str, **functions: Callable[..., Any]) -> Callable[..., None]:
        """Return a function with the declared parameters whose body is a call of `functions`.

        It is made as the standard library makes a dataclass' __init__: Python then binds names and
        defaults itself, and its errors are those of a function with this signature.

        Args:
            call: the call, "{arguments}" standing for the arguments except `backend`. The function
                has the parameter `backend` if the call has it.
            functions: what the call calls, by its names there.
        """
        namespace: dict[str, Any] = dict(functions)
        parameters = []
        for name in (*self.arguments, *(["backend"] if "backend" in call else [])):
            parameter = self._parameters[name]
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
                parameters.append("*")
            if parameter.default is parameter.empty:
                parameters.append(name)
            else:
                namespace[f"default_{name}"] = parameter.default
                parameters.append(f"{name}=default_{name}")
        body = call.format(arguments=", ".join(self.arguments))
        exec(f"def {self.name}({', '.join(parameters)}):\n    {body}", namespace)
        function: Callable[..., None] = namespace[self.name]
        return function

    def _register(self, run_now: Callable[..., None]) -> Callable[..., None]:
        """Register the operator of compiled code; return the function that calls it."""
        types = {name: parameter.annotation for name, parameter in self._parameters.items()}
        defaults = {
            name: parameter.default
            for name, parameter in self._parameters.items()
            if parameter.default is not parameter.empty
        }
        positional = [n for n, p in self._parameters.items() if p.kind is not p.KEYWORD_ONLY]
        lists = {name for name, of in types.items() if of == "Sequence[Tensor] | None"}
        scalars = {name for name, of in types.items() if of.startswith("Scalar")}
        name = self.name

        def run(*args: Any, **kw: Any) -> None:
            named = dict(zip(types, args, strict=False)) | kw
            for argument, value in named.items():
                if argument in lists:
                    named[argument] = value or None
                elif argument in scalars and value is not None and _is_host_number(value):
                    named[argument] = float(value)
            run_now(**named)

        def shape(*args: Any, **kw: Any) -> None:
            """Nothing is returned: only the arguments change, and not in shape."""

        schema = ", ".join(f"{self._schema_type(arg, of)} {arg}" for arg, of in types.items())
        torch.library.define(f"eigenfilter::{name}", f"({schema}) -> ()")
        torch.library.impl(f"eigenfilter::{name}", "CompositeExplicitAutograd", run)
        torch.library.register_fake(f"eigenfilter::{name}", shape)
        operator = getattr(torch.ops.eigenfilter, name)

        def run_compiled(*args: Any, **kw: Any) -> None:
            if len(args) > len(positional):
                raise TypeError(f"{name}() takes {len(positional)} positional arguments")
            named = defaults | dict(zip(positional, args, strict=False)) | kw
            for argument in scalars:
                named[argument] = _tensor(named[argument])
            for argument in lists:
                named[argument] = list(named[argument] or ())
            operator(**named)

        return run_compiled

    def _schema_type(self, argument: str, annotation: str) -> str:
        """The type of an argument, marked if the operation may write to it."""
        of = _TYPES[annotation]
        if argument not in self.writes:
            return of
        letter = chr(ord("a") + list(self.writes).index(argument))
        return of.replace("Tensor", f"Tensor({letter}!)", 1)


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


class Backend:
    """The operations on one backend, as functions with the arguments of `eigenfilter.kernels`.

    They leave version counters and autograd to their caller, and take no `backend`.

    Attributes:
        name: one of "native", "triton" and "reference".
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in OPERATIONS:
            raise AttributeError(f"the kernels have no operation {name!r}")
        function = OPERATIONS[name].on(self.name)
        setattr(self, name, function)
        return function


def select(device: torch.device | str, backend: str | None = None) -> Backend:
    """Return the operations on the backend that serves a device.

    Args:
        device: device of type "cpu" or "cuda" (torch's name for ROCm too). "cuda" without a number
            stands for the current GPU.
        backend: name of a backend, which works or raises. None selects native on the CPU, and on a
            GPU native if its kernels were compiled for such a GPU, else Triton. The selection is
            logged once.

    Raises:
        ValueError: the backend is unknown, or no backend serves the device.
        RuntimeError: the backend is not available, or not for this device.
    """
    return _BACKENDS[dispatch.choose(torch.device(device), backend)]


_BACKENDS = {name: Backend(name) for name in dispatch.BACKENDS}


def _is_host_number(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)


def _tensor(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float64)
