"""fastai's Learner against USAM in plain torch."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from pages import ROOT, run_page
from plain_usam import (
    LR,
    MOMENTUM,
    RHO,
    WEIGHT_DECAY,
    Batch,
    MeanLoss,
    PlainUSAM,
    WithModes,
    assert_same,
    make_batches,
    make_model,
)

pytest.importorskip("fastai")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of fastai's imports
    import fastai.callback.fp16
    from fastai.callback.core import (
        Callback,
        CancelBackwardException,
        CancelBatchException,
        CancelEpochException,
        CancelFitException,
    )
    from fastai.callback.fp16 import MixedPrecision
    from fastai.callback.mixup import MixUp
    from fastai.callback.rnn import ModelResetter
    from fastai.callback.schedule import ParamScheduler, SchedLin
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.losses import BaseLoss, CrossEntropyLossFlat
    from fastai.optimizer import OptimWrapper

    from eigenfilter.integrations.fastai import SharpnessAwareCallback

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:fast.*")

SIZE, COUNT, EPOCHS = 6, 10, 2


def MSE(pred: Tensor, y: Tensor) -> Tensor:
    """In float32 at the end, which fastai's Recorder wants; gradients are float64."""
    return nn.functional.mse_loss(pred, y).float()


def loaders(batches: list[Batch]) -> Any:
    samples = [(x[i], y[i]) for x, y in batches for i in range(len(x))]
    return DataLoaders(*(DataLoader(samples, bs=SIZE, num_workers=0) for _ in range(2)))


def make_learner(
    model: nn.Module, *cbs: Any, loss_func: Any = MSE, optimizer: Any = ef.USAM, count: int = COUNT
) -> Any:
    opt_func = functools.partial(OptimWrapper, opt=optimizer, momentum=MOMENTUM, rho=RHO)
    learn = Learner(
        loaders(make_batches(count)),
        model,
        loss_func=loss_func,
        opt_func=opt_func,
        lr=LR,
        wd=WEIGHT_DECAY,
        cbs=[SharpnessAwareCallback(), *cbs],
        train_bn=False,
    )
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
    return learn


class Watch(Callback):
    """What callbacks see: the losses, and whether the weights are x."""

    order = 99

    def __init__(self) -> None:
        self.seen: list[float] = []

    def before_fit(self) -> None:
        torch.manual_seed(1)

    def after_batch(self) -> None:
        if self.training:
            assert not self.opt.opt.perturbed
            self.seen.append(self.learn.loss.item())


def fit(learn: Any, epochs: int = EPOCHS) -> Any:
    watch = Watch()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(watch):
        learn.fit(epochs)
    return watch


def by_hand(
    accumulation: int, max_norm: float | None = None, count: int = COUNT
) -> tuple[nn.Module, list[float]]:
    """Windows go on over the end of an epoch; an incomplete one at the end is dropped."""
    model = make_model()
    model[3].p = 0.0  # fastai's loaders draw from torch's generator
    plain = PlainUSAM(model, max_norm)
    batches, losses = make_batches(count) * EPOCHS, []
    for start in range(0, len(batches) - accumulation + 1, accumulation):
        losses += plain.step(batches[start : start + accumulation])
    return model, losses


def without_dropout() -> nn.Module:
    model = make_model()
    model[3].p = 0.0
    return model


def callbacks(accumulation: int, max_norm: float | None) -> list[Any]:
    result = [GradientAccumulation(accumulation * SIZE)] if accumulation > 1 else []
    return result + ([GradientClip(max_norm)] if max_norm is not None else [])


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_run_is_usam(accumulation: int, max_norm: float | None) -> None:
    model = without_dropout()
    watch = fit(make_learner(model, *callbacks(accumulation, max_norm)))
    other, losses = by_hand(accumulation, max_norm)
    assert_same(model, other)
    torch.testing.assert_close(watch.seen, losses, rtol=1e-6, atol=0)


def test_an_incomplete_step_of_a_fit_does_not_enter_the_next() -> None:
    model = without_dropout()
    learn = make_learner(model, GradientAccumulation(4 * SIZE), count=5)
    fit(learn, 1)
    fit(learn, 1)
    other = without_dropout()
    plain = PlainUSAM(other)
    for _ in range(2):
        plain.step(make_batches(5)[:4])
        other(make_batches(5)[4][0])  # its running statistics
    assert_same(model, other)


class Amp(MixedPrecision):
    """fastai's callback on the CPU, where the loss scale matters and autocast is bfloat16's."""

    def __init__(self, scale: float, enabled: bool = True) -> None:
        super().__init__()
        self.init_scale, self.scales_loss = scale, enabled

    def before_fit(self) -> None:
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale, enabled=self.scales_loss)
        self.learn.scaler = scaler
        self.scales = []


def mse_in_float32(pred: Tensor, y: Tensor) -> Tensor:
    return MSE(pred.float(), y.float())


class ToFloat32(Callback):
    def before_batch(self) -> None:
        self.learn.xb = tuple(x.float() for x in self.xb)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_a_loss_scale_changes_nothing(accumulation: int, max_norm: float | None) -> None:
    models = []
    for enabled in (False, True):
        model = without_dropout().float()
        amp = Amp(2.0**12, enabled)
        cbs = [ToFloat32(), amp, *callbacks(accumulation, max_norm)]
        learn = make_learner(model, *cbs, loss_func=mse_in_float32)
        fit(learn)
        assert learn.opt.opt.skipped == 0
        assert "found_inf" not in vars(learn.opt.opt)
        models.append(model.double())
    assert_same(*models)


def test_a_step_that_overflows_is_skipped() -> None:
    model = without_dropout().float()
    scales = []

    class RecordScale(Callback):
        def after_batch(self) -> None:
            if self.training:
                scales.append(self.learn.scaler.get_scale())

    def infinite(pred: Tensor, y: Tensor) -> Tensor:
        return mse_in_float32(pred, y) * float("inf")

    learn = make_learner(model, ToFloat32(), Amp(8.0), RecordScale(), loss_func=infinite, count=3)
    before = [p.detach().clone() for p in model.parameters()]
    fit(learn, 1)
    assert all(map(torch.equal, before, model.parameters()))
    assert scales == [4.0, 2.0, 1.0]


def test_mixtures_are_those_of_their_batches() -> None:
    """Each micro-batch has its own mixture, which MixUp keeps for the newest only."""
    batches = [(x.float(), (y[:, 0] > 0).long()) for x, y in make_batches(4)]
    model = without_dropout().float()
    mixed: list[Any] = []

    class Record(Callback):
        order = 1

        def before_batch(self) -> None:
            if self.training:
                mix = self.learn.mix_up
                mixed.append((self.xb[0], mix.yb1[0], self.yb[0], mix.lam.squeeze()))

    learn = make_learner(
        model,
        MixUp(0.4),
        Record(),
        GradientAccumulation(2 * SIZE),
        loss_func=CrossEntropyLossFlat(),
    )
    learn.dls = loaders(batches)
    fit(learn, 1)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        x, first, second, lam = batch
        each = functools.partial(nn.functional.cross_entropy, model(x), reduction="none")
        return torch.lerp(each(first), each(second), lam).mean()

    other = without_dropout().float()
    plain = PlainUSAM(other, loss_of=loss_of)
    for start in (0, 2):
        plain.step(mixed[start : start + 2])
    assert_same(model.double(), other.double())


@pytest.mark.parametrize("event", ["before_step", "after_loss"])
def test_a_canceled_batch_leaves_x(event: str) -> None:
    def cancel(self: Callback) -> None:
        if self.training:
            raise CancelBatchException

    Cancel = type("Cancel", (Callback,), {event: cancel, "order": 50})
    model = without_dropout()
    learn = make_learner(model, Cancel())
    before = [p.detach().clone() for p in model.parameters()]
    fit(learn, 1)
    assert not learn.opt.opt.perturbed
    assert all(map(torch.equal, before, model.parameters()))


EVENTS = ["before_batch", "after_pred", "after_loss", "before_backward"]


@pytest.mark.parametrize("order", [-5, 60])
@pytest.mark.parametrize("event", [*EVENTS, "cancel_backward"])
def test_a_canceled_batch_is_in_no_gradient(event: str, order: int) -> None:
    """Neither in that at x nor in that at y, and the others of its step are."""

    def cancel(self: Callback) -> None:
        if self.training and self.iter == 1:
            raise CancelBackwardException if event == "cancel_backward" else CancelBatchException

    name = "before_backward" if event == "cancel_backward" else event
    Cancel = type("Cancel", (Callback,), {name: cancel, "order": order})
    model = without_dropout()
    # Of 3 batches a step; fastai counts one whose backward is canceled, and none that it cancels.
    cbs = [Cancel(), GradientAccumulation(3 * SIZE)]
    fit(make_learner(model, *cbs, count=6 if event == "cancel_backward" else 4), 1)

    other, batches = without_dropout(), make_batches(6)
    plain = PlainUSAM(other)
    if event == "cancel_backward":
        plain.step([batches[0], batches[2]], 1 / 3)
        plain.step(batches[3:6], 1 / 3)
    else:
        plain.step([batches[0], batches[2], batches[3]], 1 / 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_step_whose_backward_was_canceled_changes_nothing() -> None:
    def before_backward(self: Callback) -> None:
        raise CancelBackwardException

    Cancel = type("Cancel", (Callback,), {"before_backward": before_backward})
    model = without_dropout()
    before = [p.detach().clone() for p in model.parameters()]
    fit(make_learner(model, Cancel()), 1)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("order", [-5, 9, 60])
@pytest.mark.parametrize("event", ["before_batch", "after_pred"])
def test_what_callbacks_do_to_a_batch_is_done_at_all_weights(event: str, order: int) -> None:
    def change(self: Callback) -> None:
        if event == "before_batch":
            self.learn.xb = tuple(torch.sin(x + self.iter) for x in self.xb)
        else:
            self.learn.pred = self.pred + self.iter

    Change = type("Change", (Callback,), {event: change, "order": order, "run_valid": False})
    model, other = without_dropout(), without_dropout()
    fit(make_learner(model, Change(), GradientAccumulation(2 * SIZE), count=4), 1)

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        i, x, y = batch
        pred = model(torch.sin(x + i)) if event == "before_batch" else model(x) + i
        return nn.functional.mse_loss(pred, y)

    plain = PlainUSAM(other, loss_of=loss_of)
    batches = [(i, x, y) for i, (x, y) in enumerate(make_batches(4))]
    plain.step(batches[:2])
    plain.step(batches[2:])
    assert_same(model, other)


def test_a_fit_leaves_the_learner_as_it_was() -> None:
    learn = make_learner(without_dropout())
    before = set(vars(learn))
    fit(learn, 1)
    assert not {"_do_one_batch", "_backward"} & set(vars(learn)) - before


def test_a_batch_that_is_canceled_at_y_leaves_no_gradient() -> None:
    """The next step has its own gradients only."""
    losses = []

    def after_loss(self: Callback) -> None:
        if self.training:
            losses.append(self.learn.loss)
            if len(losses) == 4:  # the second batch of the first step, at y
                raise CancelBatchException

    Cancel = type("Cancel", (Callback,), {"after_loss": after_loss, "order": 60})
    model, other = without_dropout(), without_dropout()
    fit(make_learner(model, Cancel(), GradientAccumulation(2 * SIZE), count=4), 1)
    plain = PlainUSAM(other)
    plain.step(make_batches(4)[2:])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError, KeyboardInterrupt, CancelFitException, CancelEpochException]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_callback_that_fails_before_the_step_leaves_x(
    error: type[BaseException], accumulation: int
) -> None:
    def fail(self: Callback) -> None:
        assert self.opt.opt.perturbed
        raise error("in the middle of a step")

    Fails = type("Fails", (Callback,), {"before_step": fail, "order": 50})
    model = without_dropout()
    failing = Fails()
    learn = make_learner(model, failing, *callbacks(accumulation, None))
    before = [p.detach().clone() for p in model.parameters()]
    is_canceled = error in (CancelFitException, CancelEpochException)
    with nullcontext() if is_canceled else pytest.raises(error):
        fit(learn, 1)
    assert not learn.opt.opt.perturbed
    assert all(map(torch.equal, before, model.parameters()))
    # The learner goes on to train, and no method of it stays overridden.
    learn.remove_cb(failing)
    fit(learn, 1)
    assert not torch.equal(before[0], model[0].weight)
    assert "_do_grad_opt" not in vars(learn)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_schedule_of_rho_that_begins_at_0(accumulation: int) -> None:
    """fastai sets it for every batch; a step takes that of its last one."""
    model, other = without_dropout(), without_dropout()
    schedule = ParamScheduler({"rho": SchedLin(0.0, 0.2)})
    fit(make_learner(model, schedule, *callbacks(accumulation, None)), 1)
    plain = PlainUSAM(other)
    batches = make_batches(COUNT)
    for start in range(0, COUNT, accumulation):
        plain.rho = 0.2 * (start + accumulation - 1) / COUNT
        plain.step(batches[start : start + accumulation])
    assert_same(model, other)


def test_one_cycle_and_a_schedule_of_rho() -> None:
    model = without_dropout()
    seen = []

    class Record(Callback):
        def after_step(self) -> None:
            group = self.opt.opt.param_groups[0]
            seen.append((group["rho"], group["momentum"]))

    learn = make_learner(model, Record())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.1, cbs=ParamScheduler({"rho": SchedLin(0.0, 0.2)}))
    rhos, momenta = zip(*seen, strict=True)
    torch.testing.assert_close(list(rhos), [0.02 * i for i in range(COUNT)])
    assert max(momenta) == pytest.approx(0.95)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("wraps", [False, True])
def test_buffers_of_a_loss_are_those_of_x(wraps: bool, accumulation: int) -> None:
    """Of a module, and of a module in fastai's wrapper of losses."""

    class Rounded(MeanLoss):
        """Rounds as the reference does, for fastai's Recorder."""

        def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
            return super().forward(y_pred, y).float()

    if wraps:
        loss_func: Any = BaseLoss(Rounded, flatten=False)
        counting = loss_func.func
    else:
        loss_func = counting = Rounded()
    learn = make_learner(without_dropout(), *callbacks(accumulation, None), loss_func=loss_func)
    fit(learn)
    model, losses = by_hand(accumulation)
    counting.assert_saw(losses)
    assert_same(learn.model, model)


def test_the_modes_of_a_schedule_free_optimizer() -> None:
    learn = make_learner(without_dropout(), optimizer=WithModes)
    fit(learn)
    assert learn.opt.opt.calls == ["train", "eval"] * EPOCHS


def test_a_run_goes_on_from_a_file(tmp_path: Path) -> None:
    learn = make_learner(without_dropout())
    fit(learn, 1)
    learn.save(tmp_path / "saved")
    again = make_learner(without_dropout())
    again.create_opt()
    again.load(tmp_path / "saved")
    fit(again, 1)
    assert_same(again.model, by_hand(1)[0])


def test_without_the_callback_the_step_is_refused() -> None:
    learn = make_learner(without_dropout())
    learn.remove_cb(SharpnessAwareCallback)
    with pytest.raises(RuntimeError, match="needs 1 ascents before it"):
        fit(learn, 1)


def test_another_optimizer_is_refused() -> None:
    learn = make_learner(
        without_dropout(), optimizer=lambda params, lr, **_: torch.optim.SGD(params, lr)
    )
    with pytest.raises(TypeError, match="needs an optimizer of this library"):
        fit(learn, 1)


def test_exact_products_are_refused() -> None:
    optimizer = functools.partial(ef.HessianUSAM, hvp="autograd")
    learn = make_learner(without_dropout(), optimizer=optimizer)
    with pytest.raises(ValueError, match="without create_graph"):
        fit(learn, 1)


def test_released_gradients_are_refused() -> None:
    learn = make_learner(
        without_dropout(), optimizer=functools.partial(ef.USAM, release_gradients=True)
    )
    with pytest.raises(ValueError, match="release_gradients=True applies each gradient"):
        fit(learn, 1)


@pytest.mark.parametrize("name", ["ModelResetter", "NonNativeMixedPrecision"])
def test_callbacks_that_are_refused(name: str) -> None:
    cls = ModelResetter if name == "ModelResetter" else fastai.callback.fp16.NonNativeMixedPrecision
    callback = cls.__new__(cls)
    for event in ("before_fit", "before_train", "after_fit"):  # ours alone is tested
        setattr(callback, event, lambda: None)
    learn = make_learner(without_dropout(), callback)
    with pytest.raises(ValueError, match=name):
        fit(learn, 1)


def test_a_loss_may_change_its_batch() -> None:
    ends = []
    for loss_func in (lambda pred, y: MSE(pred, y.mul_(2)), lambda pred, y: MSE(pred, 2 * y)):
        learn = make_learner(without_dropout(), loss_func=loss_func)
        fit(learn, 1)
        ends.append(list(learn.model.parameters()))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_the_page_runs(tmp_path: Path) -> None:
    assert "accuracy" in run_page(ROOT / "docs/integrations/fastai.md", tmp_path)
