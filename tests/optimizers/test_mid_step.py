"""Torch's methods that take weights in the middle of a step warn that these are perturbed."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim.swa_utils import AveragedModel

import eigenfilter as ef

Act = Callable[[nn.Module], Any]

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: ef.USAM(model.parameters(), lr=0.1, rho=0.5),
    "groups": lambda model: ef.SAM(
        [{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9, rho=0.5
    ),
    "list": lambda model: ef.TwoStepUSAM(list(model.parameters()), lr=0.1),
    "adamw": lambda model: ef.AdamW(model.parameters(), lr=0.1, rho=0.5, method="hessian_usam"),
    "wrapper": lambda model: ef.SharpnessAware(torch.optim.Adam(model.parameters(), lr=0.1)),
}

USES: dict[str, tuple[Act, str]] = {
    "state_dict": (lambda model: model.state_dict(), "state_dict() reads"),
    "of a part": (lambda model: model[2].state_dict(), "state_dict() reads"),
    "compiled": (lambda model: torch.compile(model).state_dict(), "state_dict() reads"),
    "checkpoint": (get_model_state_dict, "state_dict() reads"),
    "load": (lambda model: model.load_state_dict(network().state_dict()), "load_state_dict()"),
    "average": (lambda model: AVERAGE.update_parameters(model), "update_parameters() averages"),
    "average by name": (lambda model: AVERAGE.update_parameters(model=model), "update_parameters"),
    "copy": (copy.deepcopy, "copy.deepcopy() copies"),
    "new average": (AveragedModel, "copy.deepcopy() copies"),
    "pickle": (pickle.dumps, "pickling or torch.save() saves"),
    "save": (lambda model: torch.save(model, io.BytesIO()), "pickling or torch.save() saves"),
    "save a weight": (lambda model: torch.save(model[0].weight, io.BytesIO()), "pickling"),
}


def network() -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


AVERAGE = AveragedModel(network())


def closure_of(opt: torch.optim.Optimizer, model: nn.Module) -> Callable[[], Tensor]:
    data = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.fixture(params=OPTIMIZERS)
def in_mid_step(request: pytest.FixtureRequest) -> Iterator[tuple[Any, nn.Module]]:
    """An optimizer that has perturbed the weights of a model."""
    model = network()
    opt = OPTIMIZERS[request.param](model)
    closure_of(opt, model)()
    assert opt.ascend()
    yield opt, model
    opt.restore()


@pytest.mark.parametrize("use", USES)
def test_a_use_of_perturbed_weights_warns_once(
    in_mid_step: tuple[Any, nn.Module], use: str
) -> None:
    opt, model = in_mid_step
    act, said = USES[use]
    with pytest.warns(UserWarning, match=re.escape(said)) as caught:
        act(model)
    (warning,) = caught
    assert f"{type(opt).__name__} is in the middle of a step" in str(warning.message)
    assert warning.filename == __file__
    act(model)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_between_steps_there_is_no_warning(name: str, use: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model)
    act, _ = USES[use]
    act(model)
    closure = closure_of(opt, model)
    opt.step(closure)
    act(model)
    closure()
    opt.ascend()
    opt.restore()
    act(model)


def test_another_models_weights_are_nobodys_affair(in_mid_step: tuple[Any, nn.Module]) -> None:
    for act, _ in USES.values():
        act(network())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, ef.SGD])
def test_another_optimizer_may_not_step(in_mid_step: tuple[Any, nn.Module], make: Any) -> None:
    opt, model = in_mid_step
    other = make(model[2].parameters(), lr=0.1)
    closure_of(opt, model)()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=f"{type(opt).__name__} is in the middle of a step"):
        other.step()
    assert all(map(torch.equal, model.parameters(), before))
    opt.restore()
    other.step()
    assert not torch.equal(model[2].weight, before[2])


def test_the_base_may_not_step_alone() -> None:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = ef.SharpnessAware(base, rho=0.5)
    closure = closure_of(opt, model)
    closure()
    opt.ascend()
    closure()
    with pytest.raises(RuntimeError, match=r"End that with step\(\) of SharpnessAware"):
        base.step()
    opt.step()
    base.step()


def test_a_wrapper_and_an_optimizer_of_other_weights_may_step() -> None:
    class Passing(torch.optim.Optimizer):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    model, other = network(), network()
    inner = ef.USAM(model.parameters(), lr=0.1, rho=0.5)
    opt, elsewhere = Passing(inner), torch.optim.SGD(other.parameters(), lr=0.1)
    closure = closure_of(opt, model)
    closure()
    inner.ascend()
    closure()
    closure_of(elsewhere, other)()
    elsewhere.step()
    opt.step()
    assert not inner.perturbed


def test_what_is_returned_is_what_was_asked_for(in_mid_step: tuple[Any, nn.Module]) -> None:
    _, model = in_mid_step
    state_dict: dict[str, Any] = {}
    with pytest.warns(UserWarning, match=r"state_dict\(\) reads perturbed weights"):
        model.state_dict(destination=state_dict, prefix="net.", keep_vars=True)
    assert state_dict["net.0.weight"] is model[0].weight


def test_without_an_ascent_torch_is_left_alone() -> None:
    program = (
        "import torch, eigenfilter as ef\n"
        "methods = [torch.nn.Module.state_dict, torch.nn.Parameter.__deepcopy__]\n"
        "p = torch.nn.Parameter(torch.ones(2))\n"
        "opt = ef.SGD([p], lr=0.1)\n"
        "opt.step(lambda: p.square().sum().backward())\n"
        "assert methods == [torch.nn.Module.state_dict, torch.nn.Parameter.__deepcopy__]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Around(torch.optim.Optimizer):
    """A wrapper of an optimizer, or of a list of them."""

    def __init__(self, inner: object) -> None:
        self.inner = inner
        first = inner[0] if isinstance(inner, list) else inner
        self.param_groups, self.state, self.defaults = first.param_groups, first.state, {}
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}
        self._patch_step_function()

    def step(self, closure: object = None) -> None:
        for one in self.inner if isinstance(self.inner, list) else [self.inner]:
            one.step()


@pytest.mark.parametrize("nested", [lambda o: Around(Around(o)), lambda o: Around([o])])
def test_a_wrapper_of_a_wrapper_ends_the_step(nested: object) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = ef.USAM([p], lr=0.1, rho=0.1)
    outer = nested(opt)

    def closure() -> None:
        opt.zero_grad()
        (p * p).sum().backward()

    closure()
    while opt.ascend():
        closure()
    outer.step()
    assert not opt.perturbed
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 * 2 * 1.2).double())
