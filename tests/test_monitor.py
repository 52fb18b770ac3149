"""The monitor: accurate with few products, its logs, and its actions at the edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter import curvature, filters
from eigenfilter.curvature.operators.preconditioned import PreconditionedOperator
from trained import Trained


def test_three_products_a_check_are_right_to_a_thousandth() -> None:
    task = Trained()
    opt = ef.USAM(task.model.parameters(), lr=0.3, momentum=0.5, rho=0.05)
    exact = []
    monitor = ef.SharpnessMonitor(
        task.op, opt, every=2, callback=lambda check: exact.append(task.sharpness())
    )
    task.train(opt, monitor, 200)
    assert [c.step for c in monitor.history] == list(range(2, 201, 2))
    later = monitor.history[1:]
    assert sum(c.matvecs <= 3 for c in later) >= 0.9 * len(later)
    for check, value in zip(monitor.history, exact, strict=True):
        assert check.sharpness == pytest.approx(value, rel=1e-3)
    assert exact[-1] != pytest.approx(exact[0], rel=0.05)  # there was something to follow
    expected = filters.USAM(0.3, 0.5, rho=0.05).max_eigenvalue()
    assert {c.edge for c in monitor.history} == {expected}


def test_it_follows_the_edge_when_hyperparameters_change() -> None:
    task = Trained()
    opt = ef.SGD(task.model.parameters(), lr=0.1)
    monitor = ef.SharpnessMonitor(task.op, opt)
    before = monitor.check().edge
    opt.param_groups[0]["lr"] = 0.05
    assert monitor.check().edge == pytest.approx(2 * before)


@pytest.mark.parametrize("cls", [ef.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("rho", [0.0, 0.03])
def test_adamw_is_measured_in_its_preconditioned_matrix(cls: Any, rho: float) -> None:
    if rho and cls is not ef.AdamW:
        pytest.skip("torch's has no ascent")
    task = Trained()
    options = {"rho": rho} if rho else {}
    opt = cls(task.model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-4, **options)
    monitor = ef.SharpnessMonitor(task.op, opt, every=10, tol=1e-8)
    task.train(opt, monitor, 20)
    H = task.op.matmat(torch.eye(task.op.shape[0], dtype=torch.float64))
    H = H + rho * H @ H
    corrected = [
        opt.state[p]["exp_avg_sq"].flatten() / (1 - 0.95 ** float(opt.state[p]["step"]))
        for p in task.model.parameters()
    ]
    P = torch.cat(corrected).sqrt() + 1e-4
    exact = torch.linalg.eigvalsh(H / P.sqrt() / P.sqrt()[:, None])[-1]
    check = monitor.history[-1]
    assert check.sharpness == pytest.approx(exact.item(), rel=1e-6)
    assert check.edge == filters.AdamW(1e-2, 0.8, 0.01).max_eigenvalue()
    assert check.matvecs % (2 if rho else 1) == 0


def test_without_a_filter_there_is_no_edge() -> None:
    task = Trained()
    params = list(task.model.parameters())
    for opt in (
        ef.SAM(params, lr=0.1),
        torch.optim.RMSprop(params),
        ef.AdamW(params),  # before its first step there is no preconditioner
        ef.SGD([{"params": params[:1], "maximize": True}, {"params": params[1:]}], lr=0.1),
    ):
        check = ef.SharpnessMonitor(task.op, opt, on_edge="warn").check()
        assert check.edge is None
        assert not check.past_edge
        assert check.sharpness == pytest.approx(task.sharpness(), rel=1e-3)


def test_groups_that_differ_have_an_edge_together() -> None:
    task = Trained()
    first, *rest = task.model.parameters()
    opt = ef.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "momentum": 0.5}], lr=0.9)
    monitor = ef.SharpnessMonitor(task.op, opt, tol=1e-8, on_edge="lower_lr")
    rates = torch.cat([torch.full((first.numel(),), 0.1), torch.full((51,), 0.9 / 1.5)]).double()
    H = task.op.matmat(torch.eye(task.op.shape[0], dtype=torch.float64))
    exact = torch.linalg.eigvalsh(rates.sqrt()[:, None] * H * rates.sqrt())[-1].item()
    check = monitor.check()
    assert check.edge == 2.0
    assert check.sharpness == pytest.approx(exact, rel=1e-6)
    factor = 4.0 / exact
    for group in opt.param_groups:
        group["lr"] *= factor
    assert monitor.check().past_edge
    after = [group["lr"] for group in opt.param_groups]
    assert after == pytest.approx([lr * 2 / 1.05 / exact for lr in (0.1, 0.9)], rel=1e-3)
    assert not monitor.check().past_edge


def test_maximizing_has_the_edge_of_the_negated_loss() -> None:
    task = Trained()
    opt = ef.USAM(task.model.parameters(), lr=0.1, rho=0.05, maximize=True)
    check = ef.SharpnessMonitor(task.op, opt, tol=1e-8).check()
    H = task.op.matmat(torch.eye(task.op.shape[0], dtype=torch.float64))
    assert check.sharpness == pytest.approx(-torch.linalg.eigvalsh(H)[0].item(), rel=1e-6)
    assert check.edge == filters.USAM(0.1, rho=0.05).max_eigenvalue()


def past_the_edge(on_edge: Any, **options: Any) -> tuple[ef.SharpnessMonitor, Any]:
    """A monitor of a model that is sharper than its optimizer admits."""
    task = Trained()
    lr = filters.design("usam", 0.5 * task.sharpness(), rho=0.05, momentum=0.5)
    opt = ef.USAM(task.model.parameters(), lr=lr, momentum=0.5, rho=0.05)
    return ef.SharpnessMonitor(task.op, opt, on_edge=on_edge, **options), opt


def test_it_warns_past_the_edge() -> None:
    monitor, _ = past_the_edge("warn")
    with pytest.warns(UserWarning, match="past the edge"):
        monitor.step()


def test_it_lowers_the_lr_to_where_the_edge_is_above() -> None:
    monitor, opt = past_the_edge("lower_lr")
    check = monitor.check()
    [flt] = filters.of(opt)
    assert flt.max_eigenvalue() == pytest.approx(1.05 * check.sharpness)


def test_it_lowers_adamws_lr() -> None:
    task = Trained()
    opt = ef.AdamW(task.model.parameters(), lr=1e-3, weight_decay=0.01)
    task.train(opt, ef.SharpnessMonitor(task.op, opt, every=2), 1)
    opt.param_groups[0]["lr"] = 100.0
    monitor = ef.SharpnessMonitor(task.op, opt, on_edge="lower_lr")
    check = monitor.check()
    [flt] = filters.of(opt)
    assert check.past_edge
    assert flt.max_eigenvalue() == pytest.approx(1.05 * check.sharpness)


@pytest.mark.parametrize("build", [ef.SGD, ef.AdamW])
def test_it_lowers_lr_and_extrapolation_alike(build: Any) -> None:
    """Or an edge that the extrapolation puts would hardly rise."""
    task = Trained()
    options = {"momentum": 0.5} if build is ef.SGD else {}
    opt = build(task.model.parameters(), lr=1e-3, weight_decay=0.01, extrapolation=2e-3, **options)
    task.train(opt, ef.SharpnessMonitor(task.op, opt, every=2), 1)
    [group] = opt.param_groups
    group.update(lr=100.0, extrapolation=200.0)
    monitor = ef.SharpnessMonitor(task.op, opt, on_edge="lower_lr")
    check = monitor.check()
    [flt] = filters.of(opt)
    assert check.past_edge
    assert flt.max_eigenvalue() == pytest.approx(1.05 * check.sharpness)
    assert group["extrapolation"] == pytest.approx(2 * group["lr"])
    assert not monitor.check().past_edge


@pytest.mark.parametrize("cls", [ef.USAM, ef.TwoStepUSAM, ef.HessianUSAM])
def test_it_raises_rho_to_where_the_edge_is_lower(cls: Any) -> None:
    task = Trained()
    opt = cls(task.model.parameters(), lr=4 / task.sharpness(), rho=0.01)
    monitor = ef.SharpnessMonitor(task.op, opt, on_edge="raise_rho")
    check = monitor.check()
    [flt] = filters.of(opt)
    assert opt.param_groups[0]["rho"] > 0.01
    assert flt.max_eigenvalue() == pytest.approx(check.edge / 1.05)


def test_it_raises_no_rho_that_follows_lr() -> None:
    task = Trained()
    opt = ef.USAM(task.model.parameters(), lr=4 / task.sharpness(), rho=0.01)
    monitor = ef.SharpnessMonitor(task.op, opt, on_edge="raise_rho")
    ef.schedulers.RhoScheduler(opt, "lr")
    with pytest.raises(ValueError, match="computes from lr at every step"):
        monitor.check()
    with pytest.raises(ValueError, match="computes from lr at every step"):
        ef.SharpnessMonitor(task.op, opt, on_edge="raise_rho")


def test_it_calls_a_callable() -> None:
    seen = []
    monitor, _ = past_the_edge(seen.append)
    check = monitor.check()
    assert seen == [check]


def test_below_the_edge_nothing_is_done() -> None:
    task = Trained()
    opt = ef.SGD(task.model.parameters(), lr=1e-3)
    monitor = ef.SharpnessMonitor(task.op, opt, on_edge="lower_lr")
    assert not monitor.check().past_edge
    assert opt.param_groups[0]["lr"] == 1e-3


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def test_logs(tmp_path: Path) -> None:
    task = Trained()
    opt = ef.SGD(task.model.parameters(), lr=0.1)
    log, writer = tmp_path / "sharpness.jsonl", Writer()
    monitor = ef.SharpnessMonitor(task.op, opt, every=3, log=log, writer=writer)
    task.train(opt, monitor, 7)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert [line["sharpness"] for line in lines] == [c.sharpness for c in monitor.history]
    assert [tag for tag, _, _ in writer.scalars] == ["sharpness", "edge"] * 2
    assert [step for _, _, step in writer.scalars] == [3, 3, 6, 6]


def test_a_loaded_state_continues_bit_for_bit() -> None:
    task = Trained()
    opt = ef.SGD(task.model.parameters(), lr=0.1)
    first = ef.SharpnessMonitor(task.op, opt, every=3)
    task.train(opt, first, 4)
    second = ef.SharpnessMonitor(task.op, opt, every=3)
    second.load_state_dict(first.state_dict())
    task.train(opt, first, 2)
    assert [check.step for check in first.history] == [3, 6]
    assert second.step() is None
    check = second.step()
    assert check is not None
    assert (check.step, check.sharpness, check.residual, check.matvecs) == (
        6,
        first.history[1].sharpness,
        first.history[1].residual,
        first.history[1].matvecs,
    )
    cold = ef.SharpnessMonitor(task.op, opt).check()
    assert cold.matvecs > check.matvecs  # the vector was taken over


def test_a_state_of_another_model() -> None:
    task = Trained()
    monitor = ef.SharpnessMonitor(task.op, ef.SGD(task.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the state is of 5 parameters, and the operator has 147"):
        monitor.load_state_dict({"steps": 1, "vector": torch.ones(5)})


def test_a_plot() -> None:
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib.figure import Figure

    task = Trained()
    monitor = ef.SharpnessMonitor(task.op, ef.SAM(task.model.parameters(), lr=0.1))
    monitor.check()
    ax = monitor.plot(Figure().subplots())
    assert len(ax.lines) == 2


def test_a_perturbed_model_raises() -> None:
    task = Trained()
    opt = ef.USAM(task.model.parameters(), lr=0.1, rho=0.05)
    task.loss(task.model(task.x), task.y).backward()
    assert opt.ascend()
    with pytest.raises(RuntimeError, match="restore"):
        ef.SharpnessMonitor(task.op, opt).check()
    opt.restore()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "every"),
        ({"tol": 0.0}, "tol"),
        ({"on_edge": "stop"}, "on_edge"),
        ({"on_edge": "raise_rho"}, "raise_rho"),
    ],
)
def test_bad_arguments(options: dict, match: str) -> None:
    task = Trained()
    with pytest.raises(ValueError, match=match):
        ef.SharpnessMonitor(task.op, ef.SGD(task.model.parameters(), lr=0.1), **options)


def test_a_preconditioned_operator_checks_its_scale() -> None:
    task = Trained()
    n = task.op.shape[0]
    for scale in (torch.ones(n - 1).double(), torch.ones(n), torch.full((n,), torch.nan).double()):
        with pytest.raises(ValueError, match="scale"):
            PreconditionedOperator(task.op, scale)


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


@pytest.mark.parametrize("kind", [ef.SGD, ef.USAM, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize(
    ("params_of", "message"),
    [
        (
            lambda model: [nn.Parameter(torch.ones(2))],
            r"4 of the operator are not the optimizer's \(0\.weight, 0\.bias, 2\.weight, 2\.bias\);"
            r" 1 of the optimizer is not the operator's \(number 0 of group 0\)",
        ),
        (
            lambda model: model[0].parameters(),
            r"2 of the operator are not the optimizer's \(2\.weight, 2\.bias\)\. Make the",
        ),
        (
            lambda model: [*model.parameters(), nn.Parameter(torch.ones(2))],
            r"same parameters: 1 of the optimizer is not the operator's \(number 4 of group 0\)",
        ),
        (
            lambda model: [("mine", nn.Parameter(torch.ones(2))), *model.named_parameters()],
            r"1 of the optimizer is not the operator's \(mine\)",
        ),
        (
            lambda model: [{"params": [p], "lr": 0.1} for p in model[2].parameters()],
            r"2 of the operator are not the optimizer's \(0\.weight, 0\.bias\)",
        ),
    ],
)
def test_other_parameters_raise_at_construction(kind: Any, params_of: Any, message: str) -> None:
    task = Trained()
    opt = kind(params_of(task.model), lr=0.1)
    with pytest.raises(ValueError, match=message):
        ef.SharpnessMonitor(task.op, opt)


def test_parameters_of_the_loss_count() -> None:
    class Scaled(nn.MSELoss):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return self.scale * super().forward(output, target)

    task, loss = Trained(), Scaled()
    op = curvature.HessianOperator(task.model, loss, (task.x, task.y))
    with pytest.raises(ValueError, match=r"1 of the operator is not the optimizer's \(scale\)"):
        ef.SharpnessMonitor(op, ef.SGD(task.model.parameters(), lr=0.1))
    ef.SharpnessMonitor(op, ef.SGD([*task.model.parameters(), *loss.parameters()], lr=0.1))


def test_neither_order_nor_frozen_parameters_matter() -> None:
    task = Trained()
    task.model[0].bias.requires_grad_(False)
    task.op = curvature.HessianOperator(task.model, task.loss, (task.x, task.y))
    opt = ef.SGD(reversed(list(task.model.parameters())), lr=0.1)
    assert ef.SharpnessMonitor(task.op, opt, tol=1e-8).check().sharpness == pytest.approx(
        task.sharpness()
    )


def test_parameters_that_are_added_or_removed_later_raise() -> None:
    task = Trained()
    opt = ef.SGD(task.model.parameters(), lr=0.1)
    monitor = ef.SharpnessMonitor(task.op, opt)
    monitor.check()
    task.model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 of the operator .*\(0\.bias\)"):
        monitor.check()
    task.model[0].bias.requires_grad_(True)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match=r"1 of the optimizer .*\(number 0 of group 1\)"):
        monitor.check()
    assert len(monitor.history) == 1


def test_a_subset_is_watched_by_its_own_operator() -> None:
    task = Trained()
    last = list(task.model[2].parameters())
    op = curvature.HessianOperator(task.model, task.loss, (task.x, task.y), params=last)
    assert ef.SharpnessMonitor(op, ef.SGD(last, lr=0.1)).check().sharpness > 0
