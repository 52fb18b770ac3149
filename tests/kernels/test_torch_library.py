"""The kernels under torch.library and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import same_bits
from compressed import CODES, lists_of
from eigenfilter import kernels
from eigenfilter.kernels._op import OPERATIONS

SHAPES = ((5,), (3, 4), ())

NO_GRAPHS = pytest.mark.filterwarnings("ignore:.*record_function.*", "ignore:.*CUDA.*")


def lists(count: int) -> list[list[Tensor]]:
    """So many lists of new tensors."""
    random = torch.Generator().manual_seed(count)
    return [[torch.rand(shape, generator=random) for shape in SHAPES] for _ in range(count)]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


FLAG = torch.zeros(())

# Calls of every kernel: how many lists, and what is done with them.
CALLS: dict[str, tuple[int, Callable[..., Any]]] = {
    "perturb": (3, lambda p, g, b: kernels.perturb(p, g, b, 0.1, adaptive=True)),
    "perturb unsaved": (2, lambda p, g: kernels.perturb(p, g, None, 0.1, save=False)),
    "perturb backups": (3, lambda p, g, b: kernels.perturb(p, g, b, 0.1, save=False)),
    "perturb_hvp": (4, lambda p, g, g0, b: kernels.perturb_hvp(p, g, g0, b, 0.1, eps=1e-2)),
    "sgd_step": (2, lambda p, g: kernels.sgd_step(p, g, lr=0.1, weight_decay=0.01)),
    "sgd_step momentum": (
        4,
        lambda p, g, m, b: kernels.sgd_step(
            p, g, m, b, lr=scalar(0.1), momentum=0.9, nesterov=True, grad_scale=torch.ones(())
        ),
    ),
    "adamw_step": (
        4,
        lambda p, g, m, v: kernels.adamw_step(p, g, m, v, lr=0.1, step=3, found_inf=FLAG),
    ),
    "norm": (1, lambda t: kernels.norm(t)),
    "norm weights": (2, lambda t, w: kernels.norm(t, weights=w, out=torch.empty(()))),
    "orthogonalize": (
        2,
        lambda w, g: kernels.orthogonalize(w[0].double(), torch.eye(5)[:2] + g[0]),
    ),
    "row_dots": (2, lambda q, w: kernels.row_dots(q[1], w[1])),
    "lanczos_step": (
        3,
        lambda u, q, w: kernels.lanczos_step(u[1], q[1], w[1], torch.ones(3, 3).double()),
    ),
    "gram": (1, lambda v: kernels.gram(v[1])),
    "mix_rows": (1, lambda v: kernels.mix_rows(v[1], torch.ones(3, 3).double())),
    "cross_entropy_hvp": (
        2,
        lambda u, z: kernels.cross_entropy_hvp(z[1], u[1], torch.ones(3).double(), out=u[1]),
    ),
    "flag_nonfinite": (1, lambda t: kernels.flag_nonfinite(t, torch.zeros(()))),
}


@NO_GRAPHS
@pytest.mark.parametrize("name", CALLS)
def test_a_compiled_call_is_the_call(name: str) -> None:
    count, call = CALLS[name]

    def work(*inputs: list[Tensor]) -> tuple[Any, list[Tensor]]:
        returned = call(*inputs)
        return returned, [t + 1 for t in inputs[0]]  # sees what was written

    expected = lists(count)
    returned, after = work(*expected)
    torch.compiler.reset()
    result = lists(count)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    its, its_after = compiled(*result)
    for ours, theirs in zip(result, expected, strict=True):
        assert all(map(same_bits, ours, theirs))
    assert all(map(same_bits, its_after, after))
    if isinstance(returned, tuple):
        assert all(map(same_bits, its, returned))
    else:
        assert its is None if returned is None else same_bits(its, returned)


def test_errors_are_those_of_the_kernels() -> None:
    [params, grads] = lists(2)

    def work(params: list[Tensor], grads: list[Tensor]) -> None:
        kernels.perturb(params, grads, None, 0.1, save=False)

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="grads"):
        compiled(params, grads[:-1])


@NO_GRAPHS
def test_a_compiled_call_takes_what_the_call_takes() -> None:
    [params, grads] = lists(2)
    by_position = torch.compile(lambda p, g: kernels.sgd_step(p, g, None, None, None, None, 0.1))
    with pytest.raises(Exception, match="positional"):
        by_position(params, grads)
    whole = torch.tensor(1)
    with pytest.raises(TypeError, match="lr"):
        torch.compile(lambda p, g: kernels.sgd_step(p, g, lr=whole), backend="eager")(params, grads)


def arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the operator of an operation on lists.

    Args:
        given: some of them, all lists among them; or none, for lists of one dtype. Those that are
            only read, and may be absent, then are.
    """
    supply, operation = iter(lists(4)), OPERATIONS[name]
    others: dict[str, Any] = {"step": scalar(2.0), "rounding_seed": scalar(7.0)}
    others |= {"grad_scale": scalar(2.0).float(), "found_inf": FLAG.clone(), "out": torch.empty(())}
    for argument, of in operation.annotations.items():
        if of.startswith("Sequence"):
            is_compressed = argument == "corrections" or argument.endswith("_scales")
            is_read = argument not in operation.writes
            is_absent = given or (of.endswith("None") and (is_read or is_compressed))
            others[argument] = given.get(argument) or ([] if is_absent else next(supply))
        elif of == "bool":
            others[argument] = argument == "save"
        else:
            others.setdefault(argument, scalar(0.5))
    return {argument: others[argument] for argument in operation.arguments}


def row_arguments(name: str) -> tuple[Any, ...]:
    """Arguments for the operator of an operation on rows of vectors."""
    u, q, w, _ = (tensors[1] for tensors in lists(4))
    sums, square = torch.empty(2, 3).double(), torch.ones(3, 3).double()
    return {
        "orthogonalize": (
            lists(1)[0][0],
            torch.eye(5)[:2],
            torch.empty(2).double(),
            scalar(0.0),
            1,
        ),
        "row_dots": (q, w, sums),
        "lanczos_step": (u, q, w, square, sums),
        "gram": (u, torch.empty(3, 3).double()),
        "mix_rows": (u, square),
        "cross_entropy_hvp": (u, q, square[0], torch.empty(3).double(), w),
    }[name]


@NO_GRAPHS
@pytest.mark.parametrize("save", [True, False])
def test_a_compiled_call_counts_the_versions_of_what_it_writes(save: bool) -> None:
    x, g, b = ([torch.ones(3)] for _ in range(3))
    compiled = torch.compile(
        lambda x, g, b: kernels.perturb(x, g, b, 0.1, save=save),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(x, g, b)
    assert (x[0]._version > 0, g[0]._version, b[0]._version > 0) == (True, 0, save)


def test_a_compiled_call_refuses_an_empty_list() -> None:
    compiled = torch.compile(
        lambda x, g: kernels.perturb(x, g, [], 0.1, save=False), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="backups has no tensors: pass at least one, or None"):
        compiled([torch.ones(3)], [torch.ones(3)])


@NO_GRAPHS
@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.eigenfilter, name).default
    if OPERATIONS[name].takes_lists:
        torch.library.opcheck(operator, (), arguments(name, {}) | {"backend": "reference"})
    else:
        torch.library.opcheck(operator, (*row_arguments(name), None))


def compressed(name: str) -> dict[str, Any]:
    """Lists of a step whose parameters have corrections, and whose states are codes."""
    form, states = (torch.bfloat16, torch.int8, CODES), 1 + (name == "adamw_step")
    return lists_of(form, states, places=((5, 0), (130, 0))).arguments(backups=True)


@NO_GRAPHS
@pytest.mark.parametrize("name", ["sgd_step", "adamw_step"])
def test_opcheck_of_compressed_tensors(name: str) -> None:
    operator = getattr(torch.ops.eigenfilter, name).default
    given = arguments(name, compressed(name))
    torch.library.opcheck(operator, (), given | {"backend": "reference"})


@NO_GRAPHS
@pytest.mark.parametrize("name", ["sgd_step", "adamw_step"])
def test_a_compiled_call_of_compressed_tensors_is_the_call(name: str) -> None:
    kernel = getattr(kernels, name)
    numbers = {"lr": 0.1, "weight_decay": 0.01, "extrapolation": 0.3}
    numbers |= {"step": 3} if name == "adamw_step" else {"momentum": 0.9}
    expected, result = compressed(name), compressed(name)
    kernel(**expected, **numbers)
    compiled = torch.compile(
        lambda given: kernel(**given, **numbers), fullgraph=True, backend="aot_eager"
    )
    compiled(result)
    for argument, tensors in expected.items():
        assert all(map(same_bits, result[argument], tensors))
