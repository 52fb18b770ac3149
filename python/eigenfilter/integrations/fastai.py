"""fastai: a callback for optimizers that take ascents. See docs/integrations/fastai.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations._window import Window, optimizer_of, refuse_released, set_mode
from eigenfilter.optimizers.amp import drop_scaler_attributes

with imports_of("fastai"):
    from fastai.callback.core import Callback
    from fastai.callback.fp16 import MixedPrecision, NonNativeMixedPrecision
    from fastai.callback.rnn import ModelResetter

_KEPT = ("xb", "yb", "pred", "loss", "loss_grad")  # the learner's, which an evaluation sets


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
        self.after_fit()
        self.learn._do_grad_opt = functools.partial(self._at_x_after, self.learn._do_grad_opt)
        self.learn.opt.zero_grad()

    def before_train(self) -> None:
        """Bring a schedule-free base to where its gradients are taken."""
        set_mode(self.learn.opt.opt, "train")

    def after_train(self) -> None:
        """Bring a schedule-free base to its weights."""
        set_mode(self.learn.opt.opt, "eval")

    def before_batch(self) -> None:
        """Record the batch, whose evaluation begins."""
        learn = self.learn
        if self._window is None:
            inner = optimizer_of(learn.opt)
            assert inner is not None
            self._window = Window(learn.model, inner, keeps_all=True)
        batch = learn.xb, learn.yb
        states = [(each, dict(vars(each))) for each in learn.cbs if each is not self]

        def evaluate() -> None:
            learn.xb, learn.yb = batch
            with _states(states):
                _evaluate(learn)

        self._recording.enter_context(self._window.recording(evaluate, batch))

    def after_backward(self) -> None:
        """End the record."""
        self._recording.close()

    def before_step(self) -> None:
        """Take the ascents."""
        learn: Any = self.learn
        window = self._window
        assert window is not None
        self._window = None
        scaler = getattr(learn, "scaler", None)
        kept = {name: getattr(learn, name) for name in _KEPT}
        try:
            window.take_ascents(scaler)
        finally:
            for name, value in kept.items():
                setattr(learn, name, value)
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
        """End the record, if the batch was canceled."""
        self._recording.close()

    def after_fit(self) -> None:
        """Forget the batches of an incomplete step."""
        self._window = None
        learn: Any = self.learn
        vars(learn).pop("_do_grad_opt", None)

    def _at_x_after(self, do_grad_opt: Callable[[], None]) -> None:
        """The learner's gradient and step, after which an exception too leaves the model at x."""
        try:
            do_grad_opt()
        finally:
            self.after_step()


def _evaluate(learn: Any) -> None:
    """What `Learner` does with a batch, up to its gradient."""
    for each in learn.cbs:
        if isinstance(each, MixedPrecision):
            each.before_batch()  # enters autocast, which its after_loss leaves
    learn.pred = learn.model(*learn.xb)
    learn("after_pred")
    learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
    learn.loss = learn.loss_grad.clone()
    learn("after_loss")
    learn("before_backward")
    learn._backward()


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
