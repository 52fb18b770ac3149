"""Optimizers with an extrapolation: values that are refused, and errors in the middle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef
from cases import same_bits
from optimizers.extrapolated import (
    ADAMW,
    TOLERANCES,
    Formula,
    distance,
    parameters,
    set_gradients,
    train,
)


def adamw(params: Any, **options: Any) -> ef.AdamW:
    return ef.AdamW(params, **ADAMW | options)


def sgd(params: Any, **options: Any) -> ef.SGD:
    return ef.SGD(params, lr=0.02, momentum=0.9, **options)


each = pytest.mark.parametrize("build", [adamw, sgd])


@each
@pytest.mark.parametrize("name", ["extrapolation", "max_eigenvalue"])
@pytest.mark.parametrize("value", [False, True, "", "a", torch.tensor(0.0), 1j, [0.1]], ids=repr)
@pytest.mark.parametrize("in_group", [False, True])
def test_no_number(build: Callable[..., Any], name: str, value: Any, in_group: bool) -> None:
    options = {name: value}
    groups = [{"params": parameters()} | (options if in_group else {})]
    with pytest.raises(TypeError, match=f"^{name} must be a number, and is "):
        build(groups, **({} if in_group else options))


@each
@pytest.mark.parametrize("name", ["extrapolation", "max_eigenvalue"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_finite_number(build: Callable[..., Any], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be finite, and is {value}"):
        build(parameters(), **{name: value})


@each
def test_train_checks_what_was_set(build: Callable[..., Any]) -> None:
    params = parameters()
    opt = build(params, extrapolation=0.05)
    train(opt, params, 2)
    before = [p.detach().clone() for p in params]
    for value, error in ((math.nan, ValueError), ("far", TypeError), (True, TypeError)):
        opt.param_groups[0]["extrapolation"] = value
        with pytest.raises(error, match="extrapolation must be"):
            opt.train()
    assert all(map(same_bits, before, params))
    assert opt.param_groups[0]["extrapolated"] == 0.05


FLOAT16 = "^an extrapolation of AdamW with float16 parameters: .* Use bfloat16 or float32"


def test_float16_is_refused_from_the_start() -> None:
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    mixed = [nn.Parameter(torch.ones(2)), half]
    for options in ({"extrapolation": 0.05}, {"max_eigenvalue": 30.0}, {"extrapolation": -0.01}):
        with pytest.raises(TypeError, match=FLOAT16):
            adamw(mixed, **options)
    opt = adamw(mixed[:1], extrapolation=0.05)
    with pytest.raises(TypeError, match=FLOAT16):
        opt.add_param_group({"params": [half]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [half], "extrapolation": 0.0})
    sgd([half], extrapolation=0.05)


def test_float16_is_refused_where_it_is_set_later() -> None:
    params = parameters(torch.float16)
    opt = adamw(params)
    train(opt, params, 2)
    before = [p.detach().clone() for p in params]
    opt.param_groups[0]["extrapolation"] = 0.05
    set_gradients(params)
    for call in (opt.step, opt.train):
        with pytest.raises(TypeError, match=FLOAT16):
            call()
    assert all(map(same_bits, before, params))
    opt.param_groups[0]["extrapolation"] = 0.0
    opt.step()


def test_float16_is_refused_where_a_model_is_converted_later() -> None:
    model = nn.Linear(3, 2)
    params = list(model.parameters())
    opt = adamw(params, extrapolation=0.05)
    train(opt, params, 2)
    model.half()
    before = [p.detach().clone() for p in params]
    set_gradients(params)
    for call in (opt.step, opt.eval):
        with pytest.raises(TypeError, match=FLOAT16):
            call()
    assert all(map(same_bits, before, params))
    model.float()
    set_gradients(params)
    opt.step()
    opt.eval()


def run(build: Callable[..., Any]) -> tuple[Any, list[nn.Parameter]]:
    """An optimizer after three steps; each group, and of AdamW each parameter, needs a call."""
    shapes = (2, 3), (7,), (), (4,)
    params = [nn.Parameter(torch.full(s, 0.5 + len(s), dtype=torch.float64)) for s in shapes]
    parts = [[params[0]], params[1:3], [params[3]]] if build is adamw else [[p] for p in params]
    opt = build([{"params": p, "extrapolation": 0.01 * i + 0.03} for i, p in enumerate(parts)])
    train(opt, params, 3)
    return opt, params


@each
@pytest.mark.parametrize("mode", ["eval", "train", "step"])
@pytest.mark.parametrize("n", range(1, 5))
def test_an_error_in_the_middle_leaves_what_extrapolated_says(
    build: Callable[..., Any], n: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eval() and train(), and of a step that takes a change into effect."""
    opt, params = run(build)
    other, others = run(build)
    if mode == "train":
        opt.eval()
        other.eval()
    set_gradients(params)
    set_gradients(others)
    if mode == "step":
        for group in opt.param_groups:
            group["extrapolation"] += 0.02
        other.step()
    versions = [p._version for p in params]
    has = [group["extrapolated"] for group in opt.param_groups]
    kernels = opt._buckets.built[0].kernels
    perturb, calls = kernels.perturb, iter(range(1, 100))

    def interrupted(*args: Any, **options: Any) -> None:
        if next(calls) == n:
            raise KeyboardInterrupt
        perturb(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "perturb", interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(opt, mode)()
    assert [group["extrapolated"] for group in opt.param_groups] == has
    assert next(calls) == 2 * n  # those before it were taken back
    assert distance(params, [p.detach() for p in others]) < 1e-14
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    opt.eval()
    other.eval()
    assert distance(params, [p.detach() for p in others]) < 1e-14


def test_no_memory_is_allocated_between_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many parameters, as large as they are: an update u has none of its own."""
    opt, _ = run(adamw)
    kernels = opt._buckets.built[0].kernels
    perturb, places = kernels.perturb, set()

    def noting(own: Any, along: Any, *args: Any, **options: Any) -> None:
        places.add(along[0].untyped_storage().data_ptr())
        perturb(own, along, *args, **options)

    monkeypatch.setattr(kernels, "perturb", noting)
    opt.eval()
    assert len(places) == 1


def test_parameters_of_all_kinds_share_the_memory() -> None:
    """Of several dtypes and layouts, and without elements."""
    gen = torch.Generator().manual_seed(1)
    tensors = [
        torch.rand(5, generator=gen, dtype=torch.float64),
        torch.empty(0),
        torch.rand(3, 4, generator=gen).t(),
        torch.rand(2, 3, 4, 5, generator=gen).to(memory_format=torch.channels_last),
        torch.rand(7, generator=gen).bfloat16(),
    ]
    params = [nn.Parameter(t) for t in tensors]
    opt = adamw(params, extrapolation=0.05)
    formulas = [Formula([p]) for p in params]
    train(opt, params, 1)
    for p, formula in zip(params, formulas, strict=True):
        formula.step(0.05)
        assert distance([p], formula.y(0.05)) <= TOLERANCES[p.dtype] if p.numel() else True
    opt.eval()
    for p, formula in zip(params, formulas, strict=True):
        assert distance([p], formula.x) <= TOLERANCES[p.dtype] if p.numel() else True
    alone = nn.Parameter(torch.empty(0))
    opt = adamw([alone], extrapolation=0.05)
    train(opt, [alone], 1)
    opt.eval()


@pytest.mark.parametrize("build", [adamw, sgd, ef.MSAM])
def test_a_loaded_state_is_laid_out_once(build: Callable[..., Any], monkeypatch: Any) -> None:
    params = parameters()
    opt = build(params)
    train(opt, params, 1)
    opt.param_groups[0]["rho" if build is ef.MSAM else "extrapolation"] = 0.05
    train(opt, params, 1)
    opt.load_state_dict(opt.state_dict())
    built = []
    build_buckets = type(opt._buckets).build
    monkeypatch.setattr(
        type(opt._buckets), "build", lambda self: [built.append(1), build_buckets(self)][0]
    )
    for _ in range(3):
        opt.eval()
        opt.train()
    assert len(built) == 1
