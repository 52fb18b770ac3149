"""Sharpness-aware training in Lightning, with one callback. See docs/integrations/lightning.md.

Manual optimization and Fabric need nothing from here: their loops belong to the user, and the
optimizers that they wrap have `ascend()`.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations._window import Window, optimizer_of, set_mode

with imports_of("lightning"):
    if TYPE_CHECKING or find_spec("lightning") or not find_spec("pytorch_lightning"):
        from lightning.fabric.utilities.exceptions import MisconfigurationException
        from lightning.pytorch import Callback, LightningModule, Trainer
        from lightning.pytorch.plugins.precision import Precision
    else:
        from lightning_fabric.utilities.exceptions import MisconfigurationException
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.plugins.precision import Precision
    from torchmetrics import Metric

__all__ = ["SharpnessAwareCallback"]


class SharpnessAwareCallback(Callback):  # type: ignore[misc]
    """Automatic optimization with the optimizers of this library.

        trainer = Trainer(callbacks=[SharpnessAwareCallback()], ...)

    Without it Lightning passes a closure that evaluates one micro-batch, logs again and clips
    again whenever a method needs another gradient. With it

    - every gradient is that of all micro-batches of a step: `accumulate_grad_batches`,
      `GradientAccumulationScheduler`, the incomplete window at the end of an epoch. Each process
      reduces gradients once in every pass;
    - `gradient_clip_val`, `configure_gradient_clipping` and `on_before_optimizer_step` get the
      gradient of the descent, once a step, unscaled under "16-mixed" too;
    - running statistics, torchmetrics and what `self.log` logs are those of the first pass, at x;
    - `trainer.global_step` counts steps, and validation, checkpoints and averages of weights see x;
    - `train` and `eval` of a schedule-free base, or of SGD or AdamW with an extrapolation, are
      called around training, validation and checkpoints.

    `training_step`, `backward`, `on_before_backward` and `on_after_backward` are called in every
    pass, as often as the method needs gradients: `self.optimizers().perturbed` tells whether the
    weights are perturbed. A step keeps its batches until it ends.

    The callback has no state, and changes nothing in manual optimization: see the page.

    Raises:
        MisconfigurationException: the optimizer is not one of this library, the strategy steps in
            an engine of its own (DeepSpeed), or `training_step` takes an iterator
            (`dataloader_iter`).
        ValueError: the optimizer has `release_gradients`.
        RuntimeError: a tensor of a batch was computed from one that requires grad, or a checkpoint
            is saved while the weights are perturbed.
    """

    def __init__(self) -> None:
        self._window: Window | None = None
        self._overridden: list[tuple[Any, str]] = []
        self._mode = "eval"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in every step of `trainer.fit`, until it ends."""
        self._remove()
        if stage != "fit" or not pl_module.automatic_optimization:
            return
        loop, precision = trainer.fit_loop.epoch_loop.automatic_optimization, _precision_of(trainer)
        self._override(loop, "_make_closure", partial(self._closure, trainer, loop._make_closure))
        backward, step = trainer.strategy.backward, precision.optimizer_step
        self._override(trainer.strategy, "backward", partial(self._backward, trainer, backward))
        self._override(precision, "optimizer_step", partial(self._step, trainer, step))
        save = partial(self._save_checkpoint, trainer, trainer.save_checkpoint)
        self._override(trainer, "save_checkpoint", save)
        if type(precision).clip_gradients.__qualname__ == "MixedPrecision.clip_gradients":
            # It refuses to clip for an optimizer that can unscale itself; `_step` has unscaled.
            clip_gradients = partial(Precision.clip_gradients, precision)
            self._override(precision, "clip_gradients", clip_gradients)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be right."""
        if not pl_module.automatic_optimization:
            return
        strategy = trainer.strategy
        if strategy.handles_gradient_accumulation:
            raise MisconfigurationException(
                f"SharpnessAwareCallback evaluates a step's batches again before it is taken, and "
                f"{type(strategy).__name__} takes steps in an engine of its own: use another "
                "strategy (DDP, ModelParallelStrategy), or remove the callback and train with "
                "rho=0.0"
            )
        self._window_of(pl_module, strategy.optimizers[0])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring a schedule-free base to its weights."""
        self._set_mode(trainer, "eval")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring a schedule-free base to its weights."""
        self._set_mode(trainer, "eval")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was before `setup`."""
        self._remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the trainer as it was before `setup`, and a schedule-free base at its weights."""
        self._set_mode(trainer, "eval")
        self._remove()

    def _override(self, instance: Any, name: str, method: Callable[..., Any]) -> None:
        setattr(instance, name, method)
        self._overridden.append((instance, name))

    def _remove(self) -> None:
        self._window = None
        while self._overridden:
            delattr(*self._overridden.pop())

    def _set_mode(self, trainer: Trainer, mode: str) -> None:
        if self._overridden:  # in a fit by automatic optimization
            self._mode = mode
            for optimizer in trainer.optimizers:
                set_mode(optimizer, mode)

    def _save_checkpoint(
        self, trainer: Trainer, save: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """The trainer's method, which writes the weights of a schedule-free base."""
        if any(opt and opt.perturbed for opt in map(optimizer_of, trainer.optimizers)):
            raise RuntimeError(
                "a checkpoint in the middle of a step (on_before_optimizer_step) would hold "
                "perturbed weights: save it in on_train_batch_end or later"
            )
        mode = self._mode
        self._set_mode(trainer, "eval")
        try:
            save(*args, **kwargs)
        finally:
            self._set_mode(trainer, mode)

    def _window_of(self, module: LightningModule, optimizer: Any) -> Window:
        opt = optimizer_of(optimizer)
        if opt is None:
            name = type(optimizer).__name__
            raise MisconfigurationException(
                "SharpnessAwareCallback trains with the optimizers of eigenfilter, and "
                f"configure_optimizers returned {name}: wrap it, as in "
                f'eigenfilter.SharpnessAware({name}(...), "usam", rho=0.05), or remove the callback'
            )
        if self._window is None or self._window.optimizer is not opt:
            no_sync = getattr(module.trainer.strategy, "block_backward_sync", None)
            self._window = Window(module, opt, no_sync=no_sync)
        return self._window

    def _closure(
        self,
        trainer: Trainer,
        make_closure: Callable[..., Any],
        kwargs: OrderedDict[str, Any],
        optimizer: Any,
        batch_idx: int,
    ) -> Any:
        """Lightning's closure of a micro-batch, recorded in the window."""
        self._set_mode(trainer, "train")  # before its forward pass, also in Lightning's tuners
        closure = make_closure(kwargs, optimizer, batch_idx)
        window = self._window_of(trainer.lightning_module, optimizer)
        if closure._zero_grad_fn is not None:  # the gradients before it are cleared
            window.clear()
        if closure._backward_fn is None:
            return closure
        if "batch" not in kwargs and window.keeps:
            raise MisconfigurationException(
                "training_step takes dataloader_iter, whose batches cannot be evaluated again: "
                "take batch and batch_idx, or train with rho=0.0"
            )
        return _Recorded(closure, window, partial(_evaluate, trainer, closure._backward_fn), kwargs)

    def _backward(
        self,
        trainer: Trainer,
        backward: Callable[..., Any],
        loss: Tensor,
        optimizer: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The backward pass of the strategy, with a graph where the method needs one."""
        if not self._window_of(trainer.lightning_module, optimizer).optimizer.needs_graph:
            return backward(loss, optimizer, *args, **kwargs)
        with warnings.catch_warnings():  # of a reference cycle, which the ascent breaks
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            return backward(loss, optimizer, *args, create_graph=True, **kwargs)

    def _step(
        self,
        trainer: Trainer,
        optimizer_step: Callable[..., Any],
        optimizer: Any,
        model: LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """The step of the precision plugin, with the ascents before its hooks and its clipping."""
        window, scaler = self._window_of(model, optimizer), _scaler_of(trainer)
        loss = closure()
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop.automatic_optimization._skip_backward:
            return loss  # a pass for running statistics (StochasticWeightAveraging) has no gradient
        steps = loss is not None or scaler is None  # with a scaler Lightning skips the step
        try:
            if steps and len(window) > 0:
                with _unlogged(epoch_loop), _preserved_metrics(model):
                    window.take_ascents(scaler)
            if steps and scaler is not None:
                scaler.unscale_(optimizer)
            return optimizer_step(optimizer, model=model, closure=lambda: loss, **kwargs)
        finally:
            if window.optimizer.perturbed:  # the step was skipped, or a hook has failed
                window.optimizer.restore()


class _Recorded:
    """A closure of Lightning, whose evaluation the window records."""

    def __init__(
        self,
        closure: Any,
        window: Window,
        evaluate: Callable[[Any], None],
        kwargs: OrderedDict[str, Any],
    ) -> None:
        self._closure = closure
        self._window = window
        self._evaluate = evaluate
        self._kwargs = kwargs

    def __call__(self) -> Tensor | None:
        with self._window.recording(self._evaluate, self._kwargs):
            loss: Tensor | None = self._closure()
        return loss

    def consume_result(self) -> Any:
        """What the evaluation returned."""
        return self._closure.consume_result()


def _evaluate(
    trainer: Trainer, backward: Callable[[Tensor], None], kwargs: OrderedDict[str, Any]
) -> None:
    """Evaluate a micro-batch as Lightning did, with the arguments of its `training_step`."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    loss = loop._training_step(kwargs).closure_loss
    if loss is not None:
        backward(loss)


class _NoResults(dict[str, Any]):
    """In place of Lightning's results: drops what is logged."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextmanager
def _unlogged(epoch_loop: Any) -> Iterator[None]:
    """A context in which `log` of modules and callbacks has no effect."""
    results, epoch_loop._results = epoch_loop._results, _NoResults()
    try:
        yield
    finally:
        epoch_loop._results = results


@contextmanager
def _preserved_metrics(module: nn.Module) -> Iterator[None]:
    """A context at whose end the module's torchmetrics are as they were."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else copy.copy(value)

    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    names = [{*metric._defaults} for metric in metrics]
    saved = [
        {name: copied(v) if name in states else v for name, v in vars(metric).items()}
        for metric, states in zip(metrics, names, strict=True)
    ]
    try:
        yield
    finally:
        for metric, values in zip(metrics, saved, strict=True):
            vars(metric).update(values)


def _precision_of(trainer: Trainer) -> Any:
    return trainer.strategy.precision_plugin


def _scaler_of(trainer: Trainer) -> Any:
    """The enabled GradScaler of the precision plugin, or None."""
    scaler = getattr(_precision_of(trainer), "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None
