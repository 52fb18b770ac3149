"""Transformers: a Trainer whose steps take the ascents of sharpness-aware methods."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from eigenfilter.curvature import CurvatureOperator, causal_lm
from eigenfilter.integrations import _window
from eigenfilter.integrations._batches import copy_of
from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations.accelerate import AcceleratedWindow, optimizer_of, refuse
from eigenfilter.monitor import SharpnessCheck, SharpnessMonitor
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.wrapper import SharpnessAware
from eigenfilter.schedulers import RhoScheduler

with imports_of("transformers"):
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback

__all__ = [
    "RhoSchedulerCallback",
    "SharpnessAwareMixin",
    "SharpnessAwareTrainer",
    "SharpnessCallback",
]


_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _flag(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ValueError
    return _FLAGS[text.lower()]


# What `optim_args` may say of the ascents, what reads it, and what it must be.
_NUMBER, _TEXT = (float, "a number"), (str, "a name")
_ASCENT_ARGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "method": _TEXT,
    "rho": _NUMBER,
    "adaptive": (_flag, "true or false"),
    "ascent": _TEXT,
    "hvp": _TEXT,
    "fd_step": _NUMBER,
}

# Optimizers of Transformers that step while backward runs, before an ascent could be taken.
_IN_BACKWARD = ("lomo", "layerwise")


class SharpnessAwareMixin:
    """Adds the ascents of sharpness-aware methods to a Trainer, before which it is inherited:

        class SharpnessAwareSeq2SeqTrainer(SharpnessAwareMixin, Seq2SeqTrainer): ...

    The optimizer comes by the Trainer's own arguments:

        optimizer_cls_and_kwargs=(eigenfilter.USAM, {"momentum": 0.9, "rho": 0.05})
        optimizers=(eigenfilter.AdamW(model.parameters(), lr=1e-4, method="sam", rho=0.05), None)
        TrainingArguments(optim="adamw_torch", optim_args="method=sam,rho=0.05")

    The first keeps the Trainer's groups of weight decay, and takes lr from
    `args.learning_rate` where the arguments have none. The last wraps any `optim` in
    `eigenfilter.SharpnessAware`.

    A step evaluates its window of `gradient_accumulation_steps` micro-batches once by the Trainer's
    own `training_step`, at x. After the last one it takes the ascents, for which it calls
    `training_step` again for each micro-batch, with the same `num_items_in_batch`. The Trainer then
    clips, logs and applies the gradient of the descent. The logged loss is that at x, and running
    statistics stay those of x. Evaluations and checkpoints see x.

    `on_pre_optimizer_step` is called with the clipped gradient of the descent, while the model is
    perturbed: look at weights in `on_optimizer_step` or later.

    Attributes:
        kept_attributes: attributes of the trainer that later evaluations of a micro-batch must
            leave as the first one did, such as counters and metrics. The default has those of
            TRL's trainers; add those of your own.
    """

    kept_attributes: ClassVar[tuple[str, ...]] = (
        "_current_train_step_time",
        "_metrics",
        "_step",
        "_stored_metrics",
        "_total_train_tokens",
    )

    _window: AcceleratedWindow | None = None
    _prepared: _PreparedInputs | None = None
    _evaluates_again = False

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer that the arguments ask for, and make it sharpness-aware.

        Raises:
            TypeError: neither argument brings an optimizer of eigenfilter.
            ValueError: the optimizer steps while backward runs, one of its options needs another
                loop, or a value in `optim_args` is none that its name can have.
            RuntimeError: an engine steps for the Trainer, such as DeepSpeed's.
        """
        self._end_window()
        create = functools.partial(super().create_optimizer, *args, **kwargs)  # type: ignore[misc]
        ascent: dict[str, Any] = {}
        others: str | None = self.args.optim_args
        if self.optimizer is None:
            ascent, others = _split(others)
            _refuse_in_backward(self)
            _complete_lr(self)
        with _optim_args(self.args, others):
            create()
        if ascent:
            self.optimizer = SharpnessAware(self.optimizer, **ascent)
        _check(self)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def training_step(self: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a micro-batch; after the last one of a step, take the ascents.

        Returns:
            The loss at x, as the Trainer's own.
        """
        if self._window is None:
            self._window = AcceleratedWindow(self.accelerator, model, self.optimizer)
        window: AcceleratedWindow = self._window
        step = super().training_step  # type: ignore[misc]
        prepared = _PreparedInputs() if window.keeps else None
        accumulation = self.current_gradient_accumulation_steps

        def evaluate_again(inputs: Any) -> None:
            assert prepared is not None
            kept = {n: vars(self)[n] for n in self.kept_attributes if n in vars(self)}
            shown = {name: copy.deepcopy(value) for name, value in kept.items()}
            shown["current_gradient_accumulation_steps"] = accumulation
            shown |= {"_prepared": prepared.again(), "_evaluates_again": True}
            with _attributes(self, **shown):
                step(model, inputs, *args, **kwargs)

        with window.recording(evaluate_again, inputs), _attributes(self, _prepared=prepared):
            return step(model, inputs, *args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepare = functools.partial(super()._prepare_inputs, inputs)  # type: ignore[misc]
        return prepare() if self._prepared is None else self._prepared.get(prepare)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does; what `compute_loss` logs, only at x."""
        if not self._evaluates_again:
            super().log(*args, **kwargs)  # type: ignore[misc]

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; an exception leaves the model at x."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._end_window()
            _window.set_mode(self.optimizer, "eval")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict as the Trainer does.

        Raises:
            RuntimeError: the model is perturbed, as in `on_pre_optimizer_step`.
        """
        if self._is_perturbed():
            raise RuntimeError(
                "an evaluation in the middle of a step (on_pre_optimizer_step) would see "
                "perturbed weights: evaluate in on_optimizer_step or later"
            )
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def save_model(self: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as the Trainer does, at x if the optimizer goes ahead of it.

        Raises:
            RuntimeError: the model is perturbed, as in `on_pre_optimizer_step`.
        """
        if self._is_perturbed():
            raise RuntimeError(
                "a model saved in the middle of a step (on_pre_optimizer_step) would have "
                "perturbed weights: save it in on_optimizer_step or later"
            )
        _window.set_mode(self.optimizer, "eval")
        super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_perturbed():  # on_pre_optimizer_step, where SIGTERM's checkpoint is taken
            self.control.should_save = True  # right after the step
            return
        _window.set_mode(self.optimizer, "eval")  # the next training_step calls train
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _is_perturbed(self: Any) -> bool:
        opt = _window.optimizer_of(self.optimizer)
        return opt is not None and opt.perturbed

    def _end_window(self: Any) -> None:
        """Forget the micro-batches of a step that was not ended, and go back to x."""
        if self._is_perturbed():
            optimizer_of(self.optimizer).restore()
        self._window = None


class SharpnessAwareTrainer(SharpnessAwareMixin, Trainer):  # type: ignore[misc]
    """Transformers' `Trainer` with the ascents of sharpness-aware methods: `SharpnessAwareMixin`.

    trainer = SharpnessAwareTrainer(
        model=model,
        args=TrainingArguments("out", learning_rate=0.1),
        train_dataset=dataset,
        optimizer_cls_and_kwargs=(eigenfilter.USAM, {"momentum": 0.9, "rho": 0.05}),
    )
    trainer.train()
    """


class RhoSchedulerCallback(TrainerCallback):  # type: ignore[misc]
    """Sets rho by a `RhoScheduler` whose steps are the Trainer's, also after it resumes.

    Args:
        kind, options: arguments of `RhoScheduler`. Without `total_steps` it has the training's, as
            in `RhoSchedulerCallback("late", start=0.8)`.
    """

    def __init__(self, kind: Any, **options: Any) -> None:
        self._kind = kind
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the scheduler, at the step at which the training begins."""
        options = {"total_steps": state.max_steps} | self._options
        self._scheduler = RhoScheduler(kwargs["optimizer"], self._kind, **options)
        if state.global_step > 0:
            self._scheduler.load_state_dict({"last_epoch": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rho of the next step."""
        self._scheduler.step()


class SharpnessCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the sharpness during a training, with a `SharpnessMonitor` of the Trainer's steps.

        probe = collator(list(dataset)[:32])  # the same for all checks
        trainer = Trainer(model, args, callbacks=[SharpnessCallback(probe, every=500)], ...)
        trainer.train()

    The Trainer may be any, and so may its optimizer: for AdamW, of torch or of eigenfilter, the
    sharpness is that of the preconditioned Hessian, see `SharpnessMonitor`. Each check is a line in
    `trainer.state.log_history`, with "sharpness" and "edge". A training that resumes continues the
    count of steps.

    Args:
        probe: batches of a causal language model, see `eigenfilter.curvature.causal_lm`. Each
            process may have its own: the loss is the mean over all.
        every: number of steps of the optimizer from one check to the next, >= 1.
        operator: function (model, probe, process_group=group) -> Hessian in the parameters that are
            trained. The default is `causal_lm`; the model is the one that was given to the Trainer.
        options: tol, on_edge, log, writer, callback and seed of `SharpnessMonitor`.

    Attributes:
        monitor: the `SharpnessMonitor` of the last training, with its `history`.
    """

    monitor: SharpnessMonitor

    def __init__(
        self,
        probe: Any,
        every: int = 500,
        *,
        operator: Callable[..., CurvatureOperator] = causal_lm,
        **options: Any,
    ) -> None:
        self._probe, self._operator = probe, operator
        self._options = {"every": every, **options}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the monitor, at the step at which the training begins."""
        optimizer = kwargs["optimizer"]
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        group = dist.group.WORLD if dist.is_initialized() else None
        op = self._operator(kwargs["model"], self._probe, process_group=group)
        self.monitor = SharpnessMonitor(op, optimizer, **self._options)
        self.monitor.load_state_dict({"steps": state.global_step, "vector": None})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step, and check if it is time."""
        check: SharpnessCheck | None = self.monitor.step()
        if check is not None:
            shown = {"sharpness": check.sharpness, "edge": check.edge, "step": check.step}
            state.log_history.append(shown)


class _PreparedInputs:
    """What a trainer made of the inputs of a micro-batch, for its later evaluations.

    A trainer may draw, generate or count while it prepares inputs.
    """

    def __init__(self, results: list[Any] | None = None) -> None:
        self._results: list[Any] = [] if results is None else results
        self._position = 0

    def again(self) -> _PreparedInputs:
        """The same results for another evaluation."""
        return _PreparedInputs(self._results)

    def get(self, prepare: Callable[[], Any]) -> Any:
        """The result of the first evaluation's call in this position, or of this call."""
        if self._position == len(self._results):
            result = prepare()
            self._results.append(copy_of(result))
        else:
            result = copy_of(self._results[self._position])
        self._position += 1
        return result


@contextmanager
def _attributes(owner: Any, **values: Any) -> Iterator[None]:
    """A context in which an object has these attributes; on exit it has its own."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(owner).pop(name, None)
        vars(owner).update(before)


@contextmanager
def _optim_args(args: Any, text: str | None) -> Iterator[None]:
    """A context in which the training's `optim_args` is `text`."""
    before, args.optim_args = args.optim_args, text
    try:
        yield
    finally:
        args.optim_args = before


def _split(optim_args: str | None) -> tuple[dict[str, Any], str | None]:
    """Split `optim_args` into the arguments of SharpnessAware and those of `optim`."""
    items = [item for item in (optim_args or "").replace(" ", "").split(",") if item]
    pairs = [item.partition("=") for item in items]
    ascent = {name: value for name, _, value in pairs if name in _ASCENT_ARGS}
    others = ",".join(
        item for item, pair in zip(items, pairs, strict=True) if pair[0] not in ascent
    )
    return {name: _read(name, value) for name, value in ascent.items()}, others or None


def _read(name: str, value: str) -> Any:
    read, kind = _ASCENT_ARGS[name]
    try:
        return read(value)
    except ValueError:
        raise ValueError(f"optim_args has {name}={value}, which must be {kind}") from None


def _refuse_in_backward(trainer: Any) -> None:
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.optimizer_cls_and_kwargs is None and any(name in optim for name in _IN_BACKWARD):
        raise ValueError(
            f"optim={optim!r} steps while backward runs, before an ascent could "
            'be taken: choose another, as optim="adamw_torch"'
        )


def _complete_lr(trainer: Any) -> None:
    """Give an optimizer of this library the training's lr, where its arguments have none."""
    if trainer.optimizer_cls_and_kwargs is None:
        return
    cls, kwargs = trainer.optimizer_cls_and_kwargs
    if isinstance(cls, type) and issubclass(cls, EigenfilterOptimizer):
        trainer.optimizer_cls_and_kwargs = cls, {"lr": trainer.args.learning_rate, **kwargs}


def _check(trainer: Any) -> None:
    opt = _window.optimizer_of(trainer.optimizer)
    if opt is None:
        name = type(trainer.optimizer).__name__
        raise TypeError(
            f"a sharpness-aware trainer was given {name}, which takes no ascents: pass "
            "optimizer_cls_and_kwargs=(eigenfilter.USAM, {'rho': 0.05}), or "
            "TrainingArguments(optim_args='method=sam,rho=0.05')"
        )
    refuse(trainer.accelerator, opt)
    if opt.perturbation.needs_graph(0):
        raise ValueError(
            'hvp="autograd" needs backward(create_graph=True), and the Trainer calls backward() '
            'without: leave hvp="finite_difference"'
        )
