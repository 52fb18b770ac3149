"""What a step of every optimizer computes, whatever its ascent and descent are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import DTYPES, same_bits
from optimizers.conformance_table import ANY_SHAPE, ASCENDING, OPTIMIZERS, Row, clones, each, train
from optimizers.problems import closure_of, distance, loss_of, parameters, snapshot, state_of


def quadratic(params: Sequence[Tensor], sign: float = 1.0) -> Tensor:
    """A quadratic with curvature from 1 to 4."""
    scales = torch.linspace(1.0, 4.0, len(params)).tolist()
    return sign * sum(0.5 * c * (p * p).sum() for c, p in zip(scales, params, strict=True))


def rosenbrock(params: Sequence[Tensor], sign: float = 1.0) -> Tensor:
    """Rosenbrock's function, divided by 100."""
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
    losses: list[Tensor] = []

    def observed() -> Tensor:
        losses.append(closure())
        return losses[-1]

    loss = opt.step(observed)
    assert loss.item() == losses[0].item() == expected
    assert (losses[0].requires_grad, loss.requires_grad) == (True, False)
    assert len({each.item() for each in losses}) == closure.calls == row.calls
    assert (opt.phase, opt.perturbed) == ("ascent" if row.calls > 1 else "descent", False)


@each(OPTIMIZERS)
def test_tied_weights_step_once(row: Row) -> None:
    data = torch.randn(8, 4, dtype=torch.float64)
    first, second = (nn.Linear(4, 4, bias=False).double() for _ in range(2))
    second.weight = first.weight
    model, single = nn.Sequential(first, second), clones([first.weight])
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
    if row.finite_difference:
        # Its displacement is relative to |x|, in which unused parameters count.
        assert distance(params, alone) < row.rounding
    else:
        assert all(map(same_bits, params, alone))
    assert all(map(same_bits, [*frozen, *unused], [*row.parameters()[:2], *row.parameters()[1:]]))
    assert not any(p in opt.state for p in [*frozen, *unused])


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
    opt, other = row.make(params, rho=0.0), row.make_plain(plain)
    closure = closure_of(opt, params)
    assert (opt.phase, opt.needs_graph) == ("descent", False)
    closure()
    assert opt.ascend() is False
    opt.step()
    for _ in range(2):
        opt.step(closure)
    train(other, plain)
    assert distance(params, row.parameters()) > 1e-2
    assert closure.calls == 3
    assert all(map(same_bits, params, plain))


@each(ANY_SHAPE)
def test_empty_tensors_change_nothing(row: Row) -> None:
    params, others = row.parameters(), row.parameters()
    full = [p for p in others if p.numel()]
    assert len(full) < len(params)
    train(row.make(params), params, loss_of=quadratic_plus_empty_sums)
    train(row.make(full), full, loss_of=quadratic_plus_empty_sums)
    assert all(map(same_bits, params, others))


def quadratic_plus_empty_sums(params: Sequence[Tensor], sign: float) -> Tensor:
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


@each(OPTIMIZERS)
def test_a_gradient_of_zero_changes_no_parameter(dtype: torch.dtype, row: Row) -> None:
    params = row.parameters(dtype)
    opt = row.make(params, weight_decay=0.0)
    before = snapshot(params)
    calls = 0

    def flat(params: Sequence[Tensor], sign: float) -> Tensor:
        nonlocal calls
        calls += 1
        assert all(map(same_bits, params, before))
        return sum((p * p * 0.0).sum() for p in params)

    train(opt, params, 2, loss_of=flat)
    assert calls == 2 * row.calls
    assert all(map(same_bits, params, before))
    assert all(t.isfinite().all() for t in state_of(opt, params))


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


@each(OPTIMIZERS)
def test_maximizing_minus_f_minimizes_f(row: Row) -> None:
    """Runs agree bit for bit; finite differences agree less, being taken on the other side."""
    if "maximize" not in row.make_torch([nn.Parameter(torch.ones(2, 2))]).defaults:
        pytest.skip("this optimizer of torch has no maximize")
    params, others = row.parameters(), row.parameters()
    train(row.make(params, maximize=True), params, sign=-1.0)
    train(row.make(others), others)
    assert distance(params, others) <= (row.rounding if row.finite_difference else 0.0)
    assert distance(params, row.parameters()) > 0.1


@each(OPTIMIZERS)
def test_schedulers_set_lr(row: Row) -> None:
    """A scheduler may hold the wrapper or the base that it wraps."""
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
