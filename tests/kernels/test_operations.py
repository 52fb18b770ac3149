"""A declaration is the whole statement of an operation: everything else follows it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

from eigenfilter import _core, kernels
from eigenfilter.kernels import _op
from eigenfilter.kernels import triton as triton_modules
from eigenfilter.kernels._op import OPERATIONS

DOCS = Path(__file__).parents[2] / "docs" / "api" / "kernels.md"


def test_the_table_of_the_docs() -> None:
    """It is the output of `_op.table()`; paste it there when an operation changes."""
    assert _op.table() in DOCS.read_text()


def test_every_kernel_is_documented() -> None:
    text = DOCS.read_text()
    for name in {*OPERATIONS, "cholesky_qr"}:
        assert f"::: eigenfilter.kernels.{name}\n" in text


def test_triton_has_a_module_for_each_operation() -> None:
    pytest.importorskip("triton")
    names = {module.name for module in pkgutil.iter_modules(triton_modules.__path__)}
    for name in names:
        module = importlib.import_module(f"{triton_modules.__name__}.{name}")
        assert hasattr(module, "run") == (name in OPERATIONS), name
    assert names > set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_compiled_function_has_the_declared_arguments(name: str) -> None:
    compiled = getattr(_core, name)
    expected = [*OPERATIONS[name].arguments, "num_threads"]
    assert list(inspect.signature(compiled).parameters) == expected
    assert "<-" in compiled.__doc__ or "=" in compiled.__doc__  # a formula


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operator_has_the_declared_arguments(name: str) -> None:
    operation = OPERATIONS[name]
    schema = getattr(torch.ops.eigenfilter, name).default._schema
    assert [argument.name for argument in schema.arguments] == [*operation.arguments, "backend"]
    for argument in schema.arguments:
        assert argument.is_write == (argument.name in operation.writes), argument.name


def test_a_call_is_bound_as_the_declaration_says() -> None:
    x, g, b = ([torch.ones(3)] for _ in range(3))
    with pytest.raises(TypeError, match=r"perturb\(\) missing 1 required positional argument"):
        kernels.perturb(x, g, b)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rho'"):
        kernels.perturb(x, g, b, 0.1, rho=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes 4 positional arguments but 5"):
        kernels.perturb(x, g, b, 0.1, True)  # type: ignore[misc]
    assert (x[0] == 1).all()
