"""ignite's trainer against USAM in plain torch."""

from __future__ import annotations

import copy
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from pages import ROOT, run_page
from plain_usam import (
    LR,
    RHO,
    USAM,
    MeanLoss,
    PlainUSAM,
    WithModes,
    assert_same,
    make_batches,
    make_model,
)
from run_distributed import RunDistributed

pytest.importorskip("ignite")
import ignite.engine
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, EMAHandler, create_lr_scheduler_with_warmup
from ignite.handlers.param_scheduler import PiecewiseLinear

from eigenfilter.integrations.ignite import create_supervised_trainer

MSE = nn.functional.mse_loss
EPOCHS = 2


def by_hand(
    accumulation: int, max_norm: float | None = None, batches: int = 10
) -> tuple[nn.Module, list[float]]:
    """As many whole windows as all epochs together have."""
    model = make_model()
    plain = PlainUSAM(model, max_norm)
    torch.manual_seed(1)
    loader = make_batches(batches) * EPOCHS
    losses = []
    for start in range(0, len(loader) - accumulation + 1, accumulation):
        losses += plain.step(loader[start : start + accumulation])
    return model, losses


def run(model: nn.Module, opt: torch.optim.Optimizer, batches: int = 10, **kwargs: Any) -> Engine:
    trainer = create_supervised_trainer(model, opt, MSE, device="cpu", **kwargs)
    torch.manual_seed(1)
    trainer.run(make_batches(batches), max_epochs=EPOCHS)
    return trainer


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_is_usam(accumulation: int, max_norm: float | None, deterministic: bool) -> None:
    model, losses = make_model(), []
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(
        model,
        opt,
        MSE,
        device="cpu",
        deterministic=deterministic,
        gradient_accumulation_steps=accumulation,
        max_norm=max_norm,
    )
    fired = []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: fired.append(opt.perturbed))

    @trainer.on(Events.ITERATION_COMPLETED)
    def record(engine: Engine) -> None:
        fired.append(opt.perturbed)
        losses.append(engine.state.output)

    @trainer.on(Events.STARTED)
    def seed(engine: Engine) -> None:
        torch.manual_seed(1)

    if deterministic:  # which seeds each epoch itself: without dropout
        model[3].p = 0.0
    trainer.run(make_batches(10), max_epochs=EPOCHS)
    other = make_model()
    if deterministic:
        other[3].p = 0.0
    plain = PlainUSAM(other, max_norm)
    torch.manual_seed(1)
    loader, expected = make_batches(10) * EPOCHS, []
    for start in range(0, len(loader), accumulation):
        expected += plain.step(loader[start : start + accumulation])
    assert_same(model, other)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)
    assert fired == [False] * 2 * 10 * EPOCHS  # once an iteration, at x


def test_a_window_goes_on_in_the_next_epoch_and_an_incomplete_one_is_dropped() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = run(model, opt, batches=7, gradient_accumulation_steps=4)  # 4, 3 + 1, 4, and 2 left
    other, _ = by_hand(4, batches=7)
    weights = [name for name, _ in model.named_parameters()]
    for name in weights:
        expected = other.state_dict()[name]
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=1e-6)
    # Another run of the same trainer begins with a whole window.
    plain_batches = make_batches(4)
    trainer.state.max_epochs = None
    trainer.run(plain_batches, max_epochs=1)
    assert not opt.perturbed


def test_an_evaluation_in_the_middle_of_a_window_changes_nothing() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(
        model, opt, MSE, device="cpu", gradient_accumulation_steps=4
    )
    evaluator = ignite.engine.create_supervised_evaluator(model, device="cpu")
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=3), lambda e: evaluator.run(make_batches(2))
    )
    trainer.add_event_handler(Events.STARTED, lambda e: torch.manual_seed(1))
    trainer.run(make_batches(10), max_epochs=EPOCHS)
    assert_same(model, by_hand(4)[0])


def test_ema_sees_x() -> None:
    model, other = make_model(), make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(model, opt, MSE, device="cpu")
    handler = EMAHandler(model, momentum=0.3)
    handler.attach(trainer)
    trainer.add_event_handler(Events.STARTED, lambda e: torch.manual_seed(1))
    trainer.run(make_batches(10), max_epochs=1)
    averages = [p.detach().clone() for p in other.parameters()]
    plain = PlainUSAM(other)
    torch.manual_seed(1)
    for batch in make_batches(10):
        plain.step([batch])
        averages = [a.lerp(p, 0.3) for a, p in zip(averages, other.parameters(), strict=True)]
    torch.testing.assert_close(list(handler.ema_model.parameters()), averages, rtol=0, atol=1e-6)


def test_a_schedule_of_rho_that_begins_at_0() -> None:
    """It is set in every iteration; a step takes that of its last one."""
    model, other = make_model(), make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(
        model, opt, MSE, device="cpu", gradient_accumulation_steps=2
    )
    schedule = PiecewiseLinear(opt, "rho", milestones_values=[(0, 0.0), (10, 0.2)])
    trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
    trainer.add_event_handler(Events.STARTED, lambda e: torch.manual_seed(1))
    trainer.run(make_batches(10), max_epochs=1)
    plain = PlainUSAM(other)
    torch.manual_seed(1)
    for start in range(0, 10, 2):
        plain.rho = 0.02 * (start + 1)
        plain.step(make_batches(10)[start : start + 2])
    assert_same(model, other)


def test_parameter_schedulers_set_rho() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(model, opt, MSE, device="cpu")
    schedule = PiecewiseLinear(opt, "rho", milestones_values=[(0, 0.0), (5, RHO)])
    trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
    warmup = create_lr_scheduler_with_warmup(
        torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0), 0.01, 3
    )
    trainer.add_event_handler(Events.ITERATION_STARTED, warmup)
    rhos = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: rhos.append(opt.param_groups[0]["rho"])
    )
    trainer.run(make_batches(6), max_epochs=1)
    torch.testing.assert_close(rhos, [0.0, *(RHO * i / 5 for i in range(1, 6))])


def test_a_run_goes_on_from_a_checkpoint() -> None:
    model = make_model()
    model[3].p = 0.0
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(
        model, opt, MSE, device="cpu", gradient_accumulation_steps=2
    )
    trainer.run(make_batches(10), max_epochs=1)
    parts = {"model": model, "optimizer": opt, "trainer": trainer}
    saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    again = make_model(seed=3)
    again[3].p = 0.0
    other = ef.USAM(again.parameters(), **USAM)
    resumed = create_supervised_trainer(
        again, other, MSE, device="cpu", gradient_accumulation_steps=2
    )
    Checkpoint.load_objects({"model": again, "optimizer": other, "trainer": resumed}, saved)
    resumed.run(make_batches(10), max_epochs=2)
    trainer.run(make_batches(10), max_epochs=2)
    assert_same(again, model)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_buffers_of_a_loss_are_those_of_x(accumulation: int) -> None:
    model, loss_fn = make_model(), MeanLoss()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(
        model, opt, loss_fn, "cpu", gradient_accumulation_steps=accumulation
    )
    torch.manual_seed(1)
    trainer.run(make_batches(10), max_epochs=EPOCHS)
    other, losses = by_hand(accumulation)
    loss_fn.assert_saw(losses)
    assert_same(model, other)


def test_buffers_of_transforms_are_those_of_x() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, *args: Any) -> Any:
            self.calls += 1
            return args[0](args[1]) if len(args) > 1 else args[0]

    model, transform, model_fn = make_model(), Counts(), Counts()
    opt = ef.USAM(model.parameters(), **USAM)
    run(model, opt, model_transform=transform, model_fn=model_fn)
    assert transform.calls == model_fn.calls == 10 * EPOCHS


@pytest.mark.parametrize("amp_mode", [None, "amp"])
@pytest.mark.parametrize("outer", [False, True])
def test_autocast_around_a_run(outer: bool, amp_mode: str | None) -> None:
    model, seen = make_model().float(), []
    model.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    opt = ef.USAM(model.parameters(), **USAM)
    batches = [(x.float(), y.float()) for x, y in make_batches(4)]
    options = {"amp_mode": amp_mode, "gradient_accumulation_steps": 2}
    trainer = create_supervised_trainer(
        model, opt, lambda y_pred, y: MSE(y_pred.float(), y), "cpu", **options
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        trainer.run(batches, max_epochs=1)
    is_cast = outer or amp_mode == "amp"
    assert seen == [torch.bfloat16 if is_cast else torch.float32] * 8  # at x and at y


def test_the_modes_of_a_schedule_free_optimizer() -> None:
    model = make_model()
    opt = WithModes(model.parameters(), **USAM)
    trainer = create_supervised_trainer(model, opt, MSE, device="cpu")
    modes = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: modes.append(opt.calls[-1]))
    trainer.run(make_batches(3), max_epochs=EPOCHS)
    assert modes == ["eval"] * EPOCHS
    assert opt.calls == ["train", "train", "train", "eval"] * EPOCHS


def test_outputs_and_transforms() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    seen = []

    def transform(x: Tensor, y: Tensor, y_pred: Tensor, loss: Tensor) -> Tensor:
        seen.append((y_pred, loss, opt.perturbed))
        return loss

    trainer = run(
        model,
        opt,
        batches=4,
        output_transform=transform,
        model_transform=lambda output: 2 * output,
        model_fn=lambda model, x: model(x) + 1,
        gradient_accumulation_steps=2,
    )
    y_pred, loss, _ = seen[-1]
    torch.testing.assert_close(MSE(y_pred, make_batches(4)[-1][1]), loss)
    assert trainer.state.output is loss
    assert not any(perturbed for *_, perturbed in seen)


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_a_loss_scale_changes_nothing(max_norm: float | None) -> None:
    """Autocast rounds to bfloat16, on a window and with a scale alike."""
    models = []
    for scaler in (False, torch.amp.GradScaler("cpu")):
        model = make_model().float()
        opt = ef.USAM(model.parameters(), **USAM)
        options = {"amp_mode": "amp", "scaler": scaler, "gradient_accumulation_steps": 2}

        def loss_fn(y_pred: Tensor, y: Tensor) -> Tensor:
            return MSE(y_pred.float(), y.float())

        def prepare(batch: Any, device: Any, non_blocking: bool) -> Any:
            return tuple(t.float() for t in batch)

        trainer = create_supervised_trainer(
            model, opt, loss_fn, "cpu", prepare_batch=prepare, max_norm=max_norm, **options
        )
        torch.manual_seed(1)
        trainer.run(make_batches(4), max_epochs=1)
        assert opt.skipped == 0
        models.append(model.double())
    assert_same(*models)


def test_a_step_that_overflows_is_skipped() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(
        model,
        opt,
        lambda y_pred, y: MSE(y_pred.double(), y) * float("inf"),
        "cpu",
        amp_mode="amp",
        scaler=True,
        prepare_batch=lambda batch, **_: (batch[0], batch[1]),
        model_fn=lambda model, x: model.float()(x.float()),
    )
    model.float()
    before = [p.detach().clone() for p in model.parameters()]
    scale = trainer.state.scaler.get_scale()
    trainer.run(make_batches(2), max_epochs=1)
    assert opt.skipped == 2
    assert all(map(torch.equal, before, model.parameters()))
    assert trainer.state.scaler.get_scale() == scale / 4


def test_an_optimizer_of_torch_steps_as_with_ignites_trainer() -> None:
    models = make_model(), make_model()
    factories = create_supervised_trainer, ignite.engine.create_supervised_trainer
    for model, factory in zip(models, factories, strict=True):
        opt = torch.optim.SGD(model.parameters(), lr=LR)
        trainer = factory(model, opt, MSE, device="cpu", gradient_accumulation_steps=4)
        trainer.add_event_handler(Events.STARTED, lambda e: torch.manual_seed(1))
        trainer.run(make_batches(8), max_epochs=2)
    assert_same(*models)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"amp_mode": "apex"}, "amp_mode is 'apex'"),
        ({"scaler": True}, "a scaler needs amp_mode"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=message):
        create_supervised_trainer(model, ef.USAM(model.parameters()), MSE, "cpu", **options)


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_released_gradients_are_refused(rho: float) -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), rho=rho, release_gradients=True)
    with pytest.raises(ValueError, match="release_gradients=True applies each gradient"):
        create_supervised_trainer(model, opt, MSE, "cpu", max_norm=0.05)


def test_a_clipping_that_fails_leaves_x() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(model, opt, MSE, device="cpu", max_norm="large")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="could not convert string to float"):
        trainer.run(make_batches(1), max_epochs=1)
    assert not opt.perturbed
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_model_may_change_its_batch(kind: Any) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def forward(self, batch: Any) -> Tensor:
            batch["x"] = batch["x"].add_(batch.pop("noise"))
            return self.net(batch["x"])

    model, other = Takes(), make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    trainer = create_supervised_trainer(
        model, opt, MSE, device="cpu", prepare_batch=lambda batch, **_: batch
    )
    x, y = make_batches(1)[0]
    torch.manual_seed(1)
    trainer.run([(kind(x=x.clone(), noise=torch.ones_like(x)), y)], max_epochs=1)
    torch.manual_seed(1)
    PlainUSAM(other).step([(x + 1, y)])
    assert_same(model.net, other)


def without_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def train_on_rank(rank: int, accumulation: int, is_local: bool) -> list[Tensor]:
    model = without_statistics()
    ddp = nn.parallel.DistributedDataParallel(model)
    opt = ef.USAM(model.parameters(), **USAM)
    if is_local:
        ef.ascent_sync(ddp, opt, enabled=False)
    trainer = create_supervised_trainer(
        ddp, opt, MSE, "cpu", gradient_accumulation_steps=accumulation, max_norm=0.05
    )
    trainer.run(make_batches(16)[rank::2], max_epochs=1)
    return [p.detach() for p in model.parameters()]


@pytest.mark.distributed
@pytest.mark.parametrize("is_local", [False, True], ids=["synchronized", "local ascents"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes(run_distributed: RunDistributed, accumulation: int, is_local: bool) -> None:
    model = without_statistics()
    plain = PlainUSAM(model, 0.05, replicas=2 if is_local else 1)
    for start in range(0, 16, 2 * accumulation):
        plain.step(make_batches(16)[start : start + 2 * accumulation])
    for weights in run_distributed(train_on_rank, 2, accumulation, is_local):
        torch.testing.assert_close(weights, list(model.parameters()), rtol=0, atol=1e-6)


def test_the_page_runs(tmp_path: Path) -> None:
    assert "epoch 3, accuracy" in run_page(ROOT / "docs/integrations/ignite.md", tmp_path)
