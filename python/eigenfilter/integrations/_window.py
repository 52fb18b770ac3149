"""The micro-batches of a step, which methods with ascents evaluate again at other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eigenfilter._running_stats import freeze_running_stats
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.randomness import Randomness

# Where the wrappers of frameworks keep the optimizer that they wrap.
_INNER = ("optimizer", "_optimizer", "_base_optimizer", "opt")


def optimizer_of(optimizer: Any) -> EigenfilterOptimizer | None:
    """The optimizer of this library in the wrappers of a framework; None if it is another's."""
    while optimizer is not None:
        if isinstance(optimizer, EigenfilterOptimizer):
            return optimizer
        inner = (vars(optimizer).get(name) for name in _INNER)
        optimizer = next((o for o in inner if isinstance(o, torch.optim.Optimizer)), None)
    return None


def set_mode(optimizer: Any, mode: str) -> None:
    """Call `train` or `eval` of an optimizer that has it, as schedule-free ones have."""
    method = getattr(optimizer_of(optimizer) or optimizer, mode, None)
    if method is not None:
        method()


class Window:
    """The micro-batches whose gradients a framework accumulates for one step.

    A framework evaluates each micro-batch once, and then forgets it. A method with ascents needs
    the gradient of the whole window at other weights too, so the window keeps a function for each
    micro-batch that evaluates it again:

        with window.recording(evaluate_again):      # for each micro-batch
            ...                                     # the framework's own forward and backward
        window.take_ascents(grad_scaler)            # leaves the descent's gradient
        ...                                         # clipping
        opt.step()

    Running statistics stay those of x. A method whose evaluations must see the same random numbers
    (finite differences) gets them for each micro-batch. A step without ascents keeps nothing.

    Args:
        model: model whose running statistics are preserved at perturbed weights.
        optimizer: optimizer of this library.
        keeps_all: whether micro-batches are kept that come while the step has no ascent, for
            frameworks whose schedules set rho for every batch.
        modules: modules outside the model whose buffers are preserved too, as those of a loss.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: EigenfilterOptimizer,
        keeps_all: bool = False,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.model = model
        self._frozen = nn.ModuleList([model, *modules]) if modules else model
        self.optimizer = optimizer
        self.keeps_all = keeps_all
        self._evaluations: list[tuple[Callable[[], Any], Randomness | None]] = []
        self._dropped = 0  # micro-batches of this step that came while it had no ascent

    def __len__(self) -> int:
        """The number of micro-batches that were recorded since the last step."""
        return len(self._evaluations)

    @contextmanager
    def recording(self, evaluate: Callable[[], Any], batch: Any = None) -> Iterator[None]:
        """A context for the first evaluation of a micro-batch, at x.

        Under DDP an evaluation is repeated with or without synchronization, as the first one.

        Args:
            evaluate: function that computes the loss of the micro-batch and calls backward with
                the same factors (of accumulation, of a loss scaler) as the first evaluation, and
                logs nothing. It must not clear gradients. A micro-batch whose first evaluation
                fails is forgotten.
            batch: what the function reads, in containers; a tensor in it that is written before
                its second evaluation is refused.
        """
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
                with freeze_running_stats(self._frozen):
                    self._evaluate()
        except BaseException:
            if opt.perturbed:
                opt.restore()
            raise
        finally:
            self.clear()

    def clear(self) -> None:
        """Forget the micro-batches, as when the framework skips the step."""
        self._evaluations.clear()
        self._dropped = 0

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
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and not t.is_inference()]
    versions = [t._version for t in tensors]
    ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    is_synchronized = ddp is not None and ddp.require_backward_grad_sync

    def again() -> None:
        if versions != [t._version for t in tensors]:
            raise RuntimeError(
                "A tensor of the batch was written in place after the step had first evaluated it, "
                "and a method with ascents evaluates it again: let the model, the loss and the "
                "training loop leave their batch as it is, or work on a clone of it"
            )
        with nullcontext() if ddp is None or is_synchronized else ddp.no_sync():
            evaluate()

    return again
