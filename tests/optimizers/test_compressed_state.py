"""Optimizers with master weights and compressed states: what they keep, save, load and refuse."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import same_bits
from eigenfilter.certificate.linearized import preconditioner
from eigenfilter.kernels.compression import GROUP, groups

SMALLEST: dict[str, Any] = {"master_weight_bits": 24, "state_bits": 8}

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda params, **kw: ef.SGD(params, lr=0.1, **kw),
    "heavy ball": lambda params, **kw: ef.SGD(params, lr=0.1, momentum=0.9, **kw),
    "nesterov": lambda params, **kw: ef.SGD(
        params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **kw
    ),
    "ahead": lambda params, **kw: ef.SGD(params, lr=0.1, momentum=0.9, extrapolation=0.2, **kw),
    "msam": lambda params, **kw: ef.MSAM(
        params, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, rho=0.2, **kw
    ),
    "usam": lambda params, **kw: ef.USAM(params, lr=0.1, momentum=0.9, rho=0.05, **kw),
    "sam": lambda params, **kw: ef.SAM(params, lr=0.1, momentum=0.9, rho=0.05, **kw),
    "two-step": lambda params, **kw: ef.TwoStepUSAM(params, lr=0.1, momentum=0.9, rho=0.05, **kw),
    "hessian": lambda params, **kw: ef.HessianUSAM(params, lr=0.1, momentum=0.9, rho=0.01, **kw),
    "adamw": lambda params, **kw: ef.AdamW(params, lr=0.02, **kw),
    "adamw ahead": lambda params, **kw: ef.AdamW(params, lr=0.02, extrapolation=0.01, **kw),
    "adamw usam": lambda params, **kw: ef.AdamW(params, lr=0.02, rho=0.05, **kw),
}
NAMES = list(OPTIMIZERS)


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 70), nn.Tanh(), nn.Linear(70, 3)).to(dtype)


def closure_for(model: nn.Module, opt: torch.optim.Optimizer, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 20, generator=generator)
    y = torch.randint(3, (32,), generator=generator)
    dtype = next(model.parameters()).dtype

    def closure() -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 5, start: int = 0) -> float:
    loss = torch.tensor(0.0)
    for i in range(start, start + steps):
        loss = opt.step(closure_for(model, opt, i))
    return float(loss.detach())


def same_params(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def same_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Whether two optimizers hold the same bits for parameters in the same places."""
    pairs = zip(a.state.values(), b.state.values(), strict=True)
    return all(
        s.keys() == t.keys()
        and all(same_bits(s[key], t[key]) for key in s if isinstance(s[key], Tensor))
        for s, t in pairs
    )


@pytest.mark.parametrize(
    "name", ["sgd", "heavy ball", "nesterov", "ahead", "msam", "adamw", "adamw ahead"]
)
def test_masters_of_32_bits_take_the_steps_of_float32(name: str) -> None:
    """With the same gradients, the master weights are float32's parameters, bit for bit."""
    narrow, wide = network(), network().float()
    few = OPTIMIZERS[name](narrow.parameters(), master_weight_bits=32, state_bits=32)
    full = OPTIMIZERS[name](wide.parameters())
    torch.manual_seed(1)
    for _ in range(20):
        for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
            p.grad = torch.randn(p.shape).to(p.dtype)
            q.grad = p.grad.float()
        few.step()
        full.step()
    for master, p, q in zip(
        few.master_weights(), narrow.parameters(), wide.parameters(), strict=True
    ):
        assert same_bits(master, q)
        assert (p.float() - q).abs().max() <= q.abs().max() * 2.0**-8


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_ascent_is_exact(name: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(model, opt)
    before, states = copy.deepcopy(model), copy.deepcopy(opt.compressed_state_dict()["state"])
    closure_for(model, opt)()
    if opt.ascend():
        assert not same_params(model, before)
        opt.restore()
    assert same_params(model, before)
    after = opt.compressed_state_dict()["state"]
    assert all(
        same_bits(states[i][key], after[i][key])
        for i in states
        for key in states[i]
        if key != "step"
    )


@pytest.mark.parametrize("saved_as", ["state_dict", "compressed_state_dict"])
@pytest.mark.parametrize(
    "options", [SMALLEST, {"state_bits": 8}, {"master_weight_bits": 32}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_training_resumes_bit_for_bit(name: str, options: dict[str, Any], saved_as: str) -> None:
    is_narrow = name != "msam" or "master_weight_bits" in options
    dtype = torch.bfloat16 if is_narrow else torch.float32
    model = network(dtype)
    opt = OPTIMIZERS[name](model.parameters(), **options)
    train(model, opt)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": getattr(opt, saved_as)()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(dtype)
    again = OPTIMIZERS[name](resumed.parameters(), **options)
    again.load_state_dict(saved["optimizer"])  # before the model's: the order does not matter
    resumed.load_state_dict(saved["model"])
    train(model, opt, start=5)
    train(resumed, again, start=5)
    assert same_params(model, resumed)
    assert same_states(opt, again)


def test_a_state_dict_holds_numbers_and_a_compressed_one_codes() -> None:
    model = network()
    opt = OPTIMIZERS["adamw"](model.parameters(), **SMALLEST)
    train(model, opt)
    full, small = opt.state_dict()["state"][0], opt.compressed_state_dict()["state"][0]
    assert {key: t.dtype for key, t in full.items()} == {
        "step": torch.float32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
        "weight_correction": torch.int8,
    }
    assert small["exp_avg"].dtype == torch.int8
    assert small["exp_avg_sq"].dtype == torch.uint8
    assert small["exp_avg_scale"].shape == (groups(small["exp_avg"]),)


@pytest.mark.parametrize("saved_as", ["state_dict", "compressed_state_dict"])
@pytest.mark.parametrize("after", [{}, {"state_bits": 16}, {"state_bits": 32}, SMALLEST], ids=str)
@pytest.mark.parametrize("before", [{}, {"state_bits": 16}, SMALLEST], ids=str)
@pytest.mark.parametrize("name", ["heavy ball", "adamw usam"])
def test_a_state_loads_into_other_formats(
    name: str, before: dict[str, Any], after: dict[str, Any], saved_as: str
) -> None:
    """What is loaded is what was saved, up to the rounding of the format that it is loaded into."""
    model = network(torch.float32 if "master_weight_bits" not in after else torch.bfloat16)
    opt = OPTIMIZERS[name](model.parameters(), **before)
    train(model, opt)
    other = copy.deepcopy(model)
    loaded = OPTIMIZERS[name](other.parameters(), **after)
    loaded.load_state_dict(copy.deepcopy(getattr(opt, saved_as)()))
    wanted, got = opt.state_dict()["state"], loaded.state_dict()["state"]
    for i, entry in wanted.items():
        for key in set(entry) & {"momentum_buffer", "exp_avg", "exp_avg_sq"}:
            largest = entry[key].float().abs().max()
            assert (got[i][key].float() - entry[key].float()).abs().max() <= 0.02 * largest
    loss = train(other, loaded, start=5)
    assert abs(loss - train(model, opt, start=5)) < 0.05


@pytest.mark.parametrize("name", ["heavy ball", "adamw"])
def test_torch_and_compressed_optimizers_exchange_states(name: str) -> None:
    model = network(torch.float32)
    ours = OPTIMIZERS[name](model.parameters(), state_bits=8)
    train(model, ours)
    theirs: torch.optim.Optimizer
    if name == "adamw":
        theirs = torch.optim.AdamW(model.parameters(), lr=0.02)
    else:
        theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs.load_state_dict(ours.state_dict())
    train(model, theirs, start=5)
    back = OPTIMIZERS[name](model.parameters(), state_bits=8)
    back.load_state_dict(theirs.state_dict())
    key = "exp_avg" if name == "adamw" else "momentum_buffer"
    got, wanted = back.state_dict()["state"], theirs.state_dict()["state"]
    for i, p in enumerate(model.parameters()):
        assert back.state[p][key].dtype == torch.int8
        error = (got[i][key] - wanted[i][key]).abs().max()
        assert 0 < error <= wanted[i][key].abs().max() / 127


def test_master_weights_go_out_and_in_at_full_precision() -> None:
    model, torch_model = network(), network(torch.float32)
    opt = OPTIMIZERS["heavy ball"](model.parameters(), master_weight_bits=32)
    opt.load_master_weights(list(torch_model.parameters()))
    for master, q in zip(opt.master_weights(), torch_model.parameters(), strict=True):
        assert same_bits(master, q.detach())
    for p, q in zip(model.parameters(), torch_model.parameters(), strict=True):
        assert ((p.float() - q).abs() <= 2.0**-8 * q.abs()).all()
    with pytest.raises(ValueError, match="pass a tensor for every parameter"):
        opt.load_master_weights([torch.ones(3)])


@pytest.mark.parametrize("name", ["ahead", "msam", "adamw ahead"])
def test_eval_and_train_move_the_master_weights(name: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(model, opt)
    before, at_y = opt.master_weights(), copy.deepcopy(model)
    with ef.optimizers.extrapolation.at_x(opt):
        assert not same_params(model, at_y)
    assert same_params(model, at_y)
    assert all(map(same_bits, opt.master_weights(), before))
    opt.eval()
    assert not same_params(model, at_y)
    opt.train()
    for now, then in zip(opt.master_weights(), before, strict=True):
        assert (now - then).abs().max() <= 4 * 2.0**-16 * then.abs().max()


@pytest.mark.parametrize("name", ["heavy ball", "usam", "two-step", "adamw", "adamw usam"])
def test_released_gradients_take_the_same_steps(name: str) -> None:
    models, opts = [network(), network()], []
    for model, release in zip(models, (False, True), strict=True):
        opt = OPTIMIZERS[name](model.parameters(), **SMALLEST, release_gradients=release)
        train(model, opt)
        opts.append(opt)
    assert same_params(*models)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_skipped_changes_nothing(name: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST, skip_nonfinite=True)
    train(model, opt)
    before = copy.deepcopy(model)
    states = copy.deepcopy(opt.compressed_state_dict()["state"])
    closure = closure_for(model, opt)

    def bad() -> Tensor:
        loss: Tensor = closure()
        next(model.parameters()).grad[0, 0] = torch.nan
        return loss

    opt.step(bad)
    assert opt.skipped == 1
    assert same_params(model, before)
    after = opt.compressed_state_dict()["state"]
    assert all(same_bits(states[i][key], after[i][key]) for i in states for key in states[i])


def test_the_preconditioner_reads_codes_as_numbers() -> None:
    diagonals = []
    for options in ({}, {"state_bits": 8}):
        model = network(torch.float32)
        opt = OPTIMIZERS["adamw"](model.parameters(), **options)
        torch.manual_seed(1)
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            opt.step()
        diagonals.append(preconditioner(opt, list(model.parameters())))
    torch.testing.assert_close(diagonals[1], diagonals[0], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("name", ["heavy ball", "msam", "adamw usam"])
def test_copies_and_pickles_go_on(name: str) -> None:
    model = network()
    opt = OPTIMIZERS[name](model.parameters(), **SMALLEST)
    train(model, opt)
    twin, twin_opt = copy.deepcopy((model, opt))
    train(model, opt, start=5)
    train(twin, twin_opt, start=5)
    assert same_params(model, twin)


def test_other_memory_formats() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(8, 16, 3).bfloat16()
    opt = OPTIMIZERS["adamw"](model.parameters(), **SMALLEST)
    inputs = torch.randn(2, 8, 6, 6).bfloat16()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(inputs).float().square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    wanted = opt.state_dict()["state"][0]["exp_avg"]
    model.to(memory_format=torch.channels_last)
    got = opt.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(got, wanted)
    opt.step(closure)
    assert opt.state[model.weight]["exp_avg"].stride() == model.weight.stride()


@pytest.mark.parametrize("state_bits", [8, 16])
@pytest.mark.parametrize("master_weight_bits", [None, 24])
def test_a_second_moment_follows(master_weight_bits: int | None, state_bits: int) -> None:
    """Where beta2 is so near 1 that to nearest it would stop: in bfloat16 at 0.25."""
    dtype = torch.float32 if master_weight_bits is None else torch.bfloat16
    p = nn.Parameter(torch.zeros(100, dtype=dtype))
    formats = {"master_weight_bits": master_weight_bits, "state_bits": state_bits}
    opt = ef.AdamW([p], lr=1e-3, betas=(0.9, 0.999), **formats)
    for _ in range(3000):
        p.grad = torch.ones_like(p)
        opt.step()
    v = opt.state_dict()["state"][0]["exp_avg_sq"]
    torch.testing.assert_close(v, torch.full_like(v, 1 - 0.999**3000), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda p, **kw: ef.AdamW(p, lr=1e-3, weight_decay=0.0, **kw), 4000),
        (lambda p, **kw: ef.SGD(p, lr=1e-3, momentum=0.99, **kw), 2000),
        (lambda p, **kw: ef.MSAM(p, lr=1e-3, momentum=0.99, rho=0.01, **kw), 2000),
    ],
)
def test_momenta_of_gradients_that_end_decay(make: Any, steps: int) -> None:
    """Although another element keeps the scale of their group."""
    ends = []
    for options in ({}, {"state_bits": 8}):
        p = nn.Parameter(torch.zeros(GROUP))
        opt = make([p], **options)
        for step in range(steps):
            p.grad = torch.zeros(GROUP)
            p.grad[0] = 1.0
            if step < 20:
                p.grad[1:] = 1.0
            opt.step()
        ends.append(p.detach()[1:])
    assert ((ends[1] - ends[0]).abs() <= 0.15 * ends[0].abs()).all()


@pytest.mark.parametrize("shape", [(9,), (1,)])
def test_a_state_of_another_shape_is_refused_before_anything_is_loaded(
    shape: tuple[int, ...],
) -> None:
    def trained(second: tuple[int, ...], lr: float) -> Any:
        params = [nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(second))]
        opt = ef.SGD(params, lr=lr, momentum=0.9, state_bits=8)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        return opt

    opt, other = trained((8,), 0.1), trained(shape, 0.2)
    before = copy.deepcopy(opt.compressed_state_dict())
    with pytest.raises(ValueError, match="holds the state of a tensor"):
        opt.load_state_dict(other.state_dict())
    after = opt.compressed_state_dict()
    assert after["param_groups"][0]["lr"] == 0.1
    for i, entry in before["state"].items():
        assert all(same_bits(after["state"][i][key], t) for key, t in entry.items())


def test_codes_without_their_scales_are_refused() -> None:
    model = network()
    opt = OPTIMIZERS["heavy ball"](model.parameters(), **SMALLEST)
    train(model, opt)
    saved = opt.compressed_state_dict()
    saved["state"] = {
        i: {key: t for key, t in entry.items() if key != "momentum_buffer_scale"}
        for i, entry in saved["state"].items()
    }
    for options in (SMALLEST, {}):
        other = OPTIMIZERS["heavy ball"](network().parameters(), **options)
        with pytest.raises(ValueError, match="holds codes of 8 bits"):
            other.load_state_dict(saved)


def test_a_model_that_becomes_float32_has_float32_weights() -> None:
    model = network()
    opt = OPTIMIZERS["heavy ball"](model.parameters(), **SMALLEST)
    train(model, opt)
    model.float()
    for master, p in zip(opt.master_weights(), model.parameters(), strict=True):
        assert same_bits(master, p.detach())
    train(model, opt)


def test_at_x_is_refused_in_mid_step_and_leaves_the_step_as_it_is() -> None:
    model = network()
    opt = ef.AdamW(model.parameters(), lr=0.02, extrapolation=0.01, rho=0.05, **SMALLEST)
    closure = closure_for(model, opt)
    closure()
    assert opt.ascend()
    with pytest.raises(RuntimeError, match="perturbed"), ef.optimizers.extrapolation.at_x(opt):
        pass
    closure()
    opt.step()


def state_bytes(opt: torch.optim.Optimizer) -> int:
    return sum(
        t.numel() * t.itemsize
        for entry in opt.state.values()
        for key, t in entry.items()
        if isinstance(t, Tensor) and key != "step"
    )


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("heavy ball", SMALLEST, 1 + 1 + 4 / GROUP),
        ("adamw", SMALLEST, 1 + 2 + 8 / GROUP),
        ("adamw", {"master_weight_bits": 32, "state_bits": 16}, 2 + 4),
        ("adamw", {"state_bits": 32}, 8),
    ],
)
def test_bytes_of_state(name: str, options: dict[str, Any], wanted: float) -> None:
    p = nn.Parameter(torch.randn(1024, 64).bfloat16())
    opt = OPTIMIZERS[name]([p], **options)
    p.grad = torch.randn_like(p)
    opt.step()
    assert state_bytes(opt) == wanted * p.numel()


def test_refusals() -> None:
    p = nn.Parameter(torch.ones(3))
    wrong: list[tuple[str, Any]] = [("master_weight_bits", 16), ("state_bits", 4)]
    wrong += [("state_bits", True), ("master_weight_bits", torch.tensor(24))]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"{name} must be one of None, "):
            ef.SGD([p], lr=0.1, **{name: value})
    with pytest.raises(TypeError, match="is float64, and state_bits=8"):
        ef.SGD([nn.Parameter(torch.ones(3).double())], lr=0.1, state_bits=8)


def test_wide_parameters_have_no_corrections() -> None:
    """A model may keep some layers in float32."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).bfloat16())]
    opt = ef.SGD(params, lr=0.1, momentum=0.9, **SMALLEST)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert "weight_correction" not in opt.state[params[0]]
    assert "weight_correction" in opt.state[params[1]]
