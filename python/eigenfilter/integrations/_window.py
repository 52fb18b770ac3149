"""The micro-batches of a step, which methods with ascents evaluate again at other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from eigenfilter._running_stats import freeze_running_stats
from eigenfilter.integrations._batches import copy_of
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


class _MicroBatch(NamedTuple):
    """A micro-batch that is evaluated again.

    Attributes:
        evaluate: function that computes the loss of a batch and calls backward.
        batch: copy of the batch as it was before its first evaluation.
        randomness: states of the generators at its first evaluation, where the method needs them.
    """

    evaluate: Callable[[Any], object]
    batch: Any
    randomness: Randomness | None


class Window:
    """The micro-batches whose gradients a framework accumulates for one step.

    A framework evaluates each micro-batch once, and then forgets it. A method with ascents needs
    the gradient of the whole window at other weights too, so the window keeps a copy of each
    micro-batch, and the function that evaluates it:

        with window.recording(evaluate, batch):     # for each micro-batch
            ...                                     # the framework's own forward and backward
        with window.descent(grad_scaler):           # takes the ascents
            ...                                     # clipping of the descent's gradient
            opt.step()

    Each later evaluation gets a copy of its own, so that a model, a loss or a loop may change its
    batch. Running statistics stay those of x, and gradients of parameters that the optimizer does
    not have are those of the last evaluation, as its own are. A method whose evaluations must see
    the same random numbers (finite differences) gets them for each micro-batch. Processes reduce
    their gradients once an evaluation of the window, in its last micro-batch. A step without
    ascents keeps nothing.

    Args:
        model: model whose running statistics are preserved at perturbed weights.
        optimizer: optimizer of this library.
        no_sync: function that returns a context in which processes do not reduce gradients; by
            default the method of a model under DDP.
        keeps_all: whether micro-batches are kept that come while the step has no ascent, for
            frameworks whose schedules set rho for every batch.

    Raises:
        ValueError: the optimizer has `release_gradients`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: EigenfilterOptimizer,
        *,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
        keeps_all: bool = False,
    ) -> None:
        refuse_released(optimizer)
        self.model = model
        self.optimizer = optimizer
        self.keeps_all = keeps_all
        if no_sync is None and isinstance(model, nn.parallel.DistributedDataParallel):
            no_sync = model.no_sync
        self._no_sync = no_sync or nullcontext
        self._micro_batches: list[_MicroBatch] = []
        self._modules: dict[nn.Module, None] = {}  # outside the model, of the step's losses
        self._dropped = 0  # micro-batches of this step that came while it had no ascent
        self._clears = 0  # of the optimizer's gradients, when the last micro-batch was recorded

    def __len__(self) -> int:
        """The number of micro-batches that were recorded since the last step."""
        return len(self._micro_batches)

    @property
    def keeps(self) -> bool:
        """Whether a micro-batch that is recorded now is evaluated again."""
        opt = self.optimizer
        return opt.phase == "ascent" or (self.keeps_all and opt.perturbation.count > 0)

    @contextmanager
    def recording(
        self, evaluate: Callable[[Any], object], batch: Any, modules: Iterable[Any] = ()
    ) -> Iterator[None]:
        """A context for the first evaluation of a micro-batch, at x.

        If the gradients were cleared, earlier micro-batches are forgotten: they have no part in the
        first gradient, as when an epoch begins with `zero_grad()` within a step.

        Args:
            evaluate: function that computes the loss of a micro-batch and calls backward with the
                same factors (of accumulation, of a loss scaler) as the first evaluation, and logs
                nothing. It must not clear gradients. A micro-batch whose first evaluation fails is
                forgotten.
            batch: argument of the function, which gets copies of it.
            modules: modules outside the model whose buffers are preserved too, as those of a loss;
                what is no module is ignored.

        Raises:
            RuntimeError: the micro-batch is kept, and a tensor in it was computed from one that
                requires grad.
        """
        if self._were_cleared():
            self.clear()
        count = len(self)
        with self.optimizer.evaluation():
            if self.keeps:
                replays = self.optimizer.perturbation.repeats_random_numbers
                randomness = self._randomness() if replays else None
                self._micro_batches.append(_MicroBatch(evaluate, copy_of(batch), randomness))
                self._modules |= dict.fromkeys(m for m in modules if isinstance(m, nn.Module))
            else:
                self._dropped += 1
            try:
                yield
            except BaseException:
                del self._micro_batches[count:]
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
            frozen = nn.ModuleList([self.model, *self._modules])
            while opt.ascend(grad_scaler):
                self._clear_others()
                with freeze_running_stats(frozen):
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
        self._micro_batches.clear()
        self._modules.clear()
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
            for position, micro_batch in enumerate(self._micro_batches, 1):
                if replays and micro_batch.randomness is not None:
                    micro_batch.randomness.replay()
                with nullcontext() if position == len(self) else self._no_sync():
                    micro_batch.evaluate(copy_of(micro_batch.batch))
        if after is not None:  # as if nothing had been replayed
            after.replay()

    def _randomness(self) -> Randomness:
        return Randomness(p for group in self.optimizer.param_groups for p in group["params"])
