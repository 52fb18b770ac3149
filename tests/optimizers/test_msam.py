"""MSAM against its formula in float64: y = x - rho m / |m|, and heavy ball with g(y)."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

import eigenfilter as ef
from cases import same_bits
from eigenfilter.optimizers import msam
from eigenfilter.optimizers.msam import MSAMUpdate
from eigenfilter.optimizers.updates import SGDUpdate
from optimizers.extrapolated import (
    TOLERANCES,
    distance,
    gradient,
    parameters,
    set_gradients,
    train,
)
from run_distributed import RunDistributed

LR, RHO = 0.02, 0.3
HEAVY: dict[str, Any] = {"lr": LR, "momentum": 0.9}


def norm_of(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


class Formula:
    """The method in float64, on x and m."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.x = [p.detach().double().clone() for p in params]
        self.m = [torch.zeros_like(x) for x in self.x]
        self.first = True

    def y(self, rho: float = RHO) -> list[Tensor]:
        e = rho / (norm_of(self.m) + 1e-12)
        return [x - e * m for x, m in zip(self.x, self.m, strict=True)]

    def step(
        self,
        rho: float = RHO,
        decay: float = 0.0,
        dampening: float = 0.0,
        without: tuple[int, ...] = (),
    ) -> None:
        keep = 1.0 if self.first else 1.0 - dampening
        self.first = False
        for i, y in enumerate(self.y(rho)):
            if i not in without:
                self.m[i] = 0.9 * self.m[i] + keep * (gradient(y) + decay * y)
                self.x[i] = self.x[i] - LR * self.m[i]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("decay", "dampening"), [(0.0, 0.0), (0.0, 0.3), (0.4, 0.0), (torch.tensor(0.5), 0.3)]
)
@pytest.mark.parametrize("maximize", [False, True])
def test_against_the_formula(
    dtype: torch.dtype, decay: float | Tensor, dampening: float, maximize: bool
) -> None:
    params = parameters(dtype)
    options = {"weight_decay": decay, "dampening": dampening, "maximize": maximize}
    opt, formula = ef.MSAM(params, **HEAVY, rho=RHO, **options), Formula(params)
    for _ in range(12):
        train(opt, params, 1)
        formula.step(decay=float(decay), dampening=dampening)
    assert distance(params, formula.y()) <= TOLERANCES[dtype]
    assert distance(params, formula.x) > 2 * TOLERANCES[dtype]  # the two points lie apart
    opt.eval()
    assert distance(params, formula.x) <= TOLERANCES[dtype]
    opt.train()
    assert distance(params, formula.y()) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_reference(dtype: torch.dtype) -> None:
    """The norms of two backends differ by a rounding."""
    results = []
    for backend in (None, "reference"):
        params = parameters(dtype)
        opt = ef.MSAM(params, **HEAVY, rho=RHO, weight_decay=0.2, backend=backend)
        train(opt, params, 5)
        opt.eval()
        opt.train()
        train(opt, params, 5)
        results.append(params)
    assert distance(results[0], [p.detach().double() for p in results[1]]) <= TOLERANCES[dtype]


def test_rho_0_is_heavy_ball_to_the_bit() -> None:
    results = []
    options = HEAVY | {"weight_decay": 0.2, "dampening": 0.3}
    for make in (lambda p: ef.SGD(p, **options), lambda p: ef.MSAM(p, **options, rho=0.0)):
        params = parameters(torch.float32)
        train(make(params), params, 6)
        results.append(params)
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("lr", [LR, 1e-5], ids=["ahead", "over x"])
def test_a_decay_is_a_penalty_of_the_loss(lr: float) -> None:
    """Also in steps after eval(), whose gradient is taken at x, and with a change of rho."""
    results = []
    for decay, penalty in ((0.3, 0.0), (0.0, 0.3)):
        params = parameters()
        options = HEAVY | {"lr": lr, "dampening": 0.2}
        opt = ef.MSAM(params, **options, rho=RHO, weight_decay=decay)
        for step in range(12):
            if step == 4:
                opt.eval()
            opt.param_groups[0]["rho"] = 0.5 * RHO if step == 7 else RHO
            for p in params:
                p.grad = gradient(p.detach()) + penalty * p.detach()
            opt.step()
        results.append(params)
    assert distance(results[0], [p.detach() for p in results[1]]) < 1e-14


def test_groups_share_the_norm_and_have_a_rho_of_their_own() -> None:
    params = parameters()
    decays = (0.3, 0.0, 0.7)
    groups = [{"params": params[:1]}, {"params": params[1:2], "rho": 0.1}]
    groups = [g | {"weight_decay": w} for g, w in zip(groups, decays, strict=False)]
    groups.append({"params": params[2:], "rho": 0.0, "weight_decay": decays[2]})
    opt = ef.MSAM(groups, **HEAVY, rho=RHO)
    formula = Formula(params)
    for _ in range(6):
        train(opt, params, 1)
        norm = norm_of(formula.m[:2])
        radii = (RHO, 0.1, 0.0)
        factors = [rho / norm if norm > 0 else 0.0 for rho in radii]
        y = [x - e * m for x, m, e in zip(formula.x, formula.m, factors, strict=True)]
        for i in range(3):
            formula.m[i] = 0.9 * formula.m[i] + gradient(y[i]) + decays[i] * y[i]
            formula.x[i] = formula.x[i] - LR * formula.m[i]
    opt.eval()
    assert distance(params, formula.x) < 1e-13


def test_a_jump_of_the_gradient_loses_nothing() -> None:
    """Such a step goes over x, and no large displacement along the new m is ever stored."""
    params = parameters(torch.float32)
    opt = ef.MSAM(params, **HEAVY, rho=RHO)
    formula = Formula(params)
    for p in params:
        p.grad = torch.full_like(p, 1e-20)
    opt.step()
    for i in range(3):
        formula.m[i] = torch.full_like(formula.m[i], 1e-20)
        formula.x[i] = formula.x[i] - LR * formula.m[i]
    assert distance(params, formula.y()) < 1e-6
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    for i in range(3):
        formula.m[i] = 0.9 * formula.m[i] + 1.0
        formula.x[i] = formula.x[i] - LR * formula.m[i]
    opt.eval()
    assert distance(params, formula.x) < 1e-6


def test_zero_gradients_change_nothing() -> None:
    params = parameters(torch.float32)
    before = [p.detach().clone() for p in params]
    opt = ef.MSAM(params, **HEAVY, rho=RHO)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
    assert all(map(same_bits, before, params))


def test_parameters_that_have_no_gradient_at_times() -> None:
    params = parameters()
    opt, formula = ef.MSAM(params, **HEAVY, rho=RHO), Formula(params)
    for step in range(8):
        set_gradients(params)
        params[step % 3].grad = None
        opt.step()
        formula.step(without=(step % 3,))
        assert distance(params, formula.y()) < 1e-13
    opt.eval()
    assert distance(params, formula.x) < 1e-13


def test_a_change_of_rho_takes_effect_with_the_next_gradient() -> None:
    params = parameters()
    opt, formula = ef.MSAM(params, **HEAVY, rho=RHO), Formula(params)
    train(opt, params, 3)
    for _ in range(3):
        formula.step()
    for rho in (0.1, 0.0, RHO):
        opt.param_groups[0]["rho"] = rho
        opt.train()  # takes it into effect at once
        assert distance(params, formula.y(rho)) < 1e-13
        train(opt, params, 2)
        formula.step(rho)
        formula.step(rho)
    opt.param_groups[0]["rho"] = 0.1
    train(opt, params, 1)  # the gradient is still that at the old y
    formula.step()
    assert distance(params, formula.y(0.1)) < 1e-13


def test_a_schedule_of_rho() -> None:
    params = parameters()
    opt, formula = ef.MSAM(params, **HEAVY, rho=RHO), Formula(params)
    scheduler = ef.schedulers.RhoScheduler(opt, "late", total_steps=6, start=0.5)
    rho = opt.param_groups[0]["rho"]
    for _ in range(6):
        train(opt, params, 1)
        formula.step(rho)
        scheduler.step()
        rho = opt.param_groups[0]["rho"]
        opt.train()
    opt.eval()
    assert distance(params, formula.x) < 1e-13
    assert rho == RHO


@pytest.mark.parametrize("lr", [LR, 1e-5], ids=["ahead", "over x"])
@pytest.mark.parametrize("changes", [False, True])
def test_skipped_steps_change_no_bit(changes: bool, lr: float) -> None:
    params = parameters(torch.float32)
    opt = ef.MSAM(params, lr=lr, momentum=0.9, rho=RHO, skip_nonfinite=True)
    train(opt, params, 3)
    if changes:
        opt.param_groups[0]["rho"] = 0.1
    before = [p.detach().clone() for p in params]
    set_gradients(params)
    assert params[0].grad is not None
    params[0].grad[0, 0] = math.inf
    opt.step()
    assert opt.skipped == 1
    assert all(map(same_bits, before, params))
    assert opt.param_groups[0]["extrapolated_rho"] == RHO
    opt.eval()
    state = opt.state_dict()["state"]
    momenta = [state[i]["momentum_buffer"].double() for i in range(3)]
    e = RHO / norm_of(momenta)
    x = [b.double() + e * m for b, m in zip(before, momenta, strict=True)]
    assert distance(params, x) < 1e-6


def test_a_checkpoint_of_torchs_holds_x() -> None:
    params = parameters()
    theirs = torch.optim.SGD(params, **HEAVY)
    train(theirs, params, 3)
    formula = Formula(params)
    formula.m = [theirs.state[p]["momentum_buffer"].clone() for p in params]
    opt = ef.MSAM(params, **HEAVY, rho=RHO)
    opt.load_state_dict(theirs.state_dict())
    opt.train()
    train(opt, params, 4)
    for _ in range(4):
        formula.step()
    opt.eval()
    assert distance(params, formula.x) < 1e-13


@pytest.mark.parametrize("where", ["norm", "first perturbation", "second perturbation"])
def test_an_exception_after_the_update_leaves_every_parameter_at_a_y(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt, formula = ef.MSAM(groups, **HEAVY, rho=RHO), Formula(params)
    train(opt, params, 3)
    for _ in range(3):
        formula.step()
    e = RHO / norm_of(formula.m)
    calls, perturb = [], MSAMUpdate._move

    def norms(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def interrupted(self: MSAMUpdate, bucket: Any, *alpha: Any) -> None:
        calls.append(bucket)
        if len(calls) == {"first perturbation": 3, "second perturbation": 4}[where]:
            raise KeyboardInterrupt
        perturb(self, bucket, *alpha)

    with monkeypatch.context() as patch:
        if where == "norm":
            patch.setattr(msam, "total_norms", norms)
        else:
            patch.setattr(MSAMUpdate, "_move", interrupted)
        set_gradients(params)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    formula.step()
    y = [x - e * m for x, m in zip(formula.x, formula.m, strict=True)]
    assert distance(params, y) < 1e-13
    # A skipped step keeps the norm that they have.
    set_gradients(params)
    opt.skip_nonfinite = True
    assert params[0].grad is not None
    params[0].grad[0, 0] = math.inf
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(map(same_bits, before, params))
    opt.eval()
    assert distance(params, formula.x) < 1e-13
    opt.train()
    assert distance(params, formula.y()) < 1e-13


def test_the_norm_stays_where_a_graph_has_read_it() -> None:
    params = parameters()
    opt = ef.MSAM(params, **HEAVY, rho=RHO)
    train(opt, params, 1)
    norm = opt.param_groups[0]["momentum_norm"]
    train(opt, params, 2)
    assert opt.param_groups[0]["momentum_norm"] is norm
    momenta = [opt.state[p]["momentum_buffer"] for p in params]
    assert float(norm) == pytest.approx(norm_of(momenta), rel=1e-14)


def test_states_of_other_methods_ahead_of_x_are_refused() -> None:
    makes = {
        "SGD": lambda p: ef.SGD(p, **HEAVY, extrapolation=0.1),
        "MSAM": lambda p: ef.MSAM(p, **HEAVY, rho=RHO),
        "USAM": lambda p: ef.USAM(p, **HEAVY, rho=RHO),
    }
    for source, target in (("SGD", "MSAM"), ("MSAM", "SGD"), ("MSAM", "USAM")):
        params, others = parameters(), parameters()
        opt, other = makes[source](params), makes[target](others)
        train(opt, params, 3)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="was saved ahead of x by another method"):
            other.load_state_dict(opt.state_dict())
        assert other.state_dict() == before
        opt.eval()
        other.load_state_dict(opt.state_dict())


def test_an_interrupt_between_buckets_leaves_every_parameter_at_a_y(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = parameters()
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    opt, formula = ef.MSAM(groups, **HEAVY, rho=RHO), Formula(params)
    train(opt, params, 3)
    for _ in range(3):
        formula.step()
    e = RHO / norm_of(formula.m)
    calls, step = [], SGDUpdate.step

    def interrupted(self: SGDUpdate, bucket_slice: Any) -> None:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(bucket_slice)
        step(self, bucket_slice)

    monkeypatch.setattr(SGDUpdate, "step", interrupted)
    set_gradients(params)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    formula.step(without=(1, 2))
    y = [x - e * m for x, m in zip(formula.x, formula.m, strict=True)]
    assert distance(params, y) < 1e-13
    opt.eval()
    assert distance(params, formula.x) < 1e-13


def test_a_scaler_skips_its_steps() -> None:
    params = parameters(torch.float32)
    opt, formula = ef.MSAM(params, **HEAVY, rho=RHO), Formula(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for step in range(6):
        scaler.scale(torch.ones(()))  # which makes the scale
        set_gradients(params, float(scaler.get_scale()))
        if step == 2:
            assert params[1].grad is not None
            params[1].grad[0] = math.nan
        else:
            formula.step()
        scaler.step(opt)
        scaler.update()
    opt.eval()
    assert opt.skipped == 1
    assert distance(params, formula.x) < 2e-5


def rounded_away(
    dtype: torch.dtype, lr: float, bits: int | None = None, cls: Any = ef.MSAM
) -> float:
    """How far x is from x_0 - lr (the sum of m), in units of that sum, after 200 steps."""
    gen = torch.Generator().manual_seed(5)
    x = nn.Parameter((1 + torch.rand(1000, generator=gen)).to(dtype))
    before = x.detach().double()
    formats = {"master_weight_bits": bits, "state_bits": None if bits is None else 32}
    ahead = {"rho": RHO} if cls is ef.MSAM else {"extrapolation": RHO / 324}  # |m| at last
    opt = cls([x], lr=lr, momentum=0.9, **ahead, **formats)
    way = torch.zeros_like(before)
    for _ in range(200):
        x.grad = (1 + torch.randn(1000, generator=gen)).to(dtype)
        opt.step()
        m = opt.state[x]["momentum_buffer"].double()
        way += lr * m
    e = RHO / m.norm() if cls is ef.MSAM else ahead["extrapolation"]
    y = opt.master_weights()[0].double()
    return float((y + e * m - before + way).norm() / way.norm())


@pytest.mark.parametrize(
    ("dtype", "lr"), [(torch.bfloat16, 3e-4), (torch.float16, 1e-4)], ids=["bfloat16", "float16"]
)
def test_sixteen_bits(dtype: torch.dtype, lr: float) -> None:
    """Alone they lose about as much as SGD's, for one rounding a step more; masters do not."""
    in_float32 = rounded_away(torch.float32, lr)
    assert in_float32 < 1e-4
    assert rounded_away(dtype, lr, 32) < 2 * in_float32
    alone = rounded_away(dtype, lr)
    assert alone > 30 * rounded_away(dtype, lr, 24)
    assert alone < 1.5 * rounded_away(dtype, lr, cls=ef.SGD)


@pytest.mark.parametrize("state_bits", [None, 8, 16, 32])
@pytest.mark.parametrize("master_weight_bits", [24, 32])
@pytest.mark.parametrize("lr", [LR, 1e-5], ids=["ahead", "over x"])
def test_compressed_states_keep_their_own_x(
    master_weight_bits: int, state_bits: int | None, lr: float
) -> None:
    """x = y + rho m / |m|, with y in full and m as it is stored, moves by lr times the new m."""
    params = parameters(torch.bfloat16)
    formats = {"master_weight_bits": master_weight_bits, "state_bits": state_bits}
    opt = ef.MSAM(params, lr=lr, momentum=0.9, rho=RHO, **formats)
    wanted = [p.detach().double() for p in params]
    m = [torch.zeros_like(x) for x in wanted]
    for step in range(8):
        set_gradients(params)
        if step > 0:
            params[step % 3].grad = None
        for p, before, x in zip(params, m, wanted, strict=True):
            if p.grad is not None:
                x -= lr * (0.9 * before + p.grad.double())
        opt.step()
        state = opt.state_dict()["state"]
        m = [state[i]["momentum_buffer"].double() for i in range(3)]
    e = RHO / norm_of(m)
    y = [w.double() for w in opt.master_weights()]
    exact = [b + e * c for b, c in zip(y, m, strict=True)]
    assert distance(params, y) > 2e-4  # parameters are rounded, and masters are not
    opt.eval()
    bound = 1e-4 if master_weight_bits == 24 else 1e-6
    for got in (exact, [w.double() for w in opt.master_weights()]):
        errors = [(a - b).abs().max().item() for a, b in zip(got, wanted, strict=True)]
        assert max(errors) < bound


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be at least 0"),
        ({"rho": math.nan}, ValueError, "rho must be at least 0 and finite"),
        ({"rho": torch.tensor(0.1)}, TypeError, "rho must be a number, and is tensor"),
        ({"rho": True}, TypeError, "rho must be a number, and is True"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"momentum": 0.0}, ValueError, "set momentum > 0, no nesterov"),
        ({"release_gradients": True}, ValueError, "by the norm of all momentum buffers"),
        ({"nesterov": True}, TypeError, "unexpected keyword argument 'nesterov'"),
        ({"extrapolation": 0.1}, TypeError, "unexpected keyword argument 'extrapolation'"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ef.MSAM(parameters(), lr=LR, **options)


def test_its_filter_is_that_of_the_present_norm() -> None:
    params = parameters()
    opt = ef.MSAM(params, **HEAVY, rho=RHO)
    with pytest.raises(TypeError, match="no filter while its momentum is 0"):
        ef.filters.of(opt)
    train(opt, params, 4)
    norm = norm_of([opt.state[p]["momentum_buffer"] for p in params])
    for mode in (opt.train, opt.eval):
        mode()
        [flt] = ef.filters.of(opt)
        e = RHO / norm
        assert flt.max_eigenvalue() == pytest.approx(2 * 1.9 / (LR + 2 * e), rel=1e-12)
    opt.param_groups[0]["rho"] = 0.0
    assert ef.filters.of(opt) == [ef.filters.HeavyBall(**HEAVY)]


@pytest.mark.parametrize("decay", [0.0, 20.0])
def test_it_settles_where_its_edge_is_the_sharpness(decay: float) -> None:
    """On a quadratic it jumps from side to side, with the |m| whose edge is the sharpness."""
    sharpness = 0.6 * ef.filters.HeavyBall(**HEAVY).max_eigenvalue()
    options = HEAVY | {"weight_decay": decay}
    x = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    opt = ef.MSAM([x], **options, rho=RHO)
    for _ in range(3000):
        x.grad = sharpness * x.detach()
        opt.step()
    [flt] = ef.filters.of(opt)
    assert flt.max_eigenvalue() == pytest.approx(sharpness, rel=1e-9)
    y = x.detach().clone()
    opt.eval()
    m = opt.state[x]["momentum_buffer"]
    # |g(y) + wd y| / (1 + momentum)
    assert np.isclose(abs(float(m)), float(((sharpness + decay) * y).abs()) / 1.9)
    rho = ef.filters.design("msam", sharpness, **options, momentum_norm=abs(float(m)))
    assert rho == pytest.approx(RHO, rel=1e-9)


@pytest.mark.parametrize(("decay", "maximize"), [(0.0, False), (0.5, True), (60.0, False)])
def test_runs_astride_the_edges_at_a_fixed_norm(decay: float, maximize: bool) -> None:
    """A parameter with a large constant momentum fixes |m|; the others shrink or grow beside it."""
    norm, sign = 2.0, -1.0 if maximize else 1.0
    options = HEAVY | {"weight_decay": decay, "dampening": 0.3, "maximize": maximize}
    flt = ef.filters.MSAM(**options, rho=RHO, momentum_norm=norm)
    [(low, high)] = flt.intervals()
    step = 0.01 * (high - low)
    lam = np.array([low + step, high - step, low - step, high + step])
    x = nn.Parameter(torch.full((4,), 1e-20, dtype=torch.float64))
    large = nn.Parameter(torch.zeros((), dtype=torch.float64))
    opt = ef.MSAM([{"params": [x]}, {"params": [large], "weight_decay": 0}], **options, rho=RHO)
    large.grad, sizes = torch.full_like(large, sign * norm), []
    for _ in range(3):
        for _ in range(150):
            x.grad = torch.from_numpy(lam) * x.detach()
            opt.step()
            large.grad.fill_(sign * norm * (1 - 0.9) / (1 - 0.3))  # keeps its m
        sizes.append(x.detach().abs().numpy().copy())
    growth = (sizes[2] / sizes[1]) ** (1 / 150)
    assert growth == pytest.approx(flt.spectral_radius(lam), rel=1e-9)
    assert (growth[:2] < 1).all()
    assert (growth[2:] > 1).all()
    assert float(ef.filters.of(opt)[0].momentum_norm) == pytest.approx(norm)


def train_on_rank(rank: int, shards: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    if shards:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    opt = ef.MSAM(model.parameters(), **HEAVY, rho=RHO)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=gen, dtype=torch.float64)
    for _ in range(5):
        opt.zero_grad()
        model(x[rank::2]).square().mean().backward()
        opt.step()
    opt.eval()
    full = (p.full_tensor() if shards else p for p in model.parameters())
    return [p.detach() for p in full]


@pytest.mark.distributed
@pytest.mark.parametrize("shards", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes(run_distributed: RunDistributed, shards: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    opt = ef.MSAM(model.parameters(), **HEAVY, rho=RHO)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(5):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    opt.eval()
    for weights in run_distributed(train_on_rank, 2, shards):
        torch.testing.assert_close(weights, list(model.parameters()), rtol=0, atol=1e-13)


def zero_redundancy(rank: int) -> str:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    with pytest.raises(RuntimeError, match="MSAM inside ZeroRedundancyOptimizer has") as error:
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ef.MSAM, rho=RHO)
    return str(error.value)


@pytest.mark.distributed
def test_a_rank_of_zero_redundancy_is_refused(run_distributed: RunDistributed) -> None:
    for message in run_distributed(zero_redundancy, 2):
        assert "use SGD(extrapolation=...)" in message
