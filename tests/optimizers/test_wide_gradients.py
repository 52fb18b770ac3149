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
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import METHODS, backward, parameters, snapshot

# A parameter's dtype, that of its gradients, and a factor that takes them beyond the former.
PAIRS = {
    "float16-float32": (torch.float16, torch.float32, 2.0**18),
    "bfloat16-float32": (torch.bfloat16, torch.float32, 2.0**20),
    "float32-float64": (torch.float32, torch.float64, 2.0**140),
}
pairs = pytest.mark.parametrize(("dtype", "wide", "big"), PAIRS.values(), ids=PAIRS)
mixtures = pytest.mark.parametrize("mixed", [False, True], ids=["wide", "mixed"])
backends = pytest.mark.parametrize("backend_name", ["native", "reference"])

SHAPES = ((), (3,), (0,), (4, 5), (2, 3, 2, 2), (70,))


def widened(dtype: torch.dtype, wide: torch.dtype, mixed: bool) -> list[nn.Parameter]:
    """Parameters with wide gradients, or every second one of them with their own."""
    params = parameters(dtype, SHAPES)
    for i, p in enumerate(params):
        if not (mixed and i % 2):
            p.grad_dtype = wide
    return params


def fill(params: Sequence[Tensor], big: float = 1.0) -> float:
    """Set the gradients of a convex f at the parameters, times `big` where they are wide.

    Returns f.
    """
    total = 0.0
    with torch.no_grad():
        for i, p in enumerate(params):
            z = p.double()
            slope = 1 + i / 8 + 2.0**-11  # a product with it is no number of float16 or bfloat16
            total += float((slope * z * z / 2 - 0.7 * z).sum())
            g = slope * z - 0.7
            grad_dtype = p.grad_dtype
            p.grad = (g * (big if grad_dtype != p.dtype else 1.0)).to(grad_dtype)
    return total


def run(opt: Any, params: Sequence[Tensor], steps: int, big: float = 1.0) -> None:
    for _ in range(steps):
        fill(params, big)
        while opt.ascend():
            assert all(p.grad is None for p in params)
            fill(params, big)
        opt.step()
        opt.zero_grad()


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


SETTINGS = {
    "heavy ball": (ef.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.03}),
    "nesterov": (ef.USAM, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "rho": RHO}),
    "maximize": (ef.TwoStepUSAM, {"lr": 0.1, "momentum": 0.8, "maximize": True, "rho": RHO}),
    "sam": (ef.SAM, {"lr": 0.1, "momentum": 0.8, "rho": 0.5}),
    "asam": (ef.SAM, {"lr": 0.1, "momentum": 0.8, "rho": 0.5, "adaptive": True}),
    "hessian": (ef.HessianUSAM, {"lr": 0.1, "momentum": 0.8, "rho": RHO}),
    "adamw": (ef.AdamW, {"lr": 0.1, "eps": 1e-3, "method": "usam", "rho": RHO}),
    "stochastic": (ef.USAM, {"lr": 0.1, "rho": RHO, "stochastic_rounding": True}),
}


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
    """Wide gradients or not: they share a call and nothing else."""
    for setting in ("heavy ball", "nesterov", "maximize", "adamw"):
        make, options = SETTINGS[setting]
        params = widened(dtype, wide, mixed=True)
        run(make(params, **options), params, 4)
        alone = widened(dtype, wide, mixed=True)
        for i, p in enumerate(alone):
            opt = make([p], **options)
            others = snapshot(alone)
            for _ in range(4):
                fill(alone)
                while opt.ascend():
                    fill(alone)
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
    fill(params)
    opt.ascend()
    params[3].grad_dtype = dtype
    fill(params)
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
            fill(params)
            reform(params, form)
            while opt.ascend():
                fill(params)
                reform(params, form)
            opt.step()
        results.append(params)
    assert all(map(same_bits, results[0], results[1]))


def reform(params: Sequence[Tensor], form: Callable[[Tensor], Tensor]) -> None:
    for p in params:
        p.grad = form(p.grad.neg() if form is torch._neg_view else p.grad)


@backends
@pairs
def test_only_steps_that_are_not_finite_are_skipped(
    dtype: torch.dtype, wide: torch.dtype, big: float, backend_name: str
) -> None:
    params = widened(dtype, wide, mixed=True)
    opt = ef.USAM(params, lr=0.1 / big, rho=RHO / big, skip_nonfinite=True, backend=backend_name)
    run(opt, params, 2, big)
    assert opt.skipped == 0
    before = snapshot(params)
    for phase in ("ascent", "descent"):
        fill(params, big)
        if phase == "descent":
            params[3].grad[0, 0] = torch.inf
        opt.ascend() if phase == "ascent" else opt.step()
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))


@mixtures
@pairs
def test_a_grad_scaler_finds_what_is_not_finite_and_nothing_else(
    dtype: torch.dtype, wide: torch.dtype, big: float, mixed: bool
) -> None:
    """Its scale takes the gradients beyond the parameter's range, but not beyond theirs."""
    results = []
    for scale in (1.0, 2.0**18):
        params = widened(dtype, wide, mixed=False)
        if mixed:
            params[1].grad_dtype = params[1].dtype
        opt = ef.USAM(params, lr=0.1, momentum=0.8, rho=RHO)
        scaler = GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            for phase in ("ascent", "descent"):
                fill(params, scaler.scale(torch.ones(())).item())
                if mixed:  # within its range: of a gradient that underflows without a scale
                    params[1].grad = torch.zeros_like(params[1])
                if phase == "ascent":
                    opt.ascend(grad_scaler=scaler)
                else:
                    scaler.step(opt)
                    scaler.update()
        assert opt.skipped == 0
        assert scaler.get_scale() == scale
        results.append(params)
    assert all(map(same_bits, *results))


@pairs
def test_clipping_takes_the_norm_of_wide_gradients(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    params = widened(dtype, wide, mixed=False)
    opt = ef.SGD(params, lr=0.5)
    before = snapshot(params)
    fill(params, big)
    grads = [p.grad.double().clone() for p in params]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    result = opt.clip_grad_norm_(1.0)
    torch.testing.assert_close(result.double(), norm, rtol=1e-6, atol=0)
    opt.step()
    for p, b, g in zip(params, before, grads, strict=True):
        expected = b.double() - 0.5 * g / norm
        torch.testing.assert_close(p.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@backends
@pairs
def test_gradients_are_released_in_their_dtype(
    dtype: torch.dtype, wide: torch.dtype, big: float, backend_name: str
) -> None:
    results = []
    for release in (False, True):
        params = widened(dtype, wide, mixed=True)
        opt = ef.USAM(
            params, lr=0.1, momentum=0.8, rho=RHO, release_gradients=release, backend=backend_name
        )

        def closure(params: Sequence[Tensor] = params, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = torch.stack([(p.double() ** 2 * 1.3 - p.double()).sum() for p in params]).sum()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        results.append(params)
    assert all(map(same_bits, *results))


@pairs
def test_autograd_makes_wide_gradients_that_are_taken(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    """The gradients that backward leaves in `grad_dtype`, with an exact product too."""
    for options in ({"hvp": "autograd"}, {"hvp": "finite_difference"}):
        params = widened(dtype, wide, mixed=True)
        before = snapshot(params)
        opt = ef.HessianUSAM(params, lr=0.1, rho=0.2, **options)

        def closure(params: Sequence[Tensor] = params, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            flat = torch.cat([p.to(wide).flatten() for p in params])
            loss = (flat**2).sum()
            backward(opt, loss)
            return loss

        opt.step(closure)
        for p, x in zip(params, before, strict=True):
            x = x.double()
            y = x + 0.2 * 2 * (2 * x)  # rho H g
            tolerance = 0.05 if options["hvp"] == "finite_difference" else 0.0
            torch.testing.assert_close(
                p.double(),
                x - 0.1 * 2 * y,
                rtol=4 * torch.finfo(dtype).eps + tolerance,
                atol=4 * torch.finfo(dtype).eps,
            )


@pairs
def test_a_wrapped_optimizer_ascends_along_wide_gradients(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    results = []
    for factor in (1.0, big):
        params = widened(dtype, wide, mixed=False)
        base = torch.optim.SGD(params, lr=0.1 / factor, foreach=False)
        opt = ef.SharpnessAware(base, "usam", RHO / factor, skip_nonfinite=True)
        run(opt, params, 3, factor)
        assert opt.skipped == 0
        results.append(params)
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large)
        assert large.isfinite().all()


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
    """Before anything is written, whichever parameter has one."""
    for name, (make, options) in SETTINGS.items():
        params = parameters(dtype, SHAPES)
        params[3].grad_dtype = torch.float64
        opt = make(params, **options, backend=backend_name)
        before = snapshot(params)
        state = copy.deepcopy(opt.state_dict()["state"])
        fill(params)
        with pytest.raises(TypeError, match="set the parameter's grad_dtype to one of them"):
            opt.ascend() if opt.phase == "ascent" else opt.step()
        assert all(map(same_bits, params, before)), name
        assert not opt.perturbed
        if opt.phase == "ascent":
            assert opt.state_dict()["state"] == state


@pytest.mark.parametrize("setting", ["heavy ball", "adamw", "sgd released"])
def test_a_refused_first_step_leaves_no_state(setting: str) -> None:
    """The next one is then the first, which dampening, and AdamW's bias correction, tell."""
    make, options = SETTINGS[setting.replace("sgd released", "heavy ball")]
    options = options | ({"rho": 0.0} if "rho" in options else {})
    options = options | ({"release_gradients": True} if "released" in setting else {})
    results = []
    for refused in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.float16))
        opt = make([p], **options)

        def closure(p: Tensor = p, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = (p.float() ** 2).sum()
            loss.backward()
            return loss

        if refused:
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


@pairs
def test_state_keeps_the_parameters_dtype_and_resumes(
    dtype: torch.dtype, wide: torch.dtype, big: float
) -> None:
    for setting in ("nesterov", "adamw", "hessian"):
        make, options = SETTINGS[setting]
        params = widened(dtype, wide, mixed=True)
        opt = make(params, **options)
        run(opt, params, 2)
        for p in params:
            for key, value in opt.state[p].items():
                assert value.dtype == (torch.float32 if key == "step" else dtype)
        twins = widened(dtype, wide, mixed=True)
        with torch.no_grad():
            for q, p in zip(twins, params, strict=True):
                q.copy_(p)
        other = make(twins, **options)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        for o, some in ((opt, params), (other, twins)):
            run(o, some, 2)
        assert all(map(same_bits, params, twins))


@pytest.mark.distributed
@pairs
def test_sharded_parameters(dtype: torch.dtype, wide: torch.dtype, big: float) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for make, power in ((ef.USAM, -1), (ef.SAM, 0), (ef.HessianUSAM, -2)):
            results = []
            for sharded in (False, True):
                params = []
                for i, t in enumerate((torch.linspace(-1, 2, 30).view(6, 5), torch.ones(5))):
                    x = t.to(dtype)
                    p = nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]) if sharded else x)
                    p.grad_dtype = wide if i == 0 else None
                    params.append(p)
                opt = make(params, lr=0.1 / big, rho=RHO * big**power)
                for _ in range(2):
                    for _ in range(3 if make is ef.HessianUSAM else 2):
                        for p in params:
                            p.grad = (p.detach().to(wide) * 1.3 - 0.7) * big
                        opt.ascend() or opt.step()
                results.append([p.to_local() if sharded else p for p in params])
            assert all(map(same_bits, *results))
            assert all(p.isfinite().all() for p in results[1])
    finally:
        dist.destroy_process_group()
