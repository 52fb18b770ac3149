"""What every optimizer leaves after skipped and failed steps, in copies and in checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from cases import same_bits
from eigenfilter import _perturbation
from optimizers.conformance_table import ASCENDING, OPTIMIZERS, Row, clones, each, each_call, train
from optimizers.problems import backward, closure_of, distance, loss_of, snapshot, state_of


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_call
def test_a_gradient_that_is_not_finite_is_skipped(row: Row, failing: int, bad: float) -> None:
    """In any call: parameters and state stay bit for bit, and training goes on with the next step.

    Later ascents of that step perturb nothing, so that their gradients overflow again.
    """
    params, plain = row.parameters(), row.parameters()
    opt, other = row.make(params, skip_nonfinite=True), row.make(plain)
    points: list[list[Tensor]] = []

    def spoiled_loss(params: Sequence[Tensor], sign: float) -> Tensor:
        points.append(snapshot(params))
        loss = loss_of(params, sign)
        if len(points) - 1 == row.calls + failing:
            loss = loss + bad * params[-1].flatten()[5]
        return loss

    train(opt, params, 1, loss_of=spoiled_loss)
    before, state = snapshot(params), state_of(opt, params)
    assert opt.skipped == 0
    train(opt, params, 1, loss_of=spoiled_loss)
    assert len(points) == 2 * row.calls
    assert opt.skipped == 1
    for point in points[row.calls + failing :]:
        assert all(map(same_bits, point, points[row.calls + failing]))
    assert not opt.perturbed
    assert all(map(same_bits, params, before))
    assert all(map(same_bits, state_of(opt, params), state))
    train(opt, params, 1, loss_of=spoiled_loss)
    train(other, plain, 2)
    assert opt.skipped == 1
    assert all(map(same_bits, params, plain))


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
    converted = clones(params)
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
    fresh = clones(params)
    other = row.make(fresh, lr=7.0, rho=0.9, weight_decay=0.5)
    other.load_state_dict(torch.load(file))
    train(opt, params)
    train(other, fresh)
    assert all(map(same_bits, fresh, params))


@each(ASCENDING)
def test_no_state_dict_while_the_parameters_are_perturbed(row: Row) -> None:
    params = row.parameters()
    opt = row.make(params)
    closure = closure_of(opt, params)
    state_dict = opt.state_dict()
    closure()
    while opt.ascend():
        updated = snapshot(params)
        for refused in (opt.state_dict, lambda: opt.load_state_dict(state_dict)):
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
    theirs = clones(params)
    other = row.make_torch(theirs, lr=7.0, weight_decay=0.5)
    state_dict = opt.state_dict()
    steps = [id(entry["step"]) for entry in state_dict["state"].values() if "step" in entry]
    assert len(set(steps)) == len(steps)  # torch adds 1 to each
    other.load_state_dict(copy.deepcopy(state_dict))
    for group in opt.param_groups:
        group["rho"] = 0.0
    train(opt, params)
    train(other, theirs)
    assert distance(params, theirs) < 1e-14
    assert distance(params, row.parameters()) > 0.1


@each(OPTIMIZERS)
def test_it_goes_on_from_torchs_state(row: Row) -> None:
    """rho, which torch's groups lack, keeps its value."""
    theirs = row.parameters()
    other = row.make_torch(theirs)
    train(other, theirs)
    params = clones(theirs)
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
