"""Accelerate: sharpness-aware steps in the loops of `accelerator.accumulate(model)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eigenfilter.integrations import _window
from eigenfilter.integrations._extras import imports_of
from eigenfilter.integrations._loss_functions import evaluate
from eigenfilter.optimizers.amp import is_enabled
from eigenfilter.optimizers.base import EigenfilterOptimizer

with imports_of("accelerate"):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

__all__ = ["SharpnessAwareBackward", "optimizer_of"]

_REPORTS = "_eigenfilter_reports_skipped_steps"
_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def optimizer_of(prepared: torch.optim.Optimizer) -> EigenfilterOptimizer:
    """The optimizer of this library in one that `accelerator.prepare` returned.

    Accelerate's wrapper has neither `ascend`, `restore` nor `phase`; this optimizer has them, and
    shares its step with the wrapper:

        opt = optimizer_of(optimizer)
        closure()
        while opt.ascend(accelerator.scaler):
            closure()
        optimizer.step()

    Raises:
        TypeError: it is another library's.
    """
    opt = _window.optimizer_of(prepared)
    if opt is None:
        raise TypeError(
            f"{type(prepared).__name__} holds no optimizer of eigenfilter: prepare one, as in "
            "accelerator.prepare(eigenfilter.USAM(model.parameters(), lr=0.1, rho=0.05)), or wrap "
            "yours first, accelerator.prepare(eigenfilter.SharpnessAware(optimizer, rho=0.05))"
        )
    return opt


class AcceleratedWindow(_window.Window):
    """The micro-batches of a step whose last backward pass synchronizes the gradients.

    Args:
        accelerator: accelerator that says when gradients are synchronized, and scales losses.
        model: model that it prepared.
        optimizer: optimizer that it prepared.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        opt = optimizer_of(optimizer)
        refuse(accelerator, opt)
        each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        no_sync = nullcontext if each else functools.partial(accelerator.no_sync, model)
        super().__init__(model, opt, no_sync=no_sync)
        self.accelerator = accelerator
        if accelerator.scaler is not None:
            _report_skipped_steps(optimizer, opt)

    @contextmanager
    def recording(
        self, evaluate: Callable[[Any], object], batch: Any, modules: Iterable[Any] = ()
    ) -> Iterator[None]:
        """A context for the first evaluation of a micro-batch; the last one takes the ascents.

        Raises:
            RuntimeError: the ascents of this step are taken already, or what the base raises.
        """
        if self.optimizer.perturbed:
            raise RuntimeError(
                "the ascents of this step are taken, and another micro-batch was evaluated before "
                "optimizer.step(): evaluate each micro-batch once, with the sum of its losses, "
                "and inside accelerator.accumulate(model); to leave out a step, call cancel() of "
                "SharpnessAwareBackward, or optimizer_of(optimizer).restore()"
            )
        synchronizes = self.accelerator.sync_gradients
        with super().recording(evaluate, batch, modules):
            yield
        if synchronizes:
            self.take_ascents(self.accelerator.scaler)


class SharpnessAwareBackward:
    """Takes the place of `accelerator.backward(loss)` for the optimizers of this library.

    Each call evaluates a micro-batch, as `accelerator.backward(loss_fn(*batch))` would. The last
    one of an accumulation then takes the ascents, for which it evaluates all micro-batches again,
    and leaves the gradient of the descent: what comes after it, `accelerator.clip_grad_norm_` and
    `optimizer.step()`, stays as it is.

        backward = SharpnessAwareBackward(accelerator, model, optimizer)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = backward(loss_fn, batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    Running statistics stay those of x, and so do buffers of modules that `loss_fn` reads. Losses
    keep Accelerate's factors (1 / the number of accumulation steps, the scale of fp16) at all
    weights. The batches of a step are copied and kept until its end. To leave out a step, call
    `backward.cancel()` in place of `optimizer.step()`.

    Args:
        accelerator: accelerator that prepared the others.
        model: model that `accelerator.prepare` returned.
        optimizer: optimizer that `accelerator.prepare` returned, with one of this library inside.

    Raises:
        TypeError: the optimizer is another library's.
        RuntimeError: the engine of DeepSpeed, Megatron-LM or XLA steps for the accelerator.
        ValueError: the optimizer has `release_gradients`.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.window = AcceleratedWindow(accelerator, model, optimizer)

    def __call__(self, loss_fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Evaluate a micro-batch; after the last one of a step, take the ascents.

        Args:
            loss_fn: function that returns the loss of the arguments. It is called again later,
                when variables of the loop have other values: it must take the batch as arguments.
            args, kwargs: arguments of `loss_fn`.

        Returns:
            The loss at x, detached.

        Raises:
            TypeError: `loss_fn` returns no tensor, or takes no argument in an accumulation.
            RuntimeError: the ascents of this step are taken already, or in an accumulation a
                variable that `loss_fn` reads was assigned after its first call, or
                an argument was computed from trained parameters.
        """
        accelerator, window = self.window.accelerator, self.window
        accumulates = accelerator.gradient_accumulation_steps > 1
        if accumulates and not (args or kwargs or isinstance(loss_fn, functools.partial)):
            raise TypeError(
                "a function without arguments would compute the loss of the last micro-batch "
                "when the earlier ones are evaluated again: pass the batch as an argument, "
                "backward(loss_fn, batch)"
            )

        def backward(loss: Tensor) -> None:
            graph = {"create_graph": True} if window.optimizer.needs_graph else {}
            accelerator.backward(loss, **graph)

        return evaluate(window, loss_fn, args, kwargs, backward)

    def cancel(self) -> None:
        """Leave out the step: go back to x, and forget its gradients and micro-batches.

            loss = backward(loss_fn, batch)
            if not torch.isfinite(loss):
                backward.cancel()
                continue

        In the middle of an accumulation, its later micro-batches make a step of their own. With
        several processes, call it in all of them.
        """
        opt, scaler = self.window.optimizer, self.window.accelerator.scaler
        if opt.perturbed:
            opt.restore()
        self.window.clear()
        opt.zero_grad()
        if is_enabled(scaler) and scaler._per_optimizer_states[id(opt)]["found_inf_per_device"]:
            scaler.update()  # it was asked to unscale, as by clip_grad_norm_, and takes no step


def _report_skipped_steps(prepared: Any, opt: EigenfilterOptimizer) -> None:
    """Let Accelerate know of skipped steps, in which schedules of lr must not advance.

    It takes a step for skipped if the scaler does not call `opt.step()`. The scaler always calls
    it, because the optimizers look for a non-finite gradient themselves, in the ascents too.
    """
    if vars(prepared).get(_REPORTS):
        return
    counted = opt.skipped

    def report(*_: Any) -> None:
        nonlocal counted
        before, counted = counted, opt.skipped
        prepared._accelerate_step_called = counted == before

    opt.register_step_post_hook(report)
    vars(prepared)[_REPORTS] = True


def refuse(accelerator: Accelerator, opt: EigenfilterOptimizer) -> None:
    """Raise for what no loop of Accelerate can make right.

    Raises:
        RuntimeError: the engine of DeepSpeed, Megatron-LM or XLA steps for the accelerator.
        ValueError: the optimizer has `release_gradients`.
    """
    if accelerator.distributed_type in _ENGINES:
        raise RuntimeError(
            f"{accelerator.distributed_type.value} reduces gradients and steps in its own engine, "
            "which takes no ascents: train with DDP or FSDP"
        )
    _window.refuse_released(opt)
