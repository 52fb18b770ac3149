"""`p.grad_dtype` wider than p: every optimizer takes such gradients as they are.

A gradient that is a power of two too large, with rates and radii as much smaller, gives the same
step to the bit: unless it is rounded to the parameter's dtype on its way, where it is infinite.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import METHODS, parameters, snapshot
from optimizers.wide_gradients import (
    SETTINGS,
    SHAPES,
    backends,
    fill_gradients,
    mixtures,
    pairs,
    run,
    widened,
)

# How each method's radius goes with the size of gradients: x + rho g, rho g / |g|, rho H g.
RADII = {
    "usam": -1,
    "sam": 0,
    "asam": 0,
    "sequential": -1,
    "anchored": -1,
    "difference": -2,
}


@backends
@pairs
@pytest.mark.parametrize("name", ["sgd", *RADII])
def test_steps_do_not_depend_on_the_size_of_gradients(
    name: str, dtype: torch.dtype, wide: torch.dtype, big: float, backend_name: str
) -> None:
    """Without momentum, whose buffer has the parameter's range."""
    results = []
    for factor in (1.0, big):
        params = widened(dtype, wide, mixed=False)
        settings: dict[str, Any] = {
            "lr": 0.11 / factor,
            "weight_decay": 0.03 * factor,
            "backend": backend_name,
        }
        if name == "sgd":
            opt: Any = ef.SGD(params, **settings)
        else:
            radius = METHODS[name].rho * factor ** RADII[name]
            opt = METHODS[name].make(params, rho=radius, **settings)
        run(opt, params, 3, factor)
        results.append(params)
    for small, large, start in zip(*results, parameters(dtype, SHAPES), strict=True):
        assert large.isfinite().all()
        assert large.numel() == 0 or not torch.equal(large, start)
        if name in ("sgd", "usam", "sequential", "anchored"):
            assert same_bits(small, large)
        else:  # 1e-12 is added to a norm
            torch.testing.assert_close(small, large)


@backends
@pairs
@pytest.mark.parametrize("name", ["", *RADII])
def test_adamw_does_not_depend_on_the_size_of_gradients(
    name: str, dtype: torch.dtype, wide: torch.dtype, big: float, backend_name: str
) -> None:
    """One step: its state has the parameter's range, but x is computed before it is rounded."""
    results = []
    for factor in (1.0, big):
        params = widened(dtype, wide, mixed=False)
        options = {} if not name else dict(METHODS[name].options)
        if name:
            options |= {"method": METHODS[name].name}
            options |= {"rho": METHODS[name].rho * factor ** RADII[name]}
        opt = ef.AdamW(params, lr=0.1, eps=1e-3 * factor, backend=backend_name, **options)
        run(opt, params, 1, factor)
        results.append(params)
    for small, large, start in zip(*results, parameters(dtype, SHAPES), strict=True):
        assert large.isfinite().all()
        assert large.numel() == 0 or not torch.equal(large, start)
        torch.testing.assert_close(small, large, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@mixtures
@pairs
@pytest.mark.parametrize("setting", SETTINGS)
def test_backends_agree(
    setting: str, dtype: torch.dtype, wide: torch.dtype, big: float, mixed: bool
) -> None:
    make, options = SETTINGS[setting]
    results = []
    for backend_name in ("native", "reference"):
        params = widened(dtype, wide, mixed)
        run(make(params, **options, backend=backend_name), params, 4)
        results.append(params)
    if setting in ("sam", "asam", "hessian"):  # each has an order of its own for sums
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert all(map(same_bits, *results))


@pairs
def test_each_parameter_steps_as_it_does_alone(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    """Parameters with wide gradients and with others share a call and nothing else."""
    for setting in ("heavy ball", "nesterov", "maximize", "adamw"):
        make, options = SETTINGS[setting]
        params = widened(dtype, wide, mixed=True)
        run(make(params, **options), params, 4)
        alone = widened(dtype, wide, mixed=True)
        for i, p in enumerate(alone):
            opt = make([p], **options)
            others = snapshot(alone)
            for _ in range(4):
                fill_gradients(alone)
                while opt.ascend():
                    fill_gradients(alone)
                opt.step()
            for k, (q, before) in enumerate(zip(alone, others, strict=True)):
                assert same_bits(q, before) == (k != i or q.numel() == 0)
        assert all(map(same_bits, params, alone))


@pairs
def test_gradients_that_change_their_dtype_between_steps(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    for setting in ("nesterov", "adamw", "hessian"):
        make, options = SETTINGS[setting]
        results = []
        for backend_name in ("native", "reference"):
            params = widened(dtype, wide, mixed=False)
            opt = make(params, **options, backend=backend_name)
            for step in range(4):
                for i, p in enumerate(params):
                    p.grad = None
                    p.grad_dtype = wide if (step + i) % 3 else dtype
                run(opt, params, 1)
            results.append(params)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pairs
def test_a_finite_difference_refuses_two_dtypes(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    params = widened(dtype, wide, mixed=False)
    before = snapshot(params)
    opt = ef.HessianUSAM(params, lr=0.1, rho=RHO)
    fill_gradients(params)
    opt.ascend()
    params[3].grad_dtype = dtype
    fill_gradients(params)
    with pytest.raises(RuntimeError, match="gradients of the same dtype on both sides"):
        opt.ascend()
    opt.restore()
    assert all(map(same_bits, params, before))


@pairs
@pytest.mark.parametrize("setting", ["nesterov", "hessian", "adamw", "heavy ball"])
def test_gradients_of_other_strides_keep_their_dtype(
    setting: str, dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    make, options = SETTINGS[setting]
    results = []
    for form in (lambda g: g, lambda g: torch.stack([g, g], -1)[..., 0], torch._neg_view):
        params = widened(dtype, wide, mixed=True)
        opt = make(params, **options)
        for _ in range(3):
            fill_gradients(params)
            reform(params, form)
            while opt.ascend():
                fill_gradients(params)
                reform(params, form)
            opt.step()
        results.append(params)
    assert all(map(same_bits, results[0], results[1]))


def reform(params: Sequence[Tensor], form: Callable[[Tensor], Tensor]) -> None:
    for p in params:
        p.grad = form(p.grad.neg() if form is torch._neg_view else p.grad)


@backends
@pytest.mark.parametrize(("dtype", "other"), [("float16", "bfloat16"), ("bfloat16", "float16")])
@pytest.mark.parametrize("setting", ["nesterov", "adamw", "sam"])
def test_what_neither_dtype_holds_is_read_as_float32(
    setting: str, dtype: str, other: str, backend_name: str
) -> None:
    make, options = SETTINGS[setting]
    own, foreign = getattr(torch, dtype), getattr(torch, other)
    results = []
    for grad_dtype in (foreign, torch.float32):
        params = parameters(own, SHAPES)
        for p in params:
            p.grad_dtype = grad_dtype
        opt = make(params, **options, backend=backend_name)
        for _ in range(3):
            for move in range(2):
                for p in params:
                    p.grad = (1.3 * p.detach().float() - 0.7).to(foreign).to(grad_dtype)
                opt.ascend() if move == 0 else opt.step()
        results.append(params)
    assert all(map(same_bits, *results))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_gradients_of_narrow_parameters_are_refused(
    dtype: torch.dtype, backend_name: str
) -> None:
    """The error comes before anything is written, whichever parameter has such a gradient."""
    for name, (make, options) in SETTINGS.items():
        params = parameters(dtype, SHAPES)
        params[3].grad_dtype = torch.float64
        opt = make(params, **options, backend=backend_name)
        before = snapshot(params)
        state = copy.deepcopy(opt.state_dict()["state"])
        fill_gradients(params)
        with pytest.raises(TypeError, match="set the parameter's grad_dtype to one of them"):
            opt.ascend() if opt.phase == "ascent" else opt.step()
        assert all(map(same_bits, params, before)), name
        assert not opt.perturbed
        if opt.phase == "ascent":
            assert opt.state_dict()["state"] == state


@pytest.mark.parametrize("setting", ["heavy ball", "adamw", "sgd released"])
def test_a_refused_first_step_leaves_no_state(setting: str) -> None:
    """The next step is the first one for dampening and for AdamW's bias correction."""
    make, options = SETTINGS[setting.replace("sgd released", "heavy ball")]
    options = options | ({"rho": 0.0} if "rho" in options else {})
    options = options | ({"release_gradients": True} if "released" in setting else {})
    results = []
    for after_refusal in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float16))
        opt = make([p], **options)

        def closure(p: Tensor = p, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = (p.float() ** 2).sum()
            loss.backward()
            return loss

        if after_refusal:
            p.grad_dtype = torch.float64
            with pytest.raises(TypeError, match="set the parameter's grad_dtype"):
                opt.step(closure)
            assert not opt.state_dict()["state"].get(0)
            p.grad = None
            p.grad_dtype = torch.float32
        else:
            p.grad_dtype = torch.float32
        for _ in range(3):
            opt.step(closure)
        results.append(p)
    assert same_bits(*results)
