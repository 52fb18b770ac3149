"""What Lightning's hooks, loggers, checkpoints and averages see with the callback."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections import Counter, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

import eigenfilter as ef

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner import Tuner
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from eigenfilter.integrations.lightning import SharpnessAwareCallback
from integrations.lightning_problem import (
    Problem,
    batches,
    by_hand,
    distance,
    double,
    loader,
    trainer_of,
    windows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]

usam = functools.partial(ef.USAM, lr=0.1, momentum=0.9, rho=0.1)
STEPS = 2 * len(windows(batches(), 4))


def fit(module: Problem, *callbacks: Any, **options: Any) -> Any:
    trainer = trainer_of(*callbacks, **({"accumulate_grad_batches": 4} | options))
    trainer.fit(module, loader())
    return trainer


# Logging.


class Recorder(DummyLogger):
    """Keeps what is logged, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append(value)


def test_losses_are_logged_once_and_at_x() -> None:
    module, logger = Problem(usam), Recorder()
    losses = by_hand(double(module), [4, 4])
    trainer = fit(module, logger=logger, log_every_n_steps=1)
    # Lightning logs the last micro-batch of a step.
    last = [window[-1][0] for window in windows(batches(), 4)]
    expected = [losses[10 * epoch + i] for epoch in range(2) for i in last]
    assert logger.logged["loss_step"] == pytest.approx(expected, abs=1e-7)
    epochs = [sum(losses[:10]) / 10, sum(losses[10:]) / 10]
    assert logger.logged["loss_epoch"] == pytest.approx(epochs, abs=1e-7)
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(epochs[1], abs=1e-7)


class Measured(Problem):
    """Metrics in training_step, logged by the module and by a callback."""

    def __init__(self) -> None:
        super().__init__(usam)
        # two metrics of a collection that share their states, and one with its own
        kinds = {"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False)}
        self.metrics = MetricCollection(kinds | {"r2": R2Score()})
        self.mae = MeanAbsoluteError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.net(batch[0])
        self.metrics.update(outputs, batch[1])
        self.mae(outputs, batch[1])
        self.log("mae", self.mae, on_step=True, on_epoch=True)
        return nn.functional.mse_loss(outputs, batch[1])

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute())
        self.metrics.reset()

    def on_after_backward(self) -> None:
        self.log("backward", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")


def test_metrics_are_those_of_the_first_pass() -> None:
    module, logger = Measured(), Recorder()
    start = double(module)
    fit(module, logger=logger, log_every_n_steps=1)
    outputs: list[Tensor] = []
    handle = start.net.register_forward_hook(lambda _, __, y: outputs.append(y.detach()))
    by_hand(start, [4, 4])
    handle.remove()
    # two passes of each window: the first one is at x
    first = [
        y
        for epoch in range(2)
        for window in windows(outputs[20 * epoch : 20 * (epoch + 1)], 8)
        for _, y in window[: len(window) // 2]
    ]
    targets = [batch[1] for batch in batches()]
    errors = torch.stack(first) - torch.stack(targets * 2)
    for epoch in range(2):
        e = errors[10 * epoch : 10 * (epoch + 1)]
        assert logger.logged["mse"][epoch] == pytest.approx(float(e.square().mean()))
        assert logger.logged["rmse"][epoch] == pytest.approx(float(e.square().mean().sqrt()))
        assert logger.logged["mae_epoch"][epoch] == pytest.approx(float(e.abs().mean()))
        assert logger.logged["backward"][epoch] == 10
    last = [10 * epoch + w[-1][0] for epoch in range(2) for w in windows(batches(), 4)]
    expected = [float(errors[i].abs().mean()) for i in last]
    assert logger.logged["mae_step"] == pytest.approx(expected)
    assert distance(module.net, start.net) < 1e-12


# Hooks.


class Hooked(Problem):
    """Counts hooks, and looks at the gradient of the descent."""

    def __init__(self) -> None:
        super().__init__(usam)
        self.counts: Counter[str] = Counter()
        self.norms: list[tuple[float, float]] = []

    def on_before_backward(self, loss: Tensor) -> None:
        self.counts["on_before_backward"] += 1

    def on_after_backward(self) -> None:
        self.counts["on_after_backward"] += 1

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.counts["on_before_zero_grad"] += 1

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.counts["optimizer_zero_grad"] += 1
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.counts["on_before_optimizer_step"] += 1
        self.before = float(total_norm(self))

    def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
        self.counts["configure_gradient_clipping"] += 1
        self.clip_gradients(optimizer, **options)
        self.norms.append((self.before, float(total_norm(self))))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        self.counts["optimizer_step"] += 1
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        assert not optimizer.perturbed


def total_norm(module: nn.Module) -> Tensor:
    grads = [p.grad for p in module.parameters()]
    return torch.stack([g.square().sum() for g in grads]).sum().sqrt()


def test_hooks_are_called_as_documented() -> None:
    module = Hooked()
    trainer = fit(module, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
    assert trainer.global_step == STEPS
    once_a_step = {
        "on_before_zero_grad",
        "optimizer_zero_grad",
        "on_before_optimizer_step",
        "configure_gradient_clipping",
        "optimizer_step",
    }
    assert dict(module.counts) == {
        "on_before_backward": 2 * 20,
        "on_after_backward": 2 * 20,
        **dict.fromkeys(once_a_step, STEPS),
    }
    before = []
    other = double(Problem(usam))
    by_hand(other, [4, 4], lambda params: (before.append(total_norm(other)), clip(params)))
    assert [n for n, _ in module.norms] == pytest.approx([float(n) for n in before])
    assert [n for _, n in module.norms] == pytest.approx([0.1] * STEPS, rel=1e-4)
    assert distance(module, other) < 1e-12


def clip(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 0.1)


def test_a_step_of_ones_own_around_lightnings() -> None:
    """An `optimizer_step` that sets lr, as in a warm-up."""

    class WarmUp(Problem):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 4)
            optimizer.step(closure=closure)

    module = WarmUp(usam)
    other = double(Problem(usam))
    fit(module)
    opt = usam(other.parameters(), lr=0.025)
    other.configure_optimizers = lambda: opt  # type: ignore[method-assign]
    taken = []

    def after_step() -> None:
        taken.append(None)
        opt.param_groups[0]["lr"] = 0.1 * min(1.0, (len(taken) + 1) / 4)

    by_hand(other, [4, 4], after_step=after_step)
    assert distance(module, other) < 1e-12


def test_closures_that_no_step_follows() -> None:
    """An `optimizer_step` that steps at every second batch and only evaluates the others."""

    class Alternates(Problem):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if batch_idx % 2 == 0:
                closure()
            else:
                optimizer.step(closure=closure)

    module, other = Alternates(usam, dropout=0.0), double(Problem(usam, dropout=0.0))
    fit(module, accumulate_grad_batches=1)
    by_hand(other, [1, 1], epoch=batches()[1::2])
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_hook_that_fails_restores_the_weights() -> None:
    class Fails(Problem):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_step == 2:
                self.at = [p.clone() for p in self.parameters()]
                raise ZeroDivisionError("a hook that fails")

    module = Fails(usam)
    trainer = trainer_of(accumulate_grad_batches=4)
    with pytest.raises(ZeroDivisionError, match="a hook that fails"):
        trainer.fit(module, loader())
    other = double(Problem(usam))
    by_hand(other, [4], epoch=batches()[:8])
    assert all(map(torch.equal, module.parameters(), other.parameters()))
    assert not all(map(torch.equal, module.at, other.parameters()))
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    overridden = {"_make_closure", "backward", "clip_gradients", "optimizer_step"}
    overridden.add("save_checkpoint")
    for instance in (loop, trainer, trainer.strategy, trainer.strategy.precision_plugin):
        assert not overridden & set(vars(instance))


def test_a_second_fit_goes_on() -> None:
    module = Problem(usam)
    trainer = trainer_of(accumulate_grad_batches=4)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    other = double(Problem(usam))
    by_hand(other, [4, 4])
    by_hand(other, [4, 4])  # with a new optimizer, as Lightning makes one
    assert distance(module, other) < 1e-12
    assert trainer.global_step == 2 * STEPS


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_skipped_batches() -> None:
    """training_step returns None: its micro-batch counts as one without a gradient."""

    class Skips(Problem):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (1, 4, 5, 6, 7, 9) else super().training_step(batch, 0)

    module, other = Skips(usam), double(Problem(usam))
    trainer = fit(module, max_epochs=1)
    loss = other.loss
    skipped = [batches()[i][0] for i in (1, 9)]
    other.loss = lambda batch: (  # type: ignore[method-assign]
        sum(p.sum() for p in other.parameters()) * 0.0
        if any(torch.equal(batch[0], x) for x in skipped)
        else loss(batch)
    )
    epoch = batches()
    opt = usam(other.parameters())
    other.configure_optimizers = lambda: opt  # type: ignore[method-assign]
    by_hand(other, [4], epoch=epoch[:4])
    module_seeds = {0: 8, 1: 9}  # the third window; the second one has no gradient
    seed = torch.manual_seed
    try:
        torch.manual_seed = lambda i: seed(module_seeds[i])
        by_hand(other, [4], epoch=epoch[8:])
    finally:
        torch.manual_seed = seed
    assert distance(module, other) < 1e-12
    assert trainer.global_step == 3


# Averages and checkpoints.


def test_an_exponential_average_is_one_of_x() -> None:
    module, other = (double(Problem(usam)) for _ in range(2))  # the average has this dtype
    ema = EMAWeightAveraging(decay=0.5)
    fit(module, ema)
    average = AveragedModel(other, avg_fn=get_ema_avg_fn(decay=0.5), use_buffers=True)
    by_hand(other, [4, 4], after_step=lambda: average.update_parameters(other))
    assert distance(module, average.module) < 1e-12  # Lightning leaves the average in the module


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_stochastic_weight_averaging_and_its_pass_for_batch_norm(rho: float) -> None:
    """Lightning's average has the weights at the start of its last epochs."""
    make = functools.partial(usam, rho=rho)
    module, other = (double(Problem(make)) for _ in range(2))
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2, annealing_epochs=1)
    trainer = fit(module, swa, max_epochs=4)
    starts = []
    opt = make(other.parameters())
    other.configure_optimizers = lambda: opt  # type: ignore[method-assign]
    for _ in range(4):
        starts.append([p.detach().clone() for p in other.parameters()])
        by_hand(other, [4])
    for p, *values in zip(module.parameters(), *starts[1:], strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(values).mean(0), rtol=0, atol=1e-12)
    assert trainer.global_step >= 2 * STEPS
    norm = nn.BatchNorm1d(8, momentum=None).double()
    for inputs, _ in batches():
        norm(module.net[0](inputs))
    torch.testing.assert_close(module.net[1].running_mean, norm.running_mean)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_checkpoints_hold_x_and_training_goes_on_exactly(tmp_path: Path) -> None:
    """With a schedule of rho, which Lightning steps and saves."""

    class Scheduled(Problem):
        def configure_optimizers(self) -> Any:
            opt = usam(self.parameters())
            rho = ef.schedulers.RhoScheduler(opt, "linear", total_steps=12)
            lr = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
            self.rhos = rho.get_last_rho
            return [opt], [{"scheduler": rho, "interval": "step"}, lr]

    whole, first, second = (Scheduled(usam) for _ in range(3))
    fit(whole, max_epochs=4)
    checkpoints = [ModelCheckpoint(tmp_path, save_last=True) for _ in range(2)]
    options = {"enable_checkpointing": True, "accumulate_grad_batches": 4}
    trainer_of(checkpoints[0], **options).fit(first, loader())
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=False)
    for name, t in first.state_dict().items():
        assert torch.equal(saved["state_dict"][name], t)
    second.double()  # Lightning loads the weights before it converts them
    trainer_of(checkpoints[1], max_epochs=4, **options).fit(second, loader(), ckpt_path=path)
    assert distance(second, whole) == 0.0
    assert whole.rhos() == second.rhos() == [0.0]


def test_lightnings_search_for_a_learning_rate(tmp_path: Path) -> None:
    """It trains with other callbacks and loops, and then restores everything."""

    class Searched(Problem):
        def configure_optimizers(self) -> Any:
            return ef.USAM(self.parameters(), lr=self.lr, momentum=0.9, rho=0.1)

    module, other = Searched(usam), Searched(usam)
    module.lr = other.lr = 0.1
    trainer = trainer_of(accumulate_grad_batches=4, default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(module, loader(), num_training=8, update_attr=False)
    assert len(found.results["loss"]) > 1
    trainer.fit(module, loader())
    other.double()
    by_hand(other, [4, 4])
    assert distance(module, other) < 1e-12


# What is refused.


def test_another_optimizer() -> None:
    module = Problem(functools.partial(torch.optim.AdamW, lr=0.1))
    message = r"returned AdamW: wrap it, as in eigenfilter.SharpnessAware\(AdamW"
    with pytest.raises(MisconfigurationException, match=message):
        fit(module)


def test_a_scheduler_beside_the_wrapped_optimizer() -> None:
    """A schedule of lr is given the wrapper, as Lightning wants it."""

    class Scheduled(Problem):
        def configure_optimizers(self) -> Any:
            opt = ef.SharpnessAware(torch.optim.AdamW(self.parameters(), lr=0.1), rho=0.1)
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)]

    trainer = fit(Scheduled(usam))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025


def test_batches_that_training_step_changes() -> None:
    class Pops(Problem):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch.append(batch.pop(0))
            assert batch[1].shape[-1] == 4
            return self.loss(batch[::-1])

    make = functools.partial(ef.TwoStepUSAM, lr=0.1, rho=0.1)  # which gets it three times
    module, other = Pops(make), double(Problem(make))
    fit(module)
    by_hand(other, [4, 4])
    assert distance(module, other) < 1e-12

    class Writes(Problem):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].mul_(2.0)
            return self.loss(batch)

    module, other = Writes(make), double(Problem(make))
    fit(module, max_epochs=1)
    by_hand(other, [4], epoch=[[2.0 * x, y] for x, y in batches()])
    assert distance(module, other) < 1e-12


@dataclass(frozen=True)
class Pair:
    """A batch of a class of its own, which Lightning moves by its `to`."""

    inputs: dict[str, Tensor]
    targets: Tensor

    def to(self, device: Any) -> Pair:
        return self


def test_a_batch_of_a_class_of_its_own() -> None:
    class Pairs(Problem):
        def training_step(self, batch: Pair, batch_idx: int) -> Any:
            return self.loss([batch.inputs["x"], batch.targets])

    module, other = Pairs(usam).double(), double(Problem(usam))
    pairs = [Pair({"x": x}, y) for x, y in batches()]
    trainer = trainer_of(accumulate_grad_batches=4, precision="32-true")
    trainer.fit(module, DataLoader(pairs, batch_size=None))
    by_hand(other, [4, 4])
    assert distance(module, other) < 1e-12


class Holder:
    """A batch of a class without `to`."""

    def __init__(self, x: Any, y: Tensor) -> None:
        self.inputs, self.targets = x, y


def replaces_an_attribute(batch: Holder) -> list[Tensor]:
    batch.inputs = batch.inputs + 1
    return [batch.inputs, batch.targets]


def replaces_an_entry(batch: Pair) -> list[Tensor]:
    batch.inputs["x"] = batch.inputs["x"] + 1
    return [batch.inputs["x"], batch.targets]


def writes_an_entry(batch: Any) -> list[Tensor]:
    return [batch["x"].add_(1), batch["y"]]


def writes_an_attribute(batch: Holder) -> list[Tensor]:
    return [batch.inputs.add_(1), batch.targets]


@pytest.mark.parametrize(
    ("make_batch", "change"),
    [
        (Holder, replaces_an_attribute),
        (lambda x, y: Pair({"x": x}, y), replaces_an_entry),
        (lambda x, y: UserDict(x=x.clone(), y=y), writes_an_entry),
        (lambda x, y: Holder(x.clone(), y), writes_an_attribute),
    ],
)
def test_a_training_step_that_changes_an_object(
    make_batch: Callable[..., Any], change: Callable[[Any], list[Tensor]]
) -> None:
    class Changes(Problem):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(change(batch))

    module, other = Changes(usam).double(), double(Problem(usam))
    trainer = trainer_of(accumulate_grad_batches=4, precision="32-true", max_epochs=1)
    loader = DataLoader([make_batch(x, y) for x, y in batches()], batch_size=None)
    trainer.fit(module, loader)
    by_hand(other, [4], epoch=[[x + 1, y] for x, y in batches()])
    assert distance(module, other) < 1e-12


def test_an_iterator_for_a_batch() -> None:
    class Iterates(Problem):
        def training_step(self, dataloader_iter: Any) -> Any:
            return self.loss(next(dataloader_iter)[0])

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            pass

    with (
        pytest.warns(UserWarning, match="dataloader_iter"),
        pytest.raises(MisconfigurationException, match="take batch and batch_idx"),
    ):
        fit(Iterates(usam))


def test_released_gradients_are_refused() -> None:
    make = functools.partial(usam, release_gradients=True)
    for options in ({}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}):
        with pytest.raises(ValueError, match="release_gradients=True applies each gradient"):
            fit(Problem(make), **{"accumulate_grad_batches": 1, **options})


def test_an_engine_that_steps_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's."""
    strategy = type(trainer_of().strategy)
    monkeypatch.setattr(strategy, "handles_gradient_accumulation", True)
    with pytest.raises(MisconfigurationException, match="takes steps in an engine of its own"):
        fit(Problem(usam))


@pytest.mark.parametrize("clips", [False, True])
def test_pytorch_lightning(clips: bool) -> None:
    """The package of the former name, whose trainer takes the same callback."""
    package = pytest.importorskip("pytorch_lightning")

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(Problem(usam).net)

        on_train_batch_start = Problem.on_train_batch_start
        training_step = Problem.training_step
        loss = Problem.loss

        def configure_optimizers(self) -> Any:
            return usam(self.parameters())

    module, other = Module(), double(Problem(usam))
    options = {"gradient_clip_val": 0.1} if clips else {}
    trainer = trainer_of(package=package, accumulate_grad_batches=4, **options)
    trainer.fit(module, loader())
    by_hand(other, [4, 4], clip if clips else lambda params: None)
    assert distance(module, other) < 1e-12


def test_stages_without_training() -> None:
    trainer = pl.Trainer(
        callbacks=[SharpnessAwareCallback()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    (result,) = trainer.validate(Problem(usam), loader(), verbose=False)
    assert result["val_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "printed"),
    [
        (["lightning"], "pytorch_lightning"),
        (["lightning", "pytorch_lightning"], 'not installed: pip install "eigenfilter[lightning]"'),
    ],
)
def test_where_lightning_is_not_installed(missing: list[str], printed: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    code += "from eigenfilter.integrations.lightning import Callback; print(Callback.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed in done.stdout + done.stderr
    assert (done.returncode == 0) == (len(missing) == 1)
