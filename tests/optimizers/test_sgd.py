"""SGD is torch.optim.SGD: hundreds of steps, with state that goes back and forth between them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

import eigenfilter as ef
from cases import same_bits
from optimizers.problems import SETTINGS, closure_of, distance, parameters, sign_of, snapshot
from tolerances import RUNS


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]


def train(opt: torch.optim.Optimizer, params: list, sign: float, steps: int) -> None:
    closure = closure_of(opt, params, sign)
    for _ in range(steps):
        opt.step(closure)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_hundreds_of_steps(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    start = snapshot(ours)
    sign = sign_of(settings)
    opt, reference = (
        ef.SGD(groups(ours), **settings),
        torch.optim.SGD(groups(theirs), **settings),
    )
    for steps in (3, 50, 100, 100):
        train(opt, ours, sign, steps)
        train(reference, theirs, sign, steps)
        assert distance(ours, theirs) <= RUNS[dtype]
        state_dict, other = (copy.deepcopy(o.state_dict()) for o in (opt, reference))
        opt, reference = (
            ef.SGD(groups(ours), lr=7.0),
            torch.optim.SGD(groups(theirs), lr=7.0),
        )
        opt.load_state_dict(other)
        reference.load_state_dict(state_dict)
    assert distance(ours, start) > 0.3


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_few_steps_agree_to_rounding(settings: dict[str, Any]) -> None:
    """Before errors can grow or die out."""
    ours, theirs = parameters(), parameters()
    for step in range(1, 6):
        if step == 1:
            opt, reference = ef.SGD(ours, **settings), torch.optim.SGD(theirs, **settings)
        train(opt, ours, sign_of(settings), 1)
        train(reference, theirs, sign_of(settings), 1)
        assert distance(ours, theirs) < 1e-15 * step


def test_the_state_has_the_same_form() -> None:
    settings = SETTINGS["heavy ball"]
    ours, theirs = parameters(), parameters()
    opt, reference = ef.SGD(ours, **settings), torch.optim.SGD(theirs, **settings)
    train(opt, ours, 1.0, 3)
    train(reference, theirs, 1.0, 3)
    mine, inputs = opt.state_dict(), reference.state_dict()
    assert mine["state"].keys() == inputs["state"].keys()
    for i, entry in inputs["state"].items():
        assert mine["state"][i].keys() == entry.keys() == {"momentum_buffer"}
        a, b = mine["state"][i]["momentum_buffer"], entry["momentum_buffer"]
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        torch.testing.assert_close(a, b)
    assert len(mine["param_groups"]) == len(inputs["param_groups"])
    for group, other in zip(mine["param_groups"], inputs["param_groups"], strict=True):
        assert group.pop("stochastic_rounding") is False  # ours alone: torch keeps what it finds
        assert group.pop("extrapolation") == group.pop("extrapolated") == 0.0
        for name, value in group.items():
            assert other[name] == value


def test_arguments_are_torchs_in_order_and_default() -> None:
    ours = inspect.signature(ef.SGD).parameters
    theirs = inspect.signature(torch.optim.SGD).parameters
    positional = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) == 6
    for mine, other in zip(list(ours.values())[:6], positional, strict=True):
        assert (mine.name, mine.kind, mine.default) == (other.name, other.kind, other.default)
    assert ours["maximize"].default is theirs["maximize"].default is False


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_reference_backend_gives_the_same_bits(
    dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    results = []
    for backend in (None, "reference"):
        params = parameters(dtype)
        train(ef.SGD(params, **settings, backend=backend), params, sign_of(settings), 20)
        results.append(params)
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_named_parameters(name: str) -> None:
    model = torch.nn.Linear(3, 2)
    opt = getattr(ef, name)(model.named_parameters(), lr=0.1)
    reference = getattr(torch.optim, name)(model.named_parameters(), lr=0.1)
    names = [g["param_names"] for g in opt.state_dict()["param_groups"]]
    assert names == [g["param_names"] for g in reference.state_dict()["param_groups"]]
    assert names == [["weight", "bias"]]
