"""A window of micro-batches against one closure that evaluates all of them."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter.integrations._window import Window

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(ef.SGD, momentum=0.9),
    "usam": functools.partial(ef.USAM, momentum=0.9, rho=0.1),
    "usam with rho 0": functools.partial(ef.USAM, momentum=0.9, rho=0.0),
    "sam": functools.partial(ef.SAM, rho=0.1),
    "two_step_usam": functools.partial(ef.TwoStepUSAM, rho=0.1),
    "hessian_usam": functools.partial(ef.HessianUSAM, rho=0.1, fd_step=1e-5),
    "adamw": functools.partial(ef.AdamW, method="sam", rho=0.1),
}
MICRO_BATCHES = 3


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)
    return nn.Sequential(*layers).double()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1]) / MICRO_BATCHES


def batches_of_step(step: int) -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(step)
    shapes = ((6, 4), (6, 2))
    draw = functools.partial(torch.randn, generator=gen, dtype=torch.float64)
    return [(draw(shapes[0]), draw(shapes[1])) for _ in range(MICRO_BATCHES)]


def by_closure(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad()
            with ef.freeze_running_stats(model) if opt.perturbed else nullcontext():
                losses = [loss_of(model, batch) for batch in batches_of_step(step)]
                for loss in losses:
                    loss.backward()
            return torch.stack(losses).sum()

        opt.step(closure)


def by_window(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    window = Window(model, opt)
    for step in range(steps):
        opt.zero_grad()
        for batch in batches_of_step(step):

            def evaluate(batch: tuple[Tensor, Tensor]) -> None:
                loss_of(model, batch).backward()

            with window.recording(evaluate, batch):
                evaluate(batch)
        window.take_ascents()
        assert len(window) == 0
        opt.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_window_is_one_closure(model: nn.Module, method: str) -> None:
    start = {name: t.clone() for name, t in model.state_dict().items()}
    ends = []
    for train in (by_closure, by_window):
        model.load_state_dict(start)
        torch.manual_seed(1)
        train(model, METHODS[method](model.parameters(), lr=0.1), 4)
        ends.append(({n: t.clone() for n, t in model.state_dict().items()}, torch.rand(1)))
    assert not torch.equal(ends[0][0]["0.weight"], start["0.weight"])
    for name, t in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], t, rtol=0, atol=0)
    if method != "hessian_usam":  # where a window leaves the generator as if nothing was replayed
        assert torch.equal(ends[0][1], ends[1][1])


def test_a_step_without_ascents_keeps_no_micro_batch(model: nn.Module) -> None:
    window = Window(model, ef.USAM(model.parameters(), lr=0.1, rho=0.0))
    with window.recording(lambda batch: None, None):
        pass
    assert len(window) == 0


def test_an_ascent_that_begins_within_a_step_is_refused(model: nn.Module) -> None:
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.0)
    window = Window(model, opt)
    before = [p.detach().clone() for p in model.parameters()]
    for batch, rho in zip(batches_of_step(0), (0.0, 0.1, 0.1), strict=True):
        opt.param_groups[0]["rho"] = rho
        with window.recording(lambda batch: None, None):
            loss_of(model, batch).backward()
    with pytest.raises(RuntimeError, match="rho was 0 for the first 1 micro-batches of a step"):
        window.take_ascents()
    assert len(window) == 0
    assert not opt.perturbed
    assert all(map(torch.equal, before, model.parameters()))
    # The next step, and one whose radius becomes 0 within it, are whole.
    for radius in (0.1, 0.0):
        opt.zero_grad()
        for batch, rho in zip(batches_of_step(1), (0.1, 0.1, radius), strict=True):
            opt.param_groups[0]["rho"] = rho
            with window.recording(lambda b: loss_of(model, b).backward(), batch):
                loss_of(model, batch).backward()
        window.take_ascents()
        opt.step()


def test_a_failed_evaluation_restores_the_weights(model: nn.Module) -> None:
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.1)
    window = Window(model, opt)
    before = [p.detach().clone() for p in model.parameters()]
    batch = batches_of_step(0)[0]

    def fail(batch: Any) -> None:
        raise ZeroDivisionError("a batch that fails")

    with window.recording(fail, batch):
        loss_of(model, batch).backward()
    with pytest.raises(ZeroDivisionError, match="a batch that fails"):
        window.take_ascents()
    assert not opt.perturbed
    assert len(window) == 0
    assert all(map(torch.equal, before, model.parameters()))


class Holder:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def replace(batch: Any) -> None:
    batch["x"] = batch["x"] + 1


def take(batch: Any) -> None:
    batch.pop("x")


def replace_attribute(batch: Any) -> None:
    batch.x = batch.x + 1


def write_array(batch: Any) -> None:
    batch[0] += 1.0


X = torch.ones(2)
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Callable[[Any], Any]]] = {
    "tensor": (X.clone, lambda b: b.add_(1), lambda b: b),
    "array": (lambda: [np.ones(2)], write_array, lambda b: b[0]),
    "entry of a dict": (lambda: {"x": X}, replace, lambda b: b["x"]),
    "entry of a UserDict": (lambda: UserDict(x=X), replace, lambda b: b["x"]),
    "entry taken": (lambda: {"x": X, "y": X}, take, lambda b: b["x"]),
    "attribute": (lambda: Holder(X), replace_attribute, lambda b: b.x),
    "in a UserDict": (lambda: UserDict(x=X.clone()), lambda b: b["x"].add_(1), lambda b: b["x"]),
    "in an object": (lambda: Holder(X.clone()), lambda b: b.x.add_(1), lambda b: b.x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_evaluation_gets_the_batch_as_it_was(model: nn.Module, name: str) -> None:
    make, change, read = CHANGES[name]
    batch = make()
    opt = ef.TwoStepUSAM(model.parameters(), lr=0.1, rho=0.1)
    window = Window(model, opt)
    values: list[list[float]] = []

    def evaluate(batch: Any) -> None:
        values.append(read(batch).tolist())
        change(batch)
        loss_of(model, batches_of_step(0)[0]).backward()

    with window.recording(evaluate, batch):
        evaluate(batch)
    window.take_ascents()
    assert values == [[1.0, 1.0]] * 3


def test_a_module_outside_the_model_keeps_its_buffers(model: nn.Module) -> None:
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.1)
    window = Window(model, opt)
    scale = nn.BatchNorm1d(2).double()

    def evaluate(batch: tuple[Tensor, Tensor]) -> None:
        nn.functional.mse_loss(scale(model(batch[0])), batch[1]).backward()

    batch = batches_of_step(0)[0]
    with window.recording(evaluate, batch, [scale, "no module"]):
        evaluate(batch)
    at_x = scale.running_mean.clone()
    window.take_ascents()
    assert torch.equal(scale.running_mean, at_x)
    assert scale.num_batches_tracked == 1


def test_processes_reduce_in_the_last_micro_batch(model: nn.Module) -> None:
    events: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append("no_sync")
        yield

    opt = ef.TwoStepUSAM(model.parameters(), lr=0.1, rho=0.1)
    window = Window(model, opt, no_sync=no_sync)

    def evaluate(batch: tuple[Tensor, Tensor]) -> None:
        events.append("evaluate")
        loss_of(model, batch).backward()

    for batch in batches_of_step(0):
        with window.recording(evaluate, batch):
            loss_of(model, batch).backward()
    window.take_ascents()
    assert events == ["no_sync", "evaluate", "no_sync", "evaluate", "evaluate"] * 2


def test_a_parameter_in_a_batch_may_be_perturbed(model: nn.Module) -> None:
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.1)
    window = Window(model, opt)

    def evaluate(batch: dict[str, Tensor]) -> None:
        assert batch["weight"] is model[0].weight
        loss_of(model, batches_of_step(0)[0]).backward()

    batch = {"weight": model[0].weight}
    with window.recording(evaluate, batch):
        evaluate(batch)
    with window.descent():
        opt.step()


CLEARS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "optimizer": lambda model, opt: opt.zero_grad(),
    "optimizer, in place": lambda model, opt: opt.zero_grad(set_to_none=False),
    "model": lambda model, opt: model.zero_grad(),
}


@pytest.mark.parametrize("clear", CLEARS)
@pytest.mark.parametrize("rho", [0.0, 0.1], ids=["from rho 0", "from rho 0.1"])
def test_cleared_gradients_begin_a_step(model: nn.Module, clear: str, rho: float) -> None:
    model[3].p = 0.0
    start = {name: t.clone() for name, t in model.state_dict().items()}
    ends = []
    for has_leftover in (False, True):
        model.load_state_dict(start)
        opt = METHODS["usam"](model.parameters(), lr=0.1)
        window = Window(model, opt)

        def record(batch: tuple[Tensor, Tensor], window: Window = window) -> None:
            with window.recording(lambda b: loss_of(model, b).backward(), batch):
                loss_of(model, batch).backward()

        if has_leftover:
            opt.param_groups[0]["rho"] = rho
            record(batches_of_step(5)[0])
            opt.param_groups[0]["rho"] = 0.1
        CLEARS[clear](model, opt)
        for batch in batches_of_step(0):
            record(batch)
        assert len(window) == MICRO_BATCHES
        window.take_ascents()
        opt.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["usam", "two_step_usam", "hessian_usam", "usam with rho 0"])
@pytest.mark.parametrize("has_optimizer", [False, True], ids=["untrained", "of another optimizer"])
def test_other_parameters_have_the_gradient_of_the_last_evaluation(
    model: nn.Module, method: str, has_optimizer: bool
) -> None:
    model[3].p = 0.0
    opt = METHODS[method](model[0].parameters(), lr=0.1)
    head = torch.optim.SGD(model[4].parameters(), lr=0.1)
    window = Window(model, opt)
    for step in range(2):
        opt.zero_grad()
        head.zero_grad()
        expected: list[Tensor] = []

        def evaluate(batch: tuple[Tensor, Tensor], expected: list[Tensor] = expected) -> None:
            expected += torch.autograd.grad(loss_of(model, batch), list(model[4].parameters()))
            loss_of(model, batch).backward()

        for batch in batches_of_step(step):
            with window.recording(evaluate, batch):
                evaluate(batch)
        window.take_ascents()
        last = expected[-2 * MICRO_BATCHES :]
        for i, p in enumerate(model[4].parameters()):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, torch.stack(last[i::2]).sum(0))
        opt.step()
        if has_optimizer:
            head.step()


def test_a_micro_batch_whose_first_evaluation_fails_is_forgotten(model: nn.Module) -> None:
    window = Window(model, ef.USAM(model.parameters(), lr=0.1, rho=0.1))
    with window.recording(lambda batch: None, None):
        loss_of(model, batches_of_step(0)[0]).backward()
    with pytest.raises(ZeroDivisionError), window.recording(lambda batch: None, None):
        raise ZeroDivisionError("a batch that fails")
    assert len(window) == 1
