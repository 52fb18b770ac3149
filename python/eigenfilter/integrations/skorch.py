"""skorch: a mixin for nets whose optimizer takes ascents. See docs/integrations/skorch.md."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations._window import Window, optimizer_of, refuse_released, set_mode

with imports_of("skorch"):
    from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
    from skorch.utils import TeeGenerator


class SharpnessAwareMixin(NeuralNet):  # type: ignore[misc]
    """A mixin for skorch's nets: whole steps of one or several batches.

        class Net(SharpnessAwareMixin, MyNet): ...

    Callbacks see `on_grad_computed` once a step, with the gradient of the descent, so that
    `GradientNormClipping` clips that one only. Running statistics stay those of x, and the recorded
    losses are those at x. An optimizer of torch takes the same steps without ascents.

    Args:
        accumulation_steps: number of batches of a step, at least 1, over whose losses the mean is
            taken. The last step of an epoch takes those that are left.
        args, kwargs: those of the net.

    Raises:
        ValueError: `accumulation_steps` is not a positive integer, or the optimizer has
            `release_gradients`.
        TypeError: the net has several optimizers, or skorch's `AccelerateMixin`.
    """

    def __init__(self, *args: Any, accumulation_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accumulation_steps = accumulation_steps

    def initialize(self) -> Any:
        self._check_accumulation_steps()
        if hasattr(self, "accelerator"):
            raise TypeError(
                "SharpnessAwareMixin calls backward itself, and so does AccelerateMixin: use a "
                "loop with eigenfilter.integrations.accelerate instead"
            )
        super().initialize()
        if len(self._optimizers) != 1:
            raise TypeError(
                "SharpnessAwareMixin takes one optimizer, and the net has "
                f"{', '.join(self._optimizers)}: make them groups of one (optimizer__param_groups)"
            )
        inner = optimizer_of(getattr(self, f"{self._optimizers[0]}_"))
        if inner is not None:
            refuse_released(inner)
        return self

    def _check_accumulation_steps(self) -> None:
        if not isinstance(self.accumulation_steps, int) or self.accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps is a positive integer, and is {self.accumulation_steps!r}"
            )

    def run_single_epoch(
        self, iterator: Any, training: bool, prefix: str, step_fn: Callable[..., Any], **fit: Any
    ) -> None:
        if not training or iterator is None:
            super().run_single_epoch(iterator, training, prefix, step_fn, **fit)
            return
        self._check_accumulation_steps()  # set_params may have set it since
        optimizer = getattr(self, f"{self._optimizers[0]}_")
        set_mode(optimizer, "train")
        try:
            super().run_single_epoch(self._in_windows(iterator), training, prefix, step_fn, **fit)
        finally:
            set_mode(optimizer, "eval")

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Evaluate a batch, and update the weights after the last one of a step."""
        size, left = getattr(self, "_batches_of_step", (1, 1))
        self._batches_of_step = (size, left - 1) if left > 1 else (1, 1)
        optimizer = getattr(self, f"{self._optimizers[0]}_")
        if left == size:
            inner = optimizer_of(optimizer)
            self._window = None if inner is None else Window(self._all_modules(), inner)
            self._zero_grad_optimizer()
        evaluate = functools.partial(self._evaluate, size=size, is_last=left == 1)
        arguments, window = (batch, fit_params), self._window
        with nullcontext() if window is None else window.recording(evaluate, arguments):
            step = evaluate(arguments)
        if left == 1:
            self._window = None
            with nullcontext() if window is None else window.descent():
                params = TeeGenerator(self.get_all_learnable_params())
                self.notify("on_grad_computed", named_parameters=params, batch=batch, training=True)
                optimizer.step()
        return step

    def _evaluate(
        self, arguments: tuple[Any, dict[str, Any]], size: int, is_last: bool
    ) -> dict[str, Any]:
        batch, fit_params = arguments
        step: dict[str, Any] = self.train_step_single(batch, **fit_params)
        if is_last and size > 1:  # the gradient of the mean
            params = (p for _, p in self.get_all_learnable_params())
            gradients = list({id(p): p.grad for p in params if p.grad is not None}.values())
            torch._foreach_div_(gradients, size)
        return step

    def _in_windows(self, iterator: Iterable[Any]) -> Iterator[Any]:
        batches = iter(iterator)
        while window := list(itertools.islice(batches, self.accumulation_steps)):
            self._batches_of_step = (len(window), len(window))
            yield from window

    def _all_modules(self) -> nn.ModuleList:
        parts = (getattr(self, f"{name}_") for name in (*self._modules, *self._criteria))
        return nn.ModuleList(part for part in parts if isinstance(part, nn.Module))


class SharpnessAwareNet(SharpnessAwareMixin):
    """skorch's `NeuralNet` with `SharpnessAwareMixin`."""


class SharpnessAwareClassifier(SharpnessAwareMixin, NeuralNetClassifier):  # type: ignore[misc]
    """skorch's `NeuralNetClassifier` with `SharpnessAwareMixin`."""


class SharpnessAwareBinaryClassifier(SharpnessAwareMixin, NeuralNetBinaryClassifier):  # type: ignore[misc]
    """skorch's `NeuralNetBinaryClassifier` with `SharpnessAwareMixin`."""


class SharpnessAwareRegressor(SharpnessAwareMixin, NeuralNetRegressor):  # type: ignore[misc]
    """skorch's `NeuralNetRegressor` with `SharpnessAwareMixin`."""
