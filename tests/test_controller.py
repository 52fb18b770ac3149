"""The controller: the designed edge at every lr, the feedback, its bounds, resuming, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter import filters
from eigenfilter.certificate.linearized import linearized, preconditioner
from eigenfilter.curvature import HessianOperator, eigsh
from eigenfilter.curvature.operators.preconditioned import PreconditionedOperator
from quadratics import Quadratic

METHODS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "sgd": (ef.SGD, "extrapolation", {}),
    "usam": (ef.USAM, "rho", {}),
    "usam, nesterov": (ef.USAM, "rho", {"nesterov": True}),
    "usam, damped": (ef.USAM, "rho", {"dampening": 0.3}),
    "two_step_usam": (ef.TwoStepUSAM, "rho", {}),
    "two_step_usam, anchored": (ef.TwoStepUSAM, "rho", {"ascent": "anchored"}),
    "hessian_usam": (ef.HessianUSAM, "rho", {}),
}
METHODS["sgd, damped"] = (ef.SGD, "extrapolation", {"dampening": 0.3})


class Plant:
    """A quadratic whose sharpness is a given function of the present edge, as if it had settled."""

    def __init__(self, sharpness: float = 8.0, momentum: float = 0.9, lr: float = 0.01) -> None:
        self.model = Quadratic(torch.tensor([sharpness, 1.0], dtype=torch.float64))
        self.op = HessianOperator(
            self.model, self.model.loss, self.model.data, engine="finite_difference"
        )
        self.opt = ef.SGD(self.model.parameters(), lr=lr, momentum=momentum)

    def settle(self, sharpness: float) -> None:
        self.model.H[0, 0] = sharpness

    def edge(self) -> float:
        [flt] = filters.of(self.opt)
        return flt.max_eigenvalue()


class Trained:
    """A small tanh network on a fixed batch."""

    def __init__(self, cls: Any = ef.SGD, lr: float = 0.3, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()
        self.x = torch.randn(60, 8, dtype=torch.float64)
        self.y = 2 * self.x[:, :3].sin()
        self.loss = nn.MSELoss()
        self.op = HessianOperator(self.model, self.loss, (self.x, self.y), engine="cached_graph")
        own = options if cls is ef.AdamW else {"momentum": 0.9} | options
        self.opt = cls(self.model.parameters(), lr=lr, **own)

    def closure(self) -> Tensor:
        self.opt.zero_grad()
        value = self.loss(self.model(self.x), self.y)
        value.backward()
        return value

    def sharpness(self) -> float:
        return float(eigsh(self.op, 1, tol=1e-8).values[0])


def repeat(controller: ef.SharpnessController, steps: int) -> None:
    for _ in range(steps):
        controller.step()


@pytest.mark.parametrize("name", METHODS)
def test_at_every_lr_the_edge_is_the_designed_one(name: str) -> None:
    cls, key, options = METHODS[name]
    model = Quadratic(torch.tensor([8.0, 1.0], dtype=torch.float64))
    op = HessianOperator(model, model.loss, model.data)
    opt = cls(model.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01, **options)
    controller = ef.SharpnessController(op, opt, 8.0, every=1000, limit=1e3)
    group = opt.param_groups[0]
    design = {"momentum": 0.5, "weight_decay": 0.01, **options}
    values = []
    for lr in (0.1, 0.08, 0.05, 0.04, 0.06):
        group["lr"] = lr
        controller.step()
        values.append(group[key])
        assert group[key] == filters.design(name.split(",")[0], 8.0, lr=lr, **design)
        [flt] = filters.of(opt)
        assert flt.max_eigenvalue() == pytest.approx(8.0)
    assert len(set(values)) == len(values)
    assert len(controller.history) == 1


def test_lr_above_every_design_takes_no_extrapolation() -> None:
    plant = Plant(lr=10.0)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0)
    plant.opt.param_groups[0]["extrapolation"] = 0.0
    controller.step()
    assert plant.opt.param_groups[0]["extrapolation"] == 0.0
    assert controller.saturated == "flat"


def test_small_changes_of_lr_are_left_to_the_next_large_one() -> None:
    plant = Plant()
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1000)
    group = plant.opt.param_groups[0]
    seen = []
    for step in range(100):
        group["lr"] = 0.01 * (1 - step / 200)
        controller.step()
        seen.append(group["extrapolation"])
        assert plant.edge() == pytest.approx(8.0, rel=0.005)
    assert 2 < len(set(seen)) < 10


def test_an_lr_of_0_changes_nothing() -> None:
    plant = Plant(lr=0.0)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0)
    controller.step()
    group = plant.opt.param_groups[0]
    assert group["extrapolation"] == 0.0
    group["lr"] = 0.02
    controller.step()
    assert group["extrapolation"] == filters.design("sgd", 8.0, lr=0.02, momentum=0.9)


@pytest.mark.parametrize("bias", [0.3, 0.9, 1.1])
def test_the_feedback_reaches_the_target_where_the_filter_is_biased(bias: float) -> None:
    plant = Plant(sharpness=8.0 * bias)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1, max_every=1, tol=1e-8)
    for _ in range(40):
        controller.step()
        plant.settle(bias * plant.edge())
    last = controller.history[-1]
    assert last.sharpness == pytest.approx(8.0, rel=1e-3)
    assert last.edge == pytest.approx(8.0 / bias, rel=1e-3)
    assert controller.saturated is None


@pytest.mark.parametrize("power", [0.2, 0.5])
def test_the_feedback_reaches_the_target_where_the_sharpness_hardly_answers(power: float) -> None:
    plant = Plant(sharpness=7.0, lr=1e-4)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1, max_every=1, tol=1e-8)
    for _ in range(100):
        controller.step()
        plant.settle(7.0 * (plant.edge() / 8.0) ** power)
    assert controller.history[-1].sharpness == pytest.approx(8.0, rel=1e-2)


def test_a_sharpness_that_rises_by_itself_leaves_the_design_as_it_is() -> None:
    plant = Plant(sharpness=1.0)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1, tol=1e-8)
    sharpness = 1.0
    for _ in range(60):
        controller.step()
        plant.settle(sharpness := sharpness * 1.03)
        if sharpness > 7.6:
            break
        assert controller.edge == 8.0


def test_a_model_far_beyond_the_target_is_brought_down_step_by_step() -> None:
    plant = Plant(sharpness=80.0)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1, tol=1e-8)
    edges = []
    for _ in range(20):
        controller.step()
        edges.append(plant.edge())
        plant.settle(plant.edge())
    assert edges[:3] == pytest.approx([80 / 1.2, 80 / 1.2**2, 80 / 1.2**3])
    assert edges[-1] == pytest.approx(8.0)


def test_where_nothing_pushes_the_sharpness_up_the_correction_does_not_wind_up() -> None:
    plant = Plant(sharpness=2.0)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1, tol=1e-8)
    group = plant.opt.param_groups[0]
    for _ in range(100):
        controller.step()
    assert controller.saturated == "flat"
    assert group["extrapolation"] == 0.0
    own = filters.HeavyBall(0.01, 0.9).max_eigenvalue()
    assert controller.edge == pytest.approx(own)
    plant.settle(own)
    for _ in range(40):
        controller.step()
        plant.settle(plant.edge())
    assert controller.history[-1].sharpness == pytest.approx(8.0, rel=0.05)


def test_a_sharpness_that_does_not_come_down_warns_once() -> None:
    plant = Plant(sharpness=9.5)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1, tol=1e-8)
    with pytest.warns(UserWarning, match=r"the sharpness 9.5 is above the target 8, and the edge"):
        repeat(controller, 10)
    assert controller.saturated == "sharp"
    assert plant.edge() == pytest.approx(9.5 / 1.2)
    controller.step()  # it does not warn again
    plant.settle(8.0)
    controller.check()
    assert controller.saturated is None


@pytest.mark.parametrize("name", [name for name in METHODS if "usam" in name])
def test_rho_stays_below_its_limit(name: str) -> None:
    cls, _, options = METHODS[name]
    model = Quadratic(torch.tensor([8.0, 1.0], dtype=torch.float64))
    op = HessianOperator(model, model.loss, model.data)
    opt = cls(model.parameters(), lr=0.01, momentum=0.5, **options)
    controller = ef.SharpnessController(op, opt, 8.0)
    method, group = name.split(",")[0], opt.param_groups[0]
    largest = filters.design(method, 8.0, rho=0.0, momentum=0.5, **options)
    for share in (0.3, 0.24, 0.05, 0.001):
        group["lr"] = share * largest
        controller.step()
        expected = filters.design(
            method, 8.0, lr=max(share, 0.25) * largest, momentum=0.5, **options
        )
        assert group["rho"] == pytest.approx(expected)


def test_a_limit_of_ones_own() -> None:
    plant = Plant(sharpness=9.0)
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0, every=1, limit=0.1)
    with pytest.warns(UserWarning, match="raise max_eigenvalue or limit"):
        repeat(controller, 10)
    assert plant.opt.param_groups[0]["extrapolation"] == 0.1


def test_a_tensor_stays_the_tensor_that_it_is() -> None:
    model = Quadratic(torch.tensor([8.0, 1.0], dtype=torch.float64))
    op = HessianOperator(model, model.loss, model.data)
    rho = torch.tensor(0.05, dtype=torch.float64)
    opt = ef.USAM(model.parameters(), lr=torch.tensor(0.1, dtype=torch.float64), rho=rho)
    rho = opt.param_groups[0]["rho"]
    ef.SharpnessController(op, opt, 8.0).step()
    assert opt.param_groups[0]["rho"] is rho
    assert float(rho) == filters.design("usam", 8.0, lr=0.1)


def test_groups_that_differ_get_the_same_edge_and_the_hessian_is_measured() -> None:
    model = Quadratic(torch.tensor([8.0, 1.0, 3.0], dtype=torch.float64), [1, 2])
    op = HessianOperator(model, model.loss, model.data)
    first, second = model.parameters()
    groups = [
        {"params": [first], "weight_decay": 0.1},
        {"params": [second], "lr": 0.02, "momentum": 0.5},
    ]
    opt = ef.SGD(groups, lr=0.05, momentum=0.9)
    controller = ef.SharpnessController(op, opt, 8.0, tol=1e-8)
    check = controller.step()
    assert check is not None
    assert check.sharpness == pytest.approx(8.0, rel=1e-3)
    assert [f.max_eigenvalue() for f in filters.of(opt)] == pytest.approx([8.0, 8.0])
    # Composed, the groups admit Hessians up to the target exactly.
    linear = linearized(op, opt)
    top = float(eigsh(linear.operator, 1, tol=1e-12).values[0])
    assert top == pytest.approx(linear.filter.max_eigenvalue())


@pytest.mark.parametrize(("factor", "is_stable"), [(0.98, True), (1.02, False)])
def test_groups_that_differ_are_stable_up_to_the_target(factor: float, is_stable: bool) -> None:
    torch.manual_seed(3)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    H = Q @ torch.tensor([8.0, 4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64).diag() @ Q.T
    model = Quadratic(H, [2, 4])
    op = HessianOperator(model, model.loss, model.data, engine="finite_difference")
    first, second = model.parameters()
    groups = [
        {"params": [first], "lr": 0.001, "weight_decay": 0.1},
        {"params": [second], "lr": 0.1, "momentum": 0.3, "dampening": 0.2},
    ]
    opt = ef.SGD(groups, lr=0.05, momentum=0.9)
    ef.SharpnessController(op, opt, 8.0, tol=1e-8).check()
    group, other = opt.param_groups
    assert group["extrapolation"] != pytest.approx(other["extrapolation"], rel=0.1)
    model.H = factor * H
    model.move(1.0)
    model.train_with(opt, 3000)
    before = torch.cat([p.detach().clone() for p in model.x])
    model.train_with(opt, 1)
    change = (torch.cat([p.detach() for p in model.x]) - before).norm()
    assert change < 1e-6 if is_stable else change > 1e3


def test_the_sharpness_is_measured_at_x_and_training_goes_on_at_y_to_the_bit() -> None:
    task = Trained(extrapolation=0.2)
    for _ in range(20):
        task.opt.step(task.closure)
    before = [p.detach().clone() for p in task.model.parameters()]
    twin = copy.deepcopy(task.opt.state_dict())
    controller = ef.SharpnessController(task.op, task.opt, 5.0, tol=1e-10)
    check = controller.check()
    for p, value in zip(task.model.parameters(), before, strict=True):
        assert torch.equal(p, value)
    group = task.opt.param_groups[0]
    assert group["extrapolated"] == twin["param_groups"][0]["extrapolated"] == 0.2
    task.opt.eval()
    assert check.sharpness == pytest.approx(task.sharpness(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "lr", "decay", "target"),
    [("sgd", 0.15, 0.2, 1.5), ("sgd", 0.15, 0.2, 2.3), ("usam, nesterov", 0.36, 0.625, 1.5)],
)
def test_training_with_a_decaying_lr_stays_at_the_target(
    name: str, lr: float, decay: float, target: float
) -> None:
    cls, _, options = METHODS[name]
    task, steps = Trained(cls, lr, **options), 600
    schedule = torch.optim.lr_scheduler.LinearLR(task.opt, 1.0, decay, steps)
    controller = ef.SharpnessController(task.op, task.opt, target, every=10, max_every=20)
    for _ in range(steps):
        task.opt.step(task.closure)
        schedule.step()
        controller.step()
    last = [check.sharpness for check in controller.history if check.step > steps / 2]
    assert sum(abs(s / target - 1) <= 0.1 for s in last) >= 0.9 * len(last)
    assert len(last) >= 7
    assert len(controller.history) < 0.7 * steps / 10


def test_checks_notice_when_the_second_eigenvalue_becomes_the_largest() -> None:
    spectrum = torch.linspace(0.0, 5.0, 300, dtype=torch.float64)
    spectrum[:2] = torch.tensor([7.6, 8.0])
    model = Quadratic(spectrum)
    op = HessianOperator(model, model.loss, model.data, engine="finite_difference")
    opt = ef.SGD(model.parameters(), lr=0.01, momentum=0.9)
    controller = ef.SharpnessController(op, opt, 8.0, seed=1)
    monitor = ef.SharpnessMonitor(op, opt, tol=5e-2, seed=1)
    assert controller.check().sharpness == pytest.approx(8.0, rel=0.01)
    monitor.check()
    model.H[0, 0] = 8.3
    assert controller.check().sharpness == pytest.approx(8.3, rel=0.01)
    assert monitor.check().sharpness < 8.1  # it follows the vector that was the first


def test_a_loaded_state_continues_bit_for_bit() -> None:
    def run(task: Trained, controller: ef.SharpnessController, steps: int) -> None:
        for _ in range(steps):
            task.opt.step(task.closure)
            task.opt.param_groups[0]["lr"] *= 0.995
            controller.step()

    task = Trained(lr=0.15)
    first = ef.SharpnessController(task.op, task.opt, 4.0, every=7)
    run(task, first, 150)
    other = Trained(lr=0.15)
    second = ef.SharpnessController(other.op, other.opt, 4.0, every=7)
    other.model.load_state_dict(task.model.state_dict())
    other.opt.load_state_dict(copy.deepcopy(task.opt.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    done = len(first.history)
    run(task, first, 150)
    run(other, second, 150)
    assert done > 3
    assert len(second.history) > 3
    for check, again in zip(first.history[done:], second.history, strict=True):
        assert (check.step, check.sharpness, check.edge) == (
            again.step,
            again.sharpness,
            again.edge,
        )
    for p, q in zip(task.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert first.state_dict()["actuators"] == second.state_dict()["actuators"]


def test_a_state_of_another_number_of_groups_changes_nothing() -> None:
    plant = Plant()
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0)
    state = controller.state_dict()
    with pytest.raises(ValueError, match="the state is of 2 groups, and the optimizer has 1"):
        controller.load_state_dict(state | {"actuators": 2 * state["actuators"], "edge": 3.0})
    assert controller.edge == 8.0


@pytest.mark.parametrize("name", ["_checked", "actuators"])
def test_a_state_that_lacks_a_part_changes_nothing(name: str) -> None:
    plant = Plant()
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0)
    state = controller.state_dict() | {"edge": 3.0}
    del state[name]
    with pytest.raises(ValueError, match=f"the state lacks {name}: it is no state of a Sharpness"):
        controller.load_state_dict(state)
    assert controller.edge == 8.0


def test_what_other_code_sets_is_refused() -> None:
    plant = Plant()
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0)
    plant.opt.param_groups[0]["extrapolation"] = 0.01  # before the first step it may be anything
    controller.step()
    plant.opt.param_groups[0]["extrapolation"] = 0.01
    for call in (controller.step, controller.check):
        with pytest.raises(RuntimeError, match=r"extrapolation of a group is 0\.01, and the Sharp"):
            call()
    assert len(controller.history) == 1


def test_a_rho_scheduler_beside_it_is_refused() -> None:
    task = Trained(ef.USAM)
    ef.schedulers.RhoScheduler(task.opt, "lr")
    with pytest.raises(ValueError, match="a RhoScheduler sets rho in param_groups"):
        ef.SharpnessController(task.op, task.opt, 4.0)
    task = Trained(ef.USAM)
    controller = ef.SharpnessController(task.op, task.opt, 4.0)
    task.opt.step(task.closure)
    controller.step()
    ef.schedulers.RhoScheduler(task.opt, lambda t: 0.5)
    with pytest.raises(RuntimeError, match="let nothing else set it"):
        controller.step()


def test_a_group_that_is_added_later_is_refused() -> None:
    plant = Plant()
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0)
    plant.opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="construct a new one after add_param_group"):
        controller.step()


def test_around_torchs_sgd() -> None:
    model = Quadratic(torch.tensor([8.0, 1.0], dtype=torch.float64))
    op = HessianOperator(model, model.loss, model.data)
    base = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    opt = ef.SharpnessAware(base, method="two_step_usam")
    ef.SharpnessController(op, opt, 8.0).step()
    expected = filters.design("two_step_usam", 8.0, lr=0.2, momentum=0.5)
    assert opt.param_groups[0]["rho"] == expected


def adamw_on_a_quadratic() -> tuple[Quadratic, HessianOperator, ef.AdamW]:
    """An AdamW whose first gradient is (4, 0.25), after which P^-1/2 H P^-1/2 is diag(2, 4)."""
    model = Quadratic(torch.tensor([8.0, 1.0], dtype=torch.float64))
    with torch.no_grad():
        model.x[0].copy_(torch.tensor([1.5, 1.25]))
    op = HessianOperator(model, model.loss, model.data, engine="finite_difference")
    opt = ef.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.99), weight_decay=0.01)
    return model, op, opt


def test_adamw_has_the_designed_edge_of_the_preconditioned_hessian() -> None:
    model, op, opt = adamw_on_a_quadratic()
    controller = ef.SharpnessController(op, opt, 4.5, every=1000, tol=1e-8)
    model.train_with(opt, 1)
    check = controller.step()
    assert check is not None
    assert check.sharpness == pytest.approx(4.0, rel=1e-6)
    group, values = opt.param_groups[0], []
    for lr in (0.1, 0.05, 0.02):
        group["lr"] = lr
        controller.step()
        values.append(group["extrapolation"])
        assert values[-1] == filters.design("adamw", 4.5, lr=lr, beta1=0.8, weight_decay=0.01)
        [flt] = filters.of(opt)
        assert flt.max_eigenvalue() == pytest.approx(4.5)
    assert len(set(values)) == 3
    assert len(controller.history) == 1


def test_adamw_is_checked_from_its_first_step_on() -> None:
    model, op, _ = adamw_on_a_quadratic()
    opt = ef.AdamW(model.parameters(), lr=0.1, skip_nonfinite=True)
    controller = ef.SharpnessController(op, opt, 4.5, tol=1e-8)
    with pytest.raises(RuntimeError, match="AdamW has taken no step"):
        controller.check()
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    opt.step()  # is skipped
    assert controller.step() is None
    assert ef.SharpnessMonitor(op, opt).check().edge is None  # there is no preconditioner
    model.train_with(opt, 1)
    check = controller.step()
    assert check is not None
    assert check.step == 2
    assert math.isfinite(check.sharpness)


def test_groups_of_adamw_that_differ_get_the_same_edge() -> None:
    model = Quadratic(torch.tensor([8.0, 1.0, 3.0], dtype=torch.float64), [1, 2])
    model.move(0.5)
    op = HessianOperator(model, model.loss, model.data, engine="finite_difference")
    first, second = model.parameters()
    groups = [{"params": [first], "betas": (0.5, 0.9)}, {"params": [second], "lr": 0.02}]
    opt = ef.AdamW(groups, lr=0.05, weight_decay=0.01)
    controller = ef.SharpnessController(op, opt, 100.0, tol=1e-8)
    model.train_with(opt, 3)
    check = controller.step()
    assert check is not None
    assert [flt.max_eigenvalue() for flt in filters.of(opt)] == pytest.approx([100.0, 100.0])
    # Composed, the groups admit preconditioned Hessians up to the edge exactly.
    linear = linearized(op, opt)
    assert isinstance(linear.operator, PreconditionedOperator)
    scale = preconditioner(opt, op.params)
    H = scale[:, None] * model.H * scale
    a = torch.tensor([flt.rate for flt in filters.of(opt)], dtype=torch.float64)[[0, 1, 1]]
    w = torch.tensor([flt.edge_decay for flt in filters.of(opt)], dtype=torch.float64)[[0, 1, 1]]
    assert torch.allclose(2 / a - w, torch.full((3,), 100.0, dtype=torch.float64))
    assert check.sharpness == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)


def test_an_adamw_that_ascends_later_is_refused() -> None:
    model, op, opt = adamw_on_a_quadratic()
    controller = ef.SharpnessController(op, opt, 4.5)
    model.train_with(opt, 1)
    opt.param_groups[0]["rho"] = 0.1
    with pytest.raises(ValueError, match=r"AdamW ascends, .* set rho=0"):
        controller.step()


def test_float16_parameters_of_adamw_are_refused() -> None:
    model = nn.Linear(2, 1).half()
    data = torch.ones(1, 2), torch.ones(1, 1)
    op = HessianOperator(model, nn.functional.mse_loss, data, dtype=torch.float32)
    with pytest.raises(TypeError, match="AdamW takes no extrapolation"):
        ef.SharpnessController(op, ef.AdamW(model.parameters()), 4.0)


def test_adamw_with_a_decaying_lr_stays_at_the_target() -> None:
    target, steps, ends = 800.0, 1000, []
    for is_controlled in (True, False):
        task = Trained(ef.AdamW, lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(task.opt, steps)
        monitor = ef.SharpnessMonitor(task.op, task.opt, every=200, tol=1e-3)
        if is_controlled:
            monitor = ef.SharpnessController(task.op, task.opt, target, every=20)
        for _ in range(steps):
            task.opt.step(task.closure)
            schedule.step()
            monitor.step()
        ends.append([check.sharpness for check in monitor.history if check.step > steps / 2])
    controlled, free = ends
    assert sum(abs(s / target - 1) <= 0.1 for s in controlled) >= 0.9 * len(controlled)
    assert len(controlled) >= 6
    assert free[-1] > 1.15 * target


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda ps: ef.SAM(ps, lr=0.1), TypeError, "SAM's edge moves with the gradient's norm"),
        (lambda ps: ef.SAM(ps, lr=0.1, adaptive=True), TypeError, "edge moves with the gradient's"),
        (lambda ps: ef.MSAM(ps, lr=0.1), TypeError, "MSAM's edge moves with the momentum's norm"),
        (lambda ps: torch.optim.AdamW(ps), TypeError, "AdamW has no e or rho by which"),
        (lambda ps: ef.AdamW(ps, method="sam", rho=0.1), ValueError, "AdamW ascends, .* set rho=0"),
        (lambda ps: ef.AdamW(ps, maximize=True), ValueError, "maximizes"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), TypeError, "SGD has no e or rho by which"),
        (lambda ps: torch.optim.RMSprop(ps), TypeError, "no filter is known for RMSprop"),
        (lambda ps: ef.SGD(ps, lr=0.1), ValueError, "set momentum > 0, and no nesterov"),
        (
            lambda ps: ef.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
            ValueError,
            "set momentum > 0, and no nesterov",
        ),
        (
            lambda ps: ef.SGD(ps, lr=0.1, momentum=0.9, dampening=1.0),
            ValueError,
            "take dampening < 1",
        ),
        (lambda ps: ef.USAM(ps, lr=0.1, maximize=True), ValueError, "maximizes"),
        (
            lambda ps: ef.SharpnessAware(torch.optim.AdamW(ps), method="usam"),
            TypeError,
            "SharpnessAware has no e or rho by which",
        ),
    ],
)
def test_optimizers_without_control(build: Any, error: Any, match: str) -> None:
    task = Trained()
    with pytest.raises(error, match=match):
        ef.SharpnessController(task.op, build(list(task.model.parameters())), 4.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_eigenvalue": 0.0}, "max_eigenvalue"),
        ({"max_eigenvalue": math.inf}, "max_eigenvalue"),
        ({"every": 0}, "every"),
        ({"max_every": 5}, "max_every must be at least every = 10, not 5"),
        ({"tol": 0.0}, "tol"),
        ({"gain": 0.0}, "gain"),
        ({"gain": 1.1}, "gain"),
        ({"limit": 0.0}, "limit"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    task = Trained()
    with pytest.raises(ValueError, match=match):
        ef.SharpnessController(task.op, task.opt, **{"max_eigenvalue": 4.0, "every": 10} | options)


def test_a_plot_has_the_targets_band() -> None:
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib.figure import Figure

    plant = Plant()
    controller = ef.SharpnessController(plant.op, plant.opt, 8.0)
    controller.step()
    ax = controller.plot(Figure().subplots())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "sharpness",
        "edge",
        "target, 10%",
    ]
