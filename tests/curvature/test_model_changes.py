"""An operator follows its model, raises where it cannot, and does not change it."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvature.networks import OPERATORS, Partial, columns, dense, make
from eigenfilter import _perturbation
from eigenfilter.curvature import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    eigsh,
)
from eigenfilter.curvature.engines import NAMES
from marks import rest_slow


def test_the_model_does_not_change() -> None:
    """Modes of submodules, gradients, buffers and flags are restored, also after an error."""
    model, x, target = make("partial")
    assert isinstance(model, Partial)
    model.norm.eval()
    model.last.weight.grad = torch.full_like(model.last.weight, 2.0)
    grad = model.last.weight.grad
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    eigsh(op, 2)
    broken = HessianOperator(model, nn.CrossEntropyLoss(), (x[:, :3], target))
    with pytest.raises(RuntimeError, match="shapes"):
        broken.matvec(torch.ones(broken.shape[0], dtype=torch.float64))
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model.last.weight.grad is grad
    assert grad.eq(2).all()
    assert all(p.grad is None for p in model.parameters() if p is not model.last.weight)


SURROUNDINGS = {
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("around_fixed", SURROUNDINGS)
@pytest.mark.parametrize("around_product", SURROUNDINGS)
def test_results_carry_no_graph_and_the_call_site_does_not_matter(
    around_fixed: str, around_product: str
) -> None:
    model, x, target = make(dtype=torch.float32)
    v = torch.randn(39, requires_grad=True)
    expected = dense(model, x, target) @ v.detach()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    with SURROUNDINGS[around_fixed](), op.fixed():
        pass
    with SURROUNDINGS[around_product]():
        result = op.matvec(v)
    assert not result.requires_grad
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["cached_graph", "vmap", "auto"])
def test_a_graph_is_kept_while_nothing_changes(engine: str) -> None:
    model, x, target = make("partial")
    calls = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(output, target)

    data = [(x[:20], target[:20]), (x[20:], target[20:])]
    op = HessianOperator(model, loss_fn, data, engine=engine)
    assert calls == 0
    eigsh(op, 3)
    columns(op)
    choices = 2 if engine == "auto" else 0  # one for vectors, one for blocks
    weights = 1 + 2  # samples alone, and beside each batch, to see what that weighs
    still = 2 * 2  # at x and beside it: that the unused layer moves nothing, once a batch
    frozen = 1  # that f is the same where parameters do not require grad
    once = choices + weights + still + frozen
    assert calls == 2 + once
    model.eval()
    eigsh(op, 3)
    columns(op)
    assert calls == 2 + once


def changed_in_place(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter("last.weight").mul_(-2)


def changed_by_a_fused_optimizer(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def changed_through_data(model: nn.Module, x: Tensor) -> None:
    model.get_parameter("first.bias").data[1] += 0.5


def changed_frozen(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter("frozen.weight").add_(0.3)


def changed_statistics(model: nn.Module, x: Tensor) -> None:
    for _ in range(9):
        model.train()(7 * x)


def changed_data(model: nn.Module, x: Tensor) -> None:
    x.mul_(1.5)


def changed_state(model: nn.Module, x: Tensor) -> None:
    model.load_state_dict(Partial().double().state_dict())


CHANGES = [
    changed_in_place,
    changed_by_a_fused_optimizer,
    changed_through_data,
    changed_frozen,
    changed_statistics,
    changed_data,
    changed_state,
]


@pytest.mark.parametrize("change", CHANGES)
def test_follows_the_model(change: Callable[[nn.Module, Tensor], None]) -> None:
    model, x, target = make("partial")
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    before = columns(op)
    change(model, x)
    expected = dense(model, x, target)
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-13)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    change(model, x)
    torch.testing.assert_close(op.matvec(v), dense(model, x, target) @ v, rtol=0, atol=1e-11)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("kind", rest_slow(OPERATORS))
def test_every_engine_follows(kind: type[CurvatureOperator], engine: str) -> None:
    model, x, target = make("partial")
    op = kind(model, nn.CrossEntropyLoss(), (x, target), engine=engine)
    before = columns(op)
    for change in CHANGES:
        change(model, x)
        expected = OPERATORS[kind](model, x, target)
        assert (before - expected).abs().max() > 1e-3
        before = columns(op)
        atol = 1e-7 if engine == "finite_difference" else 1e-12
        scale = float(expected.abs().max())
        torch.testing.assert_close(before, expected, rtol=0, atol=atol * scale)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_within_a_solve_raises(change: Callable[[nn.Module, Tensor], None]) -> None:
    model, x, target = make("partial")
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    product = op.matvec
    counter = itertools.count()

    def matvec(v: Tensor) -> Tensor:
        if next(counter) == 3:
            change(model, x)
        return product(v)

    op.matvec = matvec  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="changed while a solver was using the operator"):
        eigsh(op, 3)
    # What leaves no trace in a version shows at the end only.
    traceless = (changed_by_a_fused_optimizer, changed_through_data)
    assert (next(counter) == 4) != (change in traceless)
    op.matvec = product  # type: ignore[method-assign]
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-13)


def test_fixed_nests_and_ends_after_an_error() -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))

    def interrupted() -> None:
        with op.fixed(), op.fixed():
            raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        interrupted()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    torch.testing.assert_close(columns(op), dense(model, x, target), rtol=0, atol=1e-13)

    def outer() -> None:
        with op.fixed():
            with op.fixed():
                pass
            model.get_parameter("0.weight").data.mul_(2)

    with pytest.raises(RuntimeError, match="changed"):
        outer()


def test_replaced_parameters_raise() -> None:
    model, x, target = make()
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target))
    columns(op)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="replaced since"):
        columns(op)


def test_follows_a_change_of_dtype() -> None:
    model, x, target = make(dtype=torch.float32)
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x.double(), target))
    model.double()
    expected = dense(model, x.double(), target)
    assert op.dtype == torch.float64
    torch.testing.assert_close(columns(op), expected, rtol=0, atol=1e-13)


def test_a_perturbed_optimizer_raises() -> None:
    model, x, target = make()
    op = HessianOperator(
        model, nn.CrossEntropyLoss(), (x, target), params=[model.get_parameter("0.weight")]
    )
    v = torch.ones(op.shape[0], dtype=torch.float64)
    other = torch.optim.SGD([model.get_parameter("3.weight")], lr=0.1)
    expected = op.matvec(v)
    _perturbation.enter(other)
    try:
        with pytest.raises(RuntimeError, match=r"SGD holds perturbed parameters: .*restore"):
            op.matvec(v)
        with pytest.raises(RuntimeError, match="SGD holds"):
            eigsh(op, 2)
    finally:
        _perturbation.leave(other)
    assert torch.equal(op.matvec(v), expected)


def test_a_fused_step_that_leaves_the_sums_alone_is_noticed() -> None:
    """Cross-entropy's gradients sum to zero over classes, and fused steps increase no version."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, target = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    loss_fn = nn.CrossEntropyLoss()
    op = HessianOperator(model, loss_fn, (x, target))
    opt = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    v = torch.randn(op.shape[0], dtype=torch.float64)
    for _ in range(30):
        before = op.matvec(v)
        opt.zero_grad()
        loss_fn(model(x), target).backward()
        opt.step()
        after = op.matvec(v)
        fresh = HessianOperator(model, loss_fn, (x, target)).matvec(v)
        torch.testing.assert_close(after, fresh)
        assert not torch.equal(after, before)


def test_an_operator_is_no_cycle() -> None:
    """Its graphs are freed with it, without a garbage collection."""
    model = nn.Linear(4, 3).double()
    data = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    gc.disable()
    try:
        for kind in (HessianOperator, GGNOperator, EmpiricalFisherOperator):
            op = kind(model, nn.CrossEntropyLoss(), data, engine="cached_graph")
            op.matvec(torch.ones(op.shape[0], dtype=torch.float64))
            alive = weakref.ref(op)
            del op
            assert alive() is None
    finally:
        gc.enable()
