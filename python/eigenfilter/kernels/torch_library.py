"""The kernels as operators of torch.library, for compiled code."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

_P = ParamSpec("_P")

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


def operator(*, mutates: tuple[str, ...]) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Register a kernel as `torch.ops.eigenfilter.<name>`, which its calls become when compiled.

    Args:
        mutates: names of the arguments that the kernel writes to.
    """

    def register(kernel: Callable[_P, None]) -> Callable[_P, None]:
        name = kernel.__name__.lstrip("_")
        parameters = inspect.signature(kernel).parameters
        types = {arg: parameters[arg].annotation for arg in parameters}
        defaults = {
            arg: parameter.default
            for arg, parameter in parameters.items()
            if parameter.default is not parameter.empty
        }
        positional = [arg for arg, of in parameters.items() if of.kind is not of.KEYWORD_ONLY]
        lists = {arg for arg, of in types.items() if of == "Sequence[Tensor] | None"}
        scalars = {arg for arg, of in types.items() if of.startswith("Scalar")}
        call: Any = kernel

        def run(*args: Any, **kw: Any) -> None:
            named = dict(zip(types, args, strict=False)) | kw
            for arg, value in named.items():
                if arg in lists:
                    named[arg] = value or None
                elif arg in scalars and value is not None and _is_host_number(value):
                    named[arg] = float(value)
            call(**named)

        def shape(*args: Any, **kw: Any) -> None:
            """Nothing is returned: only the arguments change, and not in shape."""

        schema = ", ".join(f"{_marked(_TYPES[types[arg]], arg, mutates)} {arg}" for arg in types)
        torch.library.define(f"eigenfilter::{name}", f"({schema}) -> ()")
        torch.library.impl(f"eigenfilter::{name}", "CompositeExplicitAutograd", run)
        torch.library.register_fake(f"eigenfilter::{name}", shape)
        op = getattr(torch.ops.eigenfilter, name)

        @functools.wraps(kernel)
        def kernel_or_operator(*args: _P.args, **kw: _P.kwargs) -> None:
            if not torch.compiler.is_compiling():
                kernel(*args, **kw)
                return
            if len(args) > len(positional):
                raise TypeError(f"{name}() takes {len(positional)} positional arguments")
            named = defaults | dict(zip(positional, args, strict=False)) | kw
            for arg in scalars:
                named[arg] = _tensor(named[arg])
            for arg in lists:
                named[arg] = list(named[arg] or ())
            op(**named)

        return kernel_or_operator

    return register


def _marked(of: str, arg: str, mutates: tuple[str, ...]) -> str:
    """A schema type, marked if the argument is written to."""
    if arg not in mutates:
        return of
    return of.replace("Tensor", f"Tensor({chr(ord('a') + mutates.index(arg))}!)", 1)


def _is_host_number(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)


def _tensor(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float64)
