"""A declaration is the whole statement of an operation: everything else follows it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import pytest
import torch

from eigenfilter import _core, kernels
from eigenfilter.kernels import _op
from eigenfilter.kernels import triton as triton_modules
from eigenfilter.kernels._op import OPERATIONS


def test_every_operation_is_public() -> None:
    assert set(OPERATIONS) < set(kernels.__all__)


def test_the_table_of_the_docs_says_what_is_written() -> None:
    written = "`params`, `backups` with `save`, `corrections`"
    read = "`grads`, `momentum_scales`, `grad_scale`, `found_inf`"
    row = f"\n| `perturb` | {written} | {read} | `alpha`, `save`, `adaptive` |\n"
    assert row in _op.table()


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
    operation, packet = OPERATIONS[name], getattr(torch.ops.eigenfilter, name)
    assert set(packet.overloads()) == {"default"} | {
        f"unless_{flag}" for flag in operation.writes.values() if flag is not None
    }
    for overload in packet.overloads():
        schema = getattr(packet, overload)._schema
        assert [a.name for a in schema.arguments] == [*operation.arguments, "backend"]
        for argument in schema.arguments:
            flag = operation.writes.get(argument.name, "never")
            writes = flag != "never" and f"unless_{flag}" != overload
            assert argument.is_write == writes, (overload, argument.name)


def declared(**annotations: str) -> Callable[..., None]:
    def toy() -> None:
        """A declaration that does not get as far as the core."""

    vars(toy)["__signature__"] = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )
    return toy


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"params": "Sequence[Tensor]"}, "toy needs the argument backend"),
        ({"lr": "float", "backend": "str | None"}, "toy: lr is 'float', which is none of"),
        ({"w": "Tensor", "backend": "str | None"}, r"toy takes \('w',\), and in the core \(\)"),
    ],
)
def test_mistakes_in_a_declaration(annotations: dict[str, str], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _op.op(declared(**annotations))
    assert "toy" not in OPERATIONS


def test_every_operation_of_the_core_is_declared() -> None:
    assert set(_core.operations) == set(OPERATIONS)
    for name, writes in _core.operations.items():
        assert set(writes.values()) <= {"", "always", *writes}, name


def test_a_backend_has_the_operations_and_a_known_name() -> None:
    assert set(OPERATIONS) <= set(dir(kernels.select("cpu")))
    assert kernels.Backend.gram is OPERATIONS["gram"].reference
    with pytest.raises(ValueError, match="unknown backend 'cuda': choose one of native, triton"):
        kernels.Backend("cuda")


def test_a_call_is_bound_as_the_declaration_says() -> None:
    x, g, b = ([torch.ones(3)] for _ in range(3))
    with pytest.raises(TypeError, match=r"perturb\(\) missing 1 required positional argument"):
        kernels.perturb(x, g, b)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rho'"):
        kernels.perturb(x, g, b, 0.1, rho=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes 4 positional arguments but 5"):
        kernels.perturb(x, g, b, 0.1, True)  # type: ignore[misc]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rho'"):
        kernels.select("cpu").perturb(x, g, b, 0.1, rho=0.1)  # type: ignore[call-arg]
    assert (x[0] == 1).all()
