"""Released gradients: each is used and freed while backward still computes the others."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # does not import the compiler, as torch.compiler does
from torch.autograd import graph

from eigenfilter import _callers, _core, _distributed, _perturbation
from eigenfilter.optimizers._step_state import retry_on_layout_change
from eigenfilter.optimizers._waiting import WaitingGradients, version
from eigenfilter.optimizers.amp import AmpState, is_enabled
from eigenfilter.optimizers.buckets import Gradients, ParamBucket, ParamBuckets, placed_as_params

BATCH_BYTES = 1 << 20
"""How many bytes of gradients wait for each other, so that small parameters share a kernel call."""


class BatchBuckets:
    """Buckets of parameters whose gradients come together.

    Backward computes gradients in the same order at every step, as a rule, so that the same
    buckets come again.

    Args:
        built: the buckets of all parameters.

    Attributes:
        sizes: the bytes that each parameter takes in this process, by its id.
    """

    def __init__(self, built: Sequence[ParamBucket]) -> None:
        self.built = built
        pairs = [(p, _distributed.local(p)) for bucket in built for p in bucket.params]
        self.sizes = {id(p): t.numel() * t.element_size() for p, t in pairs}
        self._kept: dict[tuple[int, ...], list[ParamBucket]] = {}  # by their parameters' ids

    def gradients(self, grads: Mapping[int, Tensor]) -> Gradients:
        """Gradients by their parameters' ids, with their buckets."""
        key = tuple(grads)
        if key not in self._kept:
            if sum(map(len, self._kept)) > 8 * len(self.sizes):
                self._kept.clear()  # the order comes and goes at random: bound the cache
            split = [(b, [p for p in b.params if id(p) in grads]) for b in self.built]
            self._kept[key] = [ParamBucket(b.group, b.number, p, b.store) for b, p in split if p]
        kept = self._kept[key]
        return [(b, placed_as_params(b, [grads[id(p)] for p in b.params])) for b in kept]

    def idle_ids(self) -> set[int]:
        """Ids of the parameters that an ascent leaves as they are."""
        return {id(p) for bucket in self.built if not bucket.ascends for p in bucket.params}

    def have_layout(self) -> bool:
        """Whether the parameters are laid out in memory as when these were last perturbed."""
        kept = [bucket for batch in self._kept.values() for bucket in batch if bucket.ascends]
        try:
            for b in kept:
                _core.check(("params", "backups"), (b.tensors, b.backups()), (True, True))
        except _core.LayoutError:
            return False
        return True


class GradientRelease:
    """Ascents and updates that are taken in hooks, inside the context `during_backward`.

    The hook of a parameter runs after all its uses have been differentiated, so that backward needs
    its value no more. Where it does, because the use was detached, autograd finds the parameter's
    version changed and raises. It does not notice, and computes with the new value, where backward
    recomputes a segment (activation checkpointing) from a detached parameter, or where the use
    counts no versions (`w.data`, or a custom `torch.autograd.Function` that holds w as `ctx.w`).

    Args:
        buckets: the buckets of the optimizer.
        amp: the loss scale and the flags of its steps, of which these steps have none.

    Attributes:
        ascended_ids: ids of the parameters that backward has perturbed, until `ascend` ends it.
        updated_ids: ids of the parameters that this step has updated.
    """

    def __init__(self, buckets: ParamBuckets, amp: AmpState) -> None:
        self.ascended_ids: set[int] = set()
        self.updated_ids: set[int] = set()
        self._buckets = buckets
        self._amp = amp
        self._batches: BatchBuckets | None = None
        self._inside = False
        self._has_warned = False
        # The gradients that the last backward pass has left, with their versions, by parameter.
        self._rest: dict[int, tuple[Tensor, int]] = {}

    @contextmanager
    def during_backward(self, optimizer: Any) -> Iterator[None]:
        """A context in which the gradients of the optimizer's parameters are released.

        Raises:
            RuntimeError: gradients are not reduced over the ranks yet while backward runs; compiled
                autograd computes them all at once; or a backward pass has taken the ascent already.
        """
        if self._inside:
            yield
            return
        backward = self._begin(optimizer)
        self._inside = True
        try:
            yield
            backward.end()
        except BaseException:
            backward.cancel()
            raise
        finally:
            self._inside = False
            backward.remove_hooks()

    @_disable_dynamo
    def _begin(self, optimizer: Any) -> _Backward:
        """Prepare a backward pass that ascends or updates, by the optimizer's phase."""
        if self.ascended_ids:
            optimizer._restore()
            raise RuntimeError(_SECOND)
        optimizer._check_groups()
        buckets, ascends = self._buckets, optimizer.phase == "ascent"
        if not self.updated_ids:
            buckets.refresh(optimizer)
        _refuse_partial_gradients(optimizer._params(), buckets.are_shards)
        if ascends:
            optimizer._refuse_ascent()
        if not buckets.perturbed:  # an ascent has begun the step
            self._amp.begin()
            if not self.batches().have_layout():  # an ascent in parts cannot change it on the way
                buckets.build()
        return _Backward(optimizer, ascends)

    def batches(self) -> BatchBuckets:
        """Buckets of batches, for the optimizer's present ones."""
        if self._batches is None or self._batches.built is not self._buckets.built:
            self._batches = BatchBuckets(self._buckets.built)
        return self._batches

    def forget(self) -> None:
        """Forget the step, which has ended."""
        self.ascended_ids.clear()
        self.updated_ids.clear()
        self._rest.clear()

    def record_rest(self, optimizer: Any) -> None:
        """Record the gradients that are left after a backward pass, which are used whole."""
        pairs = ((id(p), p.grad) for p in optimizer._params())
        self._rest = {key: (g, version(g)) for key, g in pairs if g is not None}

    def refuse_scaler(self, scaler: torch.amp.GradScaler | None) -> None:
        """Raise RuntimeError for a scaler, which needs all gradients before the first is used."""
        if is_enabled(scaler):
            raise RuntimeError(_UNSCALED)

    def refuse_unfinished(self, gradients: Gradients) -> None:
        """Raise RuntimeError for a descent before its backward pass, or after another one."""
        if self.ascended_ids:
            raise RuntimeError(
                "step() was called after a backward pass that has taken an ascent "
                "(release_gradients=True), without ascend(): go on with `while opt.ascend():` and "
                "the closure inside `with opt.evaluation():`, or go back to x with restore()"
            )
        self._refuse_second(gradients)

    def check_ascent(self, optimizer: Any, gradients: Gradients) -> None:
        """Refuse second gradients; warn, once, that those of an ascent were not released."""
        self._refuse_second(gradients)
        if optimizer.release_gradients and optimizer.perturbation.is_elementwise:
            self._warn_of_whole(any(bucket.ascends for bucket, _ in gradients))

    def check_descent(self, optimizer: torch.optim.Optimizer, has_gradients: bool) -> None:
        """Refuse a GradScaler's step; warn, once, that a step's gradients were not released."""
        if "found_inf" in vars(optimizer):
            raise RuntimeError(_UNSCALED)
        self._warn_of_whole(has_gradients)

    def _refuse_second(self, gradients: Gradients) -> None:
        """Raise RuntimeError if a gradient has come or changed after others were released."""
        if not (self.ascended_ids or self.updated_ids):
            return
        for p in (p for bucket, _ in gradients for p in bucket.params):
            g, recorded = self._rest.get(id(p), (None, 0))
            if p.grad is not g or (g is not None and version(g) != recorded):
                raise RuntimeError(_SECOND)

    def _warn_of_whole(self, has_gradients: bool) -> None:
        if has_gradients and not (self._has_warned or self.ascended_ids or self.updated_ids):
            self._has_warned = True
            warnings.warn(
                "release_gradients=True released nothing in this step: use step(closure), or call "
                "the closure inside `with opt.evaluation():`",
                stacklevel=_callers.stacklevel(),
            )


class _Backward:
    """One backward pass, whose gradients are used in batches and dropped.

    Gradients of groups that take no ascent are dropped in an ascent, too, but not before the first
    gradient of one that does: if there is none, they are the descent's.

    Args:
        optimizer: the optimizer.
        ascends: whether the pass takes an ascent; otherwise it updates.
    """

    def __init__(self, optimizer: Any, ascends: bool) -> None:
        self._optimizer = optimizer
        self._buckets: ParamBuckets = optimizer._buckets
        self._release: GradientRelease = optimizer._release
        self._ascends = ascends
        # Ids of the parameters whose gradients were used, and of those that had one.
        self._done = self._release.ascended_ids if ascends else self._release.updated_ids
        self._seen: set[int] = set()
        self._is_second = bool(self._done)  # a pass has released gradients of this phase already
        self._sizes = self._release.batches().sizes
        self._idle_ids = self._release.batches().idle_ids() if ascends else set()
        self._idle: list[Tensor] = []
        self._waiting: dict[Any, WaitingGradients] = {}  # by the stream that a GPU computes on
        self._tasks: set[int] = set()  # autograd's numbers of the passes
        self._thread = threading.get_ident()
        self._lock = threading.Lock()  # backward has a thread for each GPU
        self._error: BaseException | None = None
        self._hooks = [
            p.register_post_accumulate_grad_hook(self.on_gradient)
            for p in optimizer._params()
            if p.requires_grad
        ]

    @_disable_dynamo
    def on_gradient(self, p: Tensor) -> None:
        """Use a gradient that is complete, or have it wait for more."""
        with self._lock:
            if self._error is not None or (g := p.grad) is None:
                return
            try:
                self._add(p, g)
            except BaseException as error:
                self._error = error
                raise

    @_disable_dynamo
    def end(self) -> None:
        """Use the gradients that still wait; backward has ended."""
        if self._error is not None:  # the closure has caught it
            raise self._error
        for waiting in self._waiting.values():
            waiting.refuse_changed()
        for order, waiting in self._waiting.items():
            self._use(waiting, order)
        if self._seen:
            self._release.record_rest(self._optimizer)

    @_disable_dynamo
    def cancel(self) -> None:
        """Restore what an ascent has perturbed, and drop all gradients, of which some are gone."""
        if self._seen:
            if self._ascends:
                self._optimizer._restore()
            self._optimizer._clear_gradients()

    @_disable_dynamo
    def remove_hooks(self) -> None:
        """End the context, after which FSDP2 may gather changed shards again."""
        for hook in self._hooks:
            hook.remove()
        self._error = None  # its traceback holds gradients, and this object
        if self._buckets.are_shards and self._done:
            _distributed.reshard()

    def _add(self, p: Tensor, g: Tensor) -> None:
        key, task = id(p), torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._add_task(task)
        is_second = self._is_second or key in self._seen
        self._seen.add(key)
        if is_second:
            raise RuntimeError(_SECOND)
        if key in self._idle_ids:
            if self._waiting:
                p.grad = None
            else:
                self._idle.append(p)
            return
        _core.clear_gradients(self._idle)
        self._idle.clear()
        order = torch.cuda.current_stream(p.device) if p.is_cuda else None
        waiting = self._waiting.get(order) or self._waiting.setdefault(order, WaitingGradients())
        waiting.add(p, g, self._sizes[key])
        if task < 0:  # backward has ended
            waiting.record([p])
        if (batch := waiting.take(BATCH_BYTES)) is not None:
            self._use(batch, order)

    def _add_task(self, task: int) -> None:
        """Add a pass that autograd runs; raise RuntimeError if it came after another had ended.

        Passes are numbered. One that reentrant checkpointing runs within another has a higher
        number than that, and calls on its stack.
        """
        if task < 0:  # FSDP2 calls hooks when backward has ended
            return
        if any(other < task for other in self._tasks) and self._is_outermost():
            raise RuntimeError(_SECOND)
        self._tasks.add(task)
        # Not earlier: gradients may be views of one tensor, whose version counts changes of any.
        torch.autograd.Variable._execution_engine.queue_callback(self._record)

    def _record(self) -> None:
        with self._lock:
            for waiting in self._waiting.values():
                waiting.record(waiting.params)

    def _is_outermost(self) -> bool:
        """Whether no backward pass is running in which the present one was called."""
        code, frame, calls = graph._engine_run_backward.__code__, sys._getframe(), 0
        while (back := frame.f_back) is not None:
            frame = back
            calls += frame.f_code is code
        # The pass itself was called in this thread, or in another one that waits for it.
        return calls == (threading.get_ident() == self._thread)

    def _use(self, batch: WaitingGradients, order: Any) -> None:
        """Ascend or update along the gradients of a batch, and drop them."""
        self._apply(batch)
        if batch.params[0].is_cuda:
            self._hold_memory(batch, order)
        self._done.update(batch.grads)
        _core.clear_gradients(batch.params)

    @retry_on_layout_change
    @torch.no_grad()
    def _apply(self, batch: WaitingGradients) -> None:
        optimizer = self._optimizer
        gradients = self._release.batches().gradients(batch.grads)
        if self._ascends:
            _perturbation.enter(optimizer)
            index = optimizer._step_state.ascents_taken
            self._buckets.perturb(gradients, partial(optimizer.perturbation.perturb, index))
        else:
            optimizer._apply(gradients)
        self._buckets.mark_written([bucket for bucket, _ in gradients], in_backward=True)

    def _hold_memory(self, batch: WaitingGradients, order: Any) -> None:
        """Keep gradients' memory until the present stream has read it, if it is not their own."""
        stream = torch.cuda.current_stream(batch.params[0].device)
        if stream != order or _distributed.is_dtensor(batch.params[0]):
            for g in batch.grads.values():
                _distributed.local(g).record_stream(stream)


def _refuse_partial_gradients(params: Sequence[Tensor], are_shards: bool) -> None:
    """Raise RuntimeError where hooks do not see one parameter's whole gradient after another."""
    if are_shards or _distributed.is_parallel():
        reduced = _distributed.ids_reduced_in_backward()
        if not all(id(p) in reduced for p in params if p.requires_grad):
            raise RuntimeError(
                "release_gradients=True uses gradients before DDP or tensor parallelism reduce "
                "them, or FSDP2 has copied them to pinned memory: leave it False in a distributed "
                "job, or have FSDP2 (fully_shard) shard all parameters, without pin_memory"
            )
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if getattr(compiled, "compiled_autograd_enabled", False):
        raise RuntimeError(
            "release_gradients=True frees each gradient before the next is made, and compiled "
            "autograd computes all of them in one graph: leave it False, or leave compiled "
            "autograd off"
        )


_UNSCALED = (
    "release_gradients=True applies each gradient before a GradScaler has looked at all of them: "
    "leave it False, or train in bfloat16 without a scaler"
)
_SECOND = (
    "a second gradient arrived for a parameter whose first one release_gradients=True has used "
    "and dropped, or a second backward pass ran in an evaluation or after it: call backward() once "
    "in an evaluation, on the sum of its losses, then ascend(), step() or restore(). Gradients to "
    "accumulate come before it, outside `with opt.evaluation():`. Checkpointed segments that share "
    "a parameter need use_reentrant=False"
)
