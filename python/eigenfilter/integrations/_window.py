"""The micro-batches of a step, which methods with ascents evaluate again at other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from eigenfilter._running_stats import freeze_running_stats
from eigenfilter.integrations._batches import leaves
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.layers import optimizer_of
from eigenfilter.optimizers.randomness import Randomness

__all__ = ["Window", "optimizer_of", "refuse_released", "set_mode"]


def set_mode(optimizer: Any, mode: str) -> None:
    """Call `train` or `eval` of an optimizer that has it, as schedule-free ones have."""
    method = getattr(optimizer_of(optimizer) or optimizer, mode, None)
    if method is not None:
        method()


def refuse_released(optimizer: EigenfilterOptimizer) -> None:
    """Raise ValueError if the optimizer has `release_gradients`."""
    if optimizer.release_gradients:
        raise ValueError(
            "release_gradients=True applies each gradient before the micro-batches are summed "
            "and clipped: leave it False"
        )


class Window:
    """The micro-batches whose gradients a framework accumulates for one step.

    A framework evaluates each micro-batch once, and then forgets it. A method with ascents needs
    the gradient of the whole window at other weights too, so the window keeps a function for each
    micro-batch that evaluates it again:

        with window.recording(evaluate_again):      # for each micro-batch
            ...                                     # the framework's own forward and backward
        with window.descent(grad_scaler):           # takes the ascents
            ...                                     # clipping of the descent's gradient
            opt.step()

    Running statistics stay those of x, and gradients of parameters that the optimizer does not have
    are those of the last evaluation, as its own are. A method whose evaluations must see the same
    random numbers (finite differences) gets them for each micro-batch. A step without ascents keeps
    nothing.

    Args:
        model: model whose running statistics are preserved at perturbed weights.
        optimizer: optimizer of this library.
        keeps_all: whether micro-batches are kept that come while the step has no ascent, for
            frameworks whose schedules set rho for every batch.
        modules: modules outside the model whose buffers are preserved too, as those of a loss.

    Raises:
        ValueError: the optimizer has `release_gradients`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: EigenfilterOptimizer,
        keeps_all: bool = False,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        refuse_released(optimizer)
        self.model = model
        self._frozen = nn.ModuleList([model, *modules]) if modules else model
        self.optimizer = optimizer
        self.keeps_all = keeps_all
        self._evaluations: list[tuple[Callable[[], Any], Randomness | None]] = []
        self._dropped = 0  # micro-batches of this step that came while it had no ascent
        self._clears = 0  # of the optimizer's gradients, when the last micro-batch was recorded

    def __len__(self) -> int:
        """The number of micro-batches that were recorded since the last step."""
        return len(self._evaluations)

    @contextmanager
    def recording(self, evaluate: Callable[[], Any], batch: Any = None) -> Iterator[None]:
        """A context for the first evaluation of a micro-batch, at x.

        Under DDP an evaluation is repeated with or without synchronization, as the first one. If
        the gradients were cleared, earlier micro-batches are forgotten: they have no part in the
        first gradient, as when an epoch begins with `zero_grad()` within a step.

        Args:
            evaluate: function that computes the loss of the micro-batch and calls backward with
                the same factors (of accumulation, of a loss scaler) as the first evaluation, and
                logs nothing. It must not clear gradients. A micro-batch whose first evaluation
                fails is forgotten.
            batch: what the function reads. If a tensor in it is written, or another one takes its
                place, before its second evaluation, that is refused.
        """
        if self._were_cleared():
            self.clear()
        count = len(self)
        with self.optimizer.evaluation():
            if self.keeps_all or self.optimizer.phase == "ascent":
                replays = self.optimizer.perturbation.repeats_random_numbers
                again = _as_now(self.model, evaluate, batch)
                self._evaluations.append((again, self._randomness() if replays else None))
            else:
                self._dropped += 1
            try:
                yield
            except BaseException:
                del self._evaluations[count:]
                raise
            finally:
                # A framework may clear between the forward and the backward pass of the first one.
                self._clears = self.optimizer._step_state.clears

    def take_ascents(self, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        """Take all ascents of the step; the gradients of the descent are left in `.grad`.

        If an evaluation fails, x is restored, and the window is empty.

        Args:
            grad_scaler: scaler whose scale the gradients carry.

        Raises:
            RuntimeError: the method had no ascent when a micro-batch of this step was recorded, and
                has one now.
        """
        opt = self.optimizer
        try:
            if self._dropped and opt.phase == "ascent":
                raise RuntimeError(
                    f"rho was 0 for the first {self._dropped} micro-batches of a step, and is not "
                    "now: they were not kept, so that the step cannot take its ascents. Change rho "
                    "between steps, or begin its schedule above 0"
                )
            while opt.ascend(grad_scaler):
                self._clear_others()
                with freeze_running_stats(self._frozen):
                    self._evaluate()
        except BaseException:
            if opt.perturbed:
                opt.restore()
            raise
        finally:
            self.clear()

    @contextmanager
    def descent(self, grad_scaler: torch.amp.GradScaler | None = None) -> Iterator[None]:
        """Take all ascents of the step; a context for clipping and for the step itself.

        If it is left without a step, by an exception too, x is restored. The argument and the
        errors are those of `take_ascents`, which is for frameworks that clip and step elsewhere.
        """
        self.take_ascents(grad_scaler)
        try:
            yield
        finally:
            if self.optimizer.perturbed:
                self.optimizer.restore()

    def _clear_others(self) -> None:
        """Clear the gradients of the model's other parameters, as `ascend` clears its own.

        Each evaluation adds to them. Another optimizer may train them, and a framework may clip by
        a norm that includes them.
        """
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for p in self.model.parameters():
            if id(p) not in own:
                p.grad = None

    def clear(self) -> None:
        """Forget the micro-batches, as when the framework skips the step."""
        self._evaluations.clear()
        self._dropped = 0

    def _were_cleared(self) -> bool:
        opt = self.optimizer
        if len(self) + self._dropped == 0 or opt._step_state.clears != self._clears:
            return True
        return all(p.grad is None for group in opt.param_groups for p in group["params"])

    def _evaluate(self) -> None:
        opt = self.optimizer
        repeats = opt.perturbation.repeats_random_numbers
        replays = repeats and opt._step_state.ascents_taken == 1
        after = self._randomness() if replays else None
        with torch.enable_grad(), opt.evaluation():
            for evaluate, randomness in self._evaluations:
                if replays and randomness is not None:
                    randomness.replay()
                evaluate()
        if after is not None:  # as if nothing had been replayed
            after.replay()

    def _randomness(self) -> Randomness:
        return Randomness(p for group in self.optimizer.param_groups for p in group["params"])


def _as_now(model: nn.Module, evaluate: Callable[[], Any], batch: Any) -> Callable[[], Any]:
    """An evaluation on the same values, and with DDP's synchronization, as they are now."""
    tensors = list(leaves(batch))
    # Ascents write to parameters, which a batch may hold.
    counted = [t for t in tensors if not (t.is_inference() or (t.requires_grad and t.is_leaf))]
    versions = [t._version for t in counted]
    ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    is_synchronized = ddp is not None and ddp.require_backward_grad_sync

    def again() -> None:
        now = list(leaves(batch))
        if len(now) != len(tensors) or any(a is not b for a, b in zip(now, tensors, strict=True)):
            raise RuntimeError(
                "An entry of the batch was replaced, added or removed after the step had first "
                "evaluated it, and a method with ascents evaluates it again: let the model, the "
                "loss and the training loop leave their batch as it is, or work on a copy of it"
            )
        if versions != [t._version for t in counted]:
            raise RuntimeError(
                "A tensor of the batch was written in place after the step had first evaluated it, "
                "and a method with ascents evaluates it again: let the model, the loss and the "
                "training loop leave their batch as it is, or work on a clone of it"
            )
        with nullcontext() if ddp is None or is_synchronized else ddp.no_sync():
            evaluate()

    return again
