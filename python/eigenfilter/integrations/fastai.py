"""fastai: a callback for optimizers that take ascents. See docs/integrations/fastai.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations._window import Window, optimizer_of, refuse_released, set_mode
from eigenfilter.optimizers.amp import drop_scaler_attributes

with imports_of("fastai"):
    from fastai.callback.core import Callback, CancelBackwardException
    from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
    from fastai.callback.rnn import ModelResetter

# Attributes of the learner: those that a batch comes with, and those that an evaluation sets.
_OF_BATCH = ("xb", "yb", "iter", "train_iter", "pct_train")
_KEPT = (*_OF_BATCH, "pred", "loss", "loss_grad")


class SharpnessAwareCallback(Callback):  # type: ignore[misc]
    """Takes the ascents of a step before fastai's `Learner` steps, which it does without a closure.

        learn = Learner(dls, model, loss_func, opt_func=partial(OptimWrapper, opt=ef.USAM),
                        cbs=SharpnessAwareCallback())

    The batches of a step are one, or as many as `GradientAccumulation` takes. They are evaluated
    again with the learner's events `after_pred`, `after_loss` and `before_backward`, while the
    other callbacks have the state that they had when the batch came (as `MixUp`, its mixture).
    `GradientClip` clips the descent's gradient only, `MixedPrecision` unscales it. Running
    statistics stay those of x, and the recorded losses are those at x.

    At the beginning of a fit gradients are cleared: what an incomplete step of an earlier one has
    left does not enter the first ascent.
    """

    order, run_valid = MixedPrecision.order - 2, False  # after GradientAccumulation

    def __init__(self) -> None:
        super().__init__()
        self._window: Window | None = None
        self._recording = ExitStack()

    def before_fit(self) -> None:
        """Check the optimizer and the callbacks.

        Raises:
            TypeError: the optimizer is another library's.
            ValueError: the method or a callback cannot be made right.
        """
        inner = optimizer_of(self.learn.opt)
        if inner is None:
            raise TypeError(
                "SharpnessAwareCallback needs an optimizer of this library: "
                "opt_func=partial(OptimWrapper, opt=eigenfilter.USAM), or another one"
            )
        refuse_released(inner)
        if inner.needs_graph:
            raise ValueError(
                "fastai calls backward without create_graph: construct the optimizer with "
                'hvp="finite_difference"'
            )
        for callback, reason in (
            (NonNativeMixedPrecision, "gives the optimizer copies of the weights: use to_fp16()"),
            (
                ModelResetter,
                "is for a model whose state goes on from batch to batch, and a second "
                "evaluation would change it: train with rho = 0.0, without SharpnessAwareCallback",
            ),
        ):
            if any(isinstance(each, callback) for each in self.learn.cbs):
                raise ValueError(f"{callback.__name__} {reason}")
        self._recording.close()  # of a fit that has failed
        self._window = None
        learn: Any = self.learn
        learn.opt.zero_grad()
        vars(learn).pop("_do_one_batch", None)
        learn._do_one_batch = functools.partial(self._record, learn, learn._do_one_batch)

    def before_train(self) -> None:
        """Bring a schedule-free base to where its gradients are taken."""
        set_mode(self.learn.opt.opt, "train")

    def after_train(self) -> None:
        """Bring a schedule-free base to its weights."""
        set_mode(self.learn.opt.opt, "eval")

    def _record(self, learn: Any, do_one_batch: Callable[[], None]) -> None:
        """Do what `Learner` does with a batch, and record it up to its gradient.

        All callbacks have seen the batch by then.
        """
        if self.learn is not learn or not learn.training:  # it was removed after a failed fit
            do_one_batch()
            return
        if self._window is None:
            inner = optimizer_of(learn.opt)
            assert inner is not None
            self._window = Window(learn.model, inner, keeps_all=True)
        # fastai's own losses are no modules, and have one in `func`.
        losses = learn.loss_func, getattr(learn.loss_func, "func", None)
        states = [(each, dict(vars(each))) for each in learn.cbs if each is not self]
        backward, patched = learn._backward, vars(learn).get("_backward")

        def evaluate(batch: dict[str, Any]) -> None:
            vars(learn).update(batch)
            with _states(states):
                _evaluate(learn, backward)

        def first_backward() -> None:
            backward()
            self._recording.close()

        learn._backward = first_backward
        try:
            # A batch that is canceled before its gradient is there leaves by an exception.
            with self._recording:
                batch = _attributes(learn, _OF_BATCH)
                self._recording.enter_context(self._window.recording(evaluate, batch, losses))
                do_one_batch()
        finally:
            vars(learn).pop("_backward")
            if patched is not None:
                learn._backward = patched
            self.after_step()  # x, also after an exception of any kind

    def after_cancel_backward(self) -> None:
        """Forget the batch, which adds nothing to the gradient."""
        canceled = CancelBackwardException()
        self._recording.__exit__(type(canceled), canceled, None)

    def before_step(self) -> None:
        """Take the ascents."""
        learn: Any = self.learn
        window = self._window
        assert window is not None
        self._window = None
        scaler = getattr(learn, "scaler", None)
        kept = _attributes(learn, _KEPT)
        try:
            window.take_ascents(scaler)
        except BaseException:
            learn.opt.zero_grad()  # the next step must not begin with a gradient at y
            raise
        finally:
            vars(learn).update(kept)
        if scaler is not None and scaler.is_enabled():
            # MixedPrecision unscales the gradient itself, skips the step if it overflows, and steps
            # without the scaler. To the optimizer this is a scaler that found nothing.
            device = next(p.device for g in window.optimizer.param_groups for p in g["params"])
            vars(window.optimizer)["found_inf"] = torch.zeros((), device=device)

    def after_step(self) -> None:
        """Restore x if the step was skipped."""
        inner = optimizer_of(self.learn.opt)
        if inner is not None:
            drop_scaler_attributes(inner)
            if inner.perturbed:
                inner.restore()

    def after_batch(self) -> None:
        """Restore x, if the batch was canceled."""
        self.after_step()

    def after_fit(self) -> None:
        """Forget the batches of an incomplete step."""
        self._window = None
        learn: Any = self.learn
        vars(learn).pop("_do_one_batch", None)


def _attributes(learn: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: vars(learn)[name] for name in names if name in vars(learn)}


def _evaluate(learn: Any, backward: Callable[[], None]) -> None:
    """What `Learner` does with a batch, up to its gradient."""
    for each in learn.cbs:
        if isinstance(each, MixedPrecision):
            each.before_batch()  # enters autocast, which its after_loss leaves
    learn.pred = learn.model(*learn.xb)
    learn("after_pred")
    learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
    learn.loss = learn.loss_grad.clone()
    learn("after_loss")
    with suppress(CancelBackwardException):
        learn("before_backward")
        backward()


@contextmanager
def _states(states: list[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """A context in which callbacks have earlier attributes."""
    present = [(each, dict(vars(each))) for each, _ in states]
    try:
        for each, attributes in states:
            vars(each).update(attributes)
        yield
    finally:
        for each, attributes in present:
            vars(each).clear()
            vars(each).update(attributes)
