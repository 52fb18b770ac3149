"""One table of optimizers, one suite: what every one of them does, however it ascends and descends.

Rows are float64 unless a test says otherwise. "torch Muon" takes matrices only: its problem has no
others, and tests about tensors of other kinds skip it.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

import eigenfilter as ef
from cases import DTYPES, same_bits
from eigenfilter import _perturbation
from optimizers.problems import (
    METHODS,
    SHAPES,
    backward,
    closure_of,
    distance,
    loss_of,
    parameters,
    snapshot,
)

MATRICES = ((4, 5), (3, 2), (1, 7), (6, 4))

SGD = {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.03}
ADAMW = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.03}
MUON = {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.03}

Make = Callable[..., Any]
"""Makes an optimizer of parameters or groups, and of changes to its hyperparameters."""


@dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        make: of the optimizer.
        still: of the one that it is at rho = 0, bit for bit.
        torchs: of the optimizer of torch that understands its state.
        calls: gradients a step.
        rho: its radius.
        difference: whether it takes finite differences.
        normalized: whether it takes a norm, whose order of summation follows the layout.
        shapes: of its parameters.
    """

    make: Make
    still: Make
    torchs: Make
    calls: int
    rho: float = 0.0
    difference: bool = False
    normalized: bool = False
    shapes: Sequence[tuple[int, ...]] = SHAPES

    def parameters(self, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
        return parameters(dtype, self.shapes)

    @property
    def rounding(self) -> float:
        """Largest distance of two short runs in float64 that differ by the order of sums."""
        return 1e-7 if self.difference else 1e-14


def maker(make: Make, settings: Mapping[str, Any]) -> Make:
    return lambda params, **changes: make(params, **{**settings, **changes})


def without_rho(make: Make) -> Make:
    """The optimizers that take no ascent have no use for rho."""
    return lambda params, rho=0.0, **changes: make(params, **changes)


def row(make: Make, still: Make, torchs: Make, method: str = "", **fields: Any) -> Row:
    if not method:
        return Row(make, still, torchs, 1, **fields)
    m = METHODS[method]
    return Row(make, still, torchs, m.calls, m.rho, method == "difference", m.normalized, **fields)


def with_sgd(method: str = "") -> Row:
    plain, torchs = without_rho(maker(ef.SGD, SGD)), maker(torch.optim.SGD, SGD)
    make = maker(METHODS[method].make, SGD) if method else plain
    return row(make, plain, torchs, method)


def with_adamw(method: str = "") -> Row:
    plain, torchs = without_rho(maker(ef.AdamW, ADAMW)), maker(torch.optim.AdamW, ADAMW)
    if not method:
        return row(plain, plain, torchs)
    m = METHODS[method]
    options = {"method": m.name, "rho": m.rho, **m.options}
    return row(maker(ef.AdamW, ADAMW | options), plain, torchs, method)


def wrapped(base: Make, settings: Mapping[str, Any], method: str, **fields: Any) -> Row:
    m = METHODS[method]
    torchs = maker(base, settings)

    def make(
        params: Any, *, rho: float = m.rho, skip_nonfinite: bool = False, **changes: Any
    ) -> ef.SharpnessAware:
        inner = torchs(params, **changes)
        return ef.SharpnessAware(inner, m.name, rho, skip_nonfinite=skip_nonfinite, **m.options)

    return row(make, torchs, torchs, method, **fields)


OPTIMIZERS = {
    "SGD": with_sgd(),
    **{f"SGD {method}": with_sgd(method) for method in METHODS},
    "AdamW": with_adamw(),
    **{f"AdamW {method}": with_adamw(method) for method in METHODS},
    "torch SGD": wrapped(torch.optim.SGD, SGD, "asam"),
    "torch AdamW": wrapped(torch.optim.AdamW, ADAMW | {"foreach": False}, "anchored"),
    "torch fused AdamW": wrapped(torch.optim.AdamW, ADAMW | {"fused": True}, "difference"),
    "torch fused SGD": wrapped(torch.optim.SGD, SGD | {"fused": True}, "product"),
}
if hasattr(torch.optim, "Muon"):  # of torch 2.9
    OPTIMIZERS["torch Muon"] = wrapped(torch.optim.Muon, MUON, "sam", shapes=MATRICES)

ANY_SHAPE = {name: row for name, row in OPTIMIZERS.items() if row.shapes is SHAPES}
ASCENDING = {name: row for name, row in OPTIMIZERS.items() if row.calls > 1}


def each(rows: Mapping[str, Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows.values(), ids=rows)


each_call = pytest.mark.parametrize(
    ("row", "failing"),
    [
        pytest.param(r, i, id=f"{name}-{i}")
        for name, r in OPTIMIZERS.items()
        for i in range(r.calls)
    ],
)


def train(opt: Any, params: Sequence[Tensor], steps: int = 3, **problem: Any) -> None:
    closure = closure_of(opt, params, **problem)
    for _ in range(steps):
        opt.step(closure)


def twins(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def state_of(opt: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all that the state holds."""
    entries = [opt.state.get(p, {}) for p in params]
    return snapshot([entry[name] for entry in entries for name in sorted(entry)])


def quadratic(params: Sequence[Tensor], sign: float = 1.0) -> Tensor:
    """Curvature from 1 to 4."""
    scales = torch.linspace(1.0, 4.0, len(params)).tolist()
    return sign * sum(0.5 * c * (p * p).sum() for c, p in zip(scales, params, strict=True))


def rosenbrock(params: Sequence[Tensor], sign: float = 1.0) -> Tensor:
    """A hundredth of it."""
    a, b = params[0].flatten()
    return sign * (0.01 * (1 - a) ** 2 + (b - a * a) ** 2)


@each(OPTIMIZERS)
def test_a_quadratic_converges(row: Row) -> None:
    """lr is inside the edge, if any, and decays, since normalized ascents keep their length."""
    params = row.parameters()
    opt = row.make(params)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.96)
    if type(opt).__name__ in ("SGD", "USAM", "TwoStepUSAM", "HessianUSAM"):
        assert all(flt.admits([1.0, 4.0]).all() for flt in ef.filters.of(opt))
    closure = closure_of(opt, params, loss_of=quadratic)
    start = quadratic(params).item()
    for _ in range(100):
        opt.step(closure)
        schedule.step()
    assert closure.calls == 100 * row.calls
    assert quadratic(params).item() < 1e-2 * start


@each(OPTIMIZERS)
def test_rosenbrocks_function_decreases(row: Row) -> None:
    params = [nn.Parameter(torch.tensor([[-1.2, 1.0]], dtype=torch.float64))]
    opt = row.make(params, lr=0.05, rho=0.005)
    start = rosenbrock(params).item()
    train(opt, params, 150, loss_of=rosenbrock)
    assert rosenbrock(params).item() < 0.1 * start


@each(OPTIMIZERS)
def test_the_first_loss_is_returned_detached(row: Row) -> None:
    params = row.parameters()
    expected = loss_of(params).item()
    opt = row.make(params)
    closure = closure_of(opt, params)
    loss = opt.step(closure)
    assert loss.item() == expected
    assert not loss.requires_grad
    assert closure.calls == row.calls


@each(OPTIMIZERS)
def test_tied_weights_step_once(row: Row) -> None:
    data = torch.randn(8, 4, dtype=torch.float64)
    first, second = (nn.Linear(4, 4, bias=False).double() for _ in range(2))
    second.weight = first.weight
    model, single = nn.Sequential(first, second), twins([first.weight])
    opt, other = row.make(model.parameters()), row.make(single)
    assert [len(group["params"]) for group in opt.param_groups] == [1]
    train(opt, [first.weight], loss_of=lambda *_: model(data).square().mean())
    train(
        other,
        single,
        loss_of=lambda params, _: (data @ params[0].T @ params[0].T).square().mean(),
    )
    assert same_bits(first.weight, single[0])


@each(OPTIMIZERS)
def test_frozen_and_unused_parameters_are_as_if_not_there(row: Row) -> None:
    params, alone = row.parameters(), row.parameters()
    frozen, unused = row.parameters()[:2], row.parameters()[1:]
    for p in frozen:
        p.requires_grad_(False)
    opt, other = row.make([*frozen, *params, *unused]), row.make(alone)
    train(opt, params)
    train(other, alone)
    if row.difference:  # what is unused counts in the length of x, by which the step is taken
        assert distance(params, alone) < row.rounding
    else:
        assert all(map(same_bits, params, alone))
    assert all(map(same_bits, [*frozen, *unused], [*row.parameters()[:2], *row.parameters()[1:]]))
    assert not any(opt.state.get(p) for p in [*frozen, *unused])


@each(OPTIMIZERS)
def test_a_gradient_in_the_last_call_alone_is_a_step_from_x(row: Row) -> None:
    """Its parameter took no ascent; one whose last gradient is missing goes back to x."""
    params = row.parameters()
    opt = row.make(params)
    closure = closure_of(opt, params)
    opt.step(closure)
    late, missing = params[-1], params[-2]
    before, state = snapshot(params), state_of(opt, [missing])
    calls = closure.calls + row.calls

    def evaluate() -> Tensor:
        loss = closure()
        assert same_bits(late, before[-1])
        (missing if closure.calls == calls else late).grad = None
        return loss

    opt.step(evaluate)
    assert closure.calls == calls
    assert same_bits(missing, before[-2])
    assert all(map(same_bits, state_of(opt, [missing]), state))
    assert not same_bits(late, before[-1])
    assert distance(params[:-2], before[:-2]) > 1e-3


@each(OPTIMIZERS)
def test_dtypes_mix(row: Row) -> None:
    """Steps are those of the same numbers in float64, within what bfloat16 allows of them."""
    mixed = [p for dtype in DTYPES for p in row.parameters(dtype)]
    wide = [nn.Parameter(p.detach().double()) for p in mixed]
    n = len(row.shapes)

    def by_dtype(params: Sequence[Tensor], sign: float) -> Tensor:
        return sum(loss_of(params[i : i + n], sign).double() for i in range(0, len(params), n))

    opt, other = row.make(mixed), row.make(wide)
    train(opt, mixed, loss_of=by_dtype)
    train(other, wide, loss_of=by_dtype)
    assert [p.dtype for p in mixed] == [d for d in DTYPES for _ in row.shapes]
    start = [p for dtype in DTYPES for p in row.parameters(dtype)]
    assert distance(mixed, wide) < 0.35 * distance(mixed, start)


@each(ASCENDING)
def test_a_group_without_an_ascent_stays_where_it_is(row: Row) -> None:
    """Each other group is perturbed by its own rho, and all of them are restored."""
    params = row.parameters()
    groups = [
        {"params": params[:1]},
        {"params": params[1:3], "rho": 0.0},
        {"params": params[3:], "rho": 0.5 * row.rho},
    ]
    opt = row.make(groups)
    assert [group["rho"] for group in opt.param_groups] == [row.rho, 0.0, 0.5 * row.rho]
    closure = closure_of(opt, params)
    before = snapshot(params)
    closure()
    while opt.ascend():
        assert all(map(same_bits, params[1:3], before[1:3]))
        for p, x in zip([params[0], *params[3:]], [before[0], *before[3:]], strict=True):
            assert not same_bits(p, x)
        closure()
    assert closure.calls == row.calls
    opt.restore()
    assert all(map(same_bits, params, before))


@each(ASCENDING)
def test_rho_zero_everywhere_is_the_optimizer_without_an_ascent(row: Row) -> None:
    params, plain = row.parameters(), row.parameters()
    opt, other = row.make(params, rho=0.0), row.still(plain)
    closure = closure_of(opt, params)
    for _ in range(3):
        opt.step(closure)
    train(other, plain)
    assert closure.calls == 3
    assert all(map(same_bits, params, plain))


@each(ANY_SHAPE)
def test_empty_tensors_change_nothing(row: Row) -> None:
    params, others = row.parameters(), row.parameters()
    full = [p for p in others if p.numel()]
    assert len(full) < len(params)
    train(row.make(params), params, loss_of=quadratic_but_for_empty)
    train(row.make(full), full, loss_of=quadratic_but_for_empty)
    assert all(map(same_bits, params, others))


def quadratic_but_for_empty(params: Sequence[Tensor], sign: float) -> Tensor:
    return quadratic([p for p in params if p.numel()], sign) + sum(
        p.sum() for p in params if not p.numel()
    )


@each(ANY_SHAPE)
def test_nothing_but_empty_tensors(row: Row) -> None:
    params = [nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(2, 0))]
    opt = row.make(params, skip_nonfinite=True) if row.calls > 1 else row.make(params)
    train(opt, params, loss_of=lambda params, _: sum((p * p).sum() for p in params))
    assert not opt.perturbed


@each(ANY_SHAPE)
def test_layouts_of_any_order_of_dimensions(row: Row) -> None:
    """Transposed, permuted, channels last: the values are those of contiguous parameters."""
    shapes = ((5, 4), (2, 3, 4), (2, 3, 2, 2))
    plain = parameters(torch.float64, shapes)
    values = snapshot(plain)
    strided = [
        nn.Parameter(values[0].t().contiguous().t()),
        nn.Parameter(values[1].permute(2, 0, 1).contiguous().permute(1, 2, 0)),
        nn.Parameter(values[2].contiguous(memory_format=torch.channels_last)),
    ]
    plain[2] = nn.Parameter(values[2].contiguous())
    strides = [p.stride() for p in strided]
    assert not any(p.is_contiguous() for p in strided)
    train(row.make(plain), plain)
    train(row.make(strided), strided)
    assert distance(strided, plain) <= row.rounding
    assert [p.stride() for p in strided] == strides


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_call
def test_a_gradient_that_is_not_finite_is_skipped(row: Row, failing: int, bad: float) -> None:
    """In whichever call: parameters and state stay bit for bit, and the next step goes on.

    From there on no ascent moves, so that a loss scale that was too high shows again.
    """
    params, plain = row.parameters(), row.parameters()
    opt, other = row.make(params, skip_nonfinite=True), row.make(plain)
    points: list[list[Tensor]] = []

    def spoilt(params: Sequence[Tensor], sign: float) -> Tensor:
        points.append(snapshot(params))
        loss = loss_of(params, sign)
        if len(points) - 1 == row.calls + failing:
            loss = loss + bad * params[-1].flatten()[5]
        return loss

    train(opt, params, 1, loss_of=spoilt)
    before, state = snapshot(params), state_of(opt, params)
    assert opt.skipped == 0
    train(opt, params, 1, loss_of=spoilt)
    assert len(points) == 2 * row.calls
    assert opt.skipped == 1
    for point in points[row.calls + failing :]:
        assert all(map(same_bits, point, points[row.calls + failing]))
    assert not opt.perturbed
    assert all(map(same_bits, params, before))
    assert all(map(same_bits, state_of(opt, params), state))
    train(opt, params, 1, loss_of=spoilt)
    train(other, plain, 2)
    assert opt.skipped == 1
    assert all(map(same_bits, params, plain))


@each(OPTIMIZERS)
def test_a_gradient_of_zero_moves_nothing(dtype: torch.dtype, row: Row) -> None:
    params = row.parameters(dtype)
    opt = row.make(params, weight_decay=0.0)
    before = snapshot(params)
    visited = 0

    def flat(params: Sequence[Tensor], sign: float) -> Tensor:
        nonlocal visited
        visited += 1
        assert all(map(same_bits, params, before))
        return sum((p * p * 0.0).sum() for p in params)

    train(opt, params, 2, loss_of=flat)
    assert visited == 2 * row.calls
    assert all(map(same_bits, params, before))
    assert all(t.isfinite().all() for t in state_of(opt, params))


@each_call
def test_after_an_error_in_any_call_all_is_as_before(row: Row, failing: int) -> None:
    params, undisturbed = row.parameters(), row.parameters()
    opt, other = row.make(params), row.make(undisturbed)
    closure = closure_of(opt, params)
    opt.step(closure)
    before, state = snapshot(params), state_of(opt, params)

    def interrupted() -> Tensor:
        if closure.calls == row.calls + failing:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        opt.step(interrupted)
    assert all(map(same_bits, params, before))
    assert all(map(same_bits, state_of(opt, params), state))
    assert not opt.perturbed
    assert _perturbation.holder(params) is None
    train(opt, params)
    train(other, undisturbed, 4)
    assert all(map(same_bits, params, undisturbed))


@each(OPTIMIZERS)
def test_parameters_keep_their_storage(row: Row) -> None:
    params = row.parameters()
    opt = row.make(params)
    places = [(p.data_ptr(), p.stride()) for p in params]

    def staying(params: Sequence[Tensor], sign: float) -> Tensor:
        assert [(p.data_ptr(), p.stride()) for p in params] == places
        return loss_of(params, sign)

    train(opt, params, loss_of=staying)
    assert [(p.data_ptr(), p.stride()) for p in params] == places


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "double": lambda model: model.to(torch.float64),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half of it": lambda model: model[1].to(torch.float64),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("how", CONVERSIONS)
@each({name: row for name, row in OPTIMIZERS.items() if not name.startswith("torch")})
def test_a_model_converted_between_steps(row: Row, how: str) -> None:
    """Parameters keep their identity and change their memory; steps go on in the new one.

    torch's optimizers keep the state's old dtype, or refuse.
    """
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 3))
    params = list(model.parameters())
    opt = row.make(params)

    def loss(params: Sequence[Tensor], sign: float) -> Tensor:
        return sum(loss_of(pair).double() for pair in (params[:2], params[2:]))

    train(opt, params, 1, loss_of=loss)
    CONVERSIONS[how](model)
    kinds = [(p.dtype, p.stride()) for p in params]
    converted = twins(params)
    fresh = row.make(converted)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, params, 2, loss_of=loss)
    train(fresh, converted, 2, loss_of=loss)
    assert [(p.dtype, p.stride()) for p in params] == kinds
    assert all(map(same_bits, params, converted))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
@each(OPTIMIZERS)
def test_copies_go_on_alike_and_apart(row: Row, how: str) -> None:
    params = row.parameters()
    opt = row.make(params)
    train(opt, params)
    copied, theirs = COPIES[how]((opt, params))
    assert type(copied) is type(opt)
    before = snapshot(theirs)
    train(opt, params)
    assert all(map(same_bits, theirs, before))
    train(copied, theirs)
    assert all(map(same_bits, params, theirs))


@each(OPTIMIZERS)
def test_saved_and_loaded_mid_run_through_a_file(dtype: torch.dtype, row: Row) -> None:
    params = row.parameters(dtype)
    opt = row.make(params)
    train(opt, params)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    fresh = twins(params)
    other = row.make(fresh, lr=7.0, rho=0.9, weight_decay=0.5)
    other.load_state_dict(torch.load(file))
    train(opt, params)
    train(other, fresh)
    assert all(map(same_bits, fresh, params))


@each(OPTIMIZERS)
def test_maximizing_minus_f_minimises_f(row: Row) -> None:
    """Bit for bit, except a finite difference, which is then taken on the other side of x."""
    if "maximize" not in row.torchs([nn.Parameter(torch.ones(2, 2))]).defaults:
        pytest.skip("this optimizer of torch has no maximize")
    params, others = row.parameters(), row.parameters()
    train(row.make(params, maximize=True), params, sign=-1.0)
    train(row.make(others), others)
    assert distance(params, others) <= (row.rounding if row.difference else 0.0)
    assert distance(params, row.parameters()) > 0.1


@each(OPTIMIZERS)
def test_schedulers_set_lr(row: Row) -> None:
    """Given the wrapper or the base that it wraps."""
    by_hand = row.parameters()
    manual = row.make(by_hand)
    lrs = [manual.param_groups[0]["lr"] * 0.5**epoch for epoch in range(4)]
    for lr in lrs:
        manual.param_groups[0]["lr"] = lr
        train(manual, by_hand, 1)
    for inputs in ("opt", "base"):
        params = row.parameters()
        opt = row.make(params)
        target = getattr(opt, "base_optimizer", opt) if inputs == "base" else opt
        schedule = torch.optim.lr_scheduler.LambdaLR(target, lambda epoch: 0.5**epoch)
        for lr in lrs:
            assert opt.param_groups[0]["lr"] == lr
            train(opt, params, 1)
            schedule.step()
        assert all(map(same_bits, params, by_hand))


@each(ASCENDING)
def test_no_state_dict_while_the_parameters_are_away(row: Row) -> None:
    params = row.parameters()
    opt = row.make(params)
    closure = closure_of(opt, params)
    saved = opt.state_dict()
    closure()
    while opt.ascend():
        updated = snapshot(params)
        for refused in (opt.state_dict, lambda: opt.load_state_dict(saved)):
            with pytest.raises(RuntimeError, match="while the parameters are perturbed"):
                refused()
        assert all(map(same_bits, params, updated))
        closure()
    opt.step()
    opt.state_dict()


@each(OPTIMIZERS)
def test_torchs_optimizer_goes_on_from_its_state(row: Row) -> None:
    params = row.parameters()
    opt = row.make(params)
    train(opt, params)
    theirs = twins(params)
    other = row.torchs(theirs, lr=7.0, weight_decay=0.5)
    saved = opt.state_dict()
    steps = [id(entry["step"]) for entry in saved["state"].values() if "step" in entry]
    assert len(set(steps)) == len(steps)  # torch adds 1 to each
    other.load_state_dict(copy.deepcopy(saved))
    for group in opt.param_groups:
        group["rho"] = 0.0
    train(opt, params)
    train(other, theirs)
    assert distance(params, theirs) < 1e-14
    assert distance(params, row.parameters()) > 0.1


@each(OPTIMIZERS)
def test_it_goes_on_from_torchs_state(row: Row) -> None:
    """What torch's groups lack, rho, keeps its value."""
    theirs = row.parameters()
    other = row.torchs(theirs)
    train(other, theirs)
    params = twins(theirs)
    opt = row.make(params, lr=7.0, weight_decay=0.5, rho=0.9)
    opt.load_state_dict(copy.deepcopy(other.state_dict()))
    assert row.calls == 1 or opt.param_groups[0]["rho"] == 0.9
    assert opt.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    for group in opt.param_groups:
        group["rho"] = 0.0
    train(opt, params)
    train(other, theirs)
    assert distance(params, theirs) < 1e-14


@each(OPTIMIZERS)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(dtype: torch.dtype, row: Row) -> None:
    plain, params = row.parameters(dtype), row.parameters(dtype)
    reference, opt = row.make(plain), row.make(params)
    scaler = GradScaler("cpu", init_scale=16.0, growth_interval=2)
    for _ in range(4):
        evaluate(opt, params, scaler)
        while opt.ascend(grad_scaler=scaler):
            evaluate(opt, params, scaler)
        scaler.step(opt)
        scaler.update()
    train(reference, plain, 4)
    assert scaler.get_scale() == 64.0
    assert opt.skipped == 0
    assert all(map(same_bits, params, plain))


def evaluate(opt: Any, params: Sequence[Tensor], scaler: GradScaler) -> None:
    opt.zero_grad()
    backward(opt, scaler.scale(loss_of(params)))
