"""The function f to differentiate: a model's loss on a batch, the same at every evaluation."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eigenfilter import _distributed
from eigenfilter.curvature.loss import embeddings
from eigenfilter.curvature.loss.autograd_graph import reachable_leaves
from eigenfilter.curvature.loss.batch_sources import BatchWeightError, UnusableModelError
from eigenfilter.curvature.loss.batch_trees import (
    is_divisible,
    leaves,
    micro_batches,
    rows_of,
    samples_of,
    to_device,
    to_dtype,
)
from eigenfilter.curvature.loss.contexts import (
    FUSED_OPERATIONS,
    differentiable_kernels,
    no_requires_grad,
    replaceable,
    replay_random_numbers,
    spared_buffers,
)
from eigenfilter.curvature.loss.gradient_coverage import check_gradient_coverage
from eigenfilter.curvature.loss.weights import Weights, check_values, logging_failures

_logger = logging.getLogger(__name__)


_SEVERAL = "whose input is a tuple here. Several batches go in a list: pass list(data)."

REWRITTEN = (
    "the forward pass writes to the parameter {0}, which changes x. For F.embedding(max_norm=...) "
    "use nn.Embedding(max_norm=...), whose rows an operator leaves unchanged; or write to "
    "parameters outside of the forward pass"
)

Outer = Callable[[Tensor], Tensor]


class Evaluation(NamedTuple):
    """f on a batch, f_b, at some parameters x.

    Without `outer`, f_b(x) = value(x), and the matrix is its Hessian. With `outer`,
    f_b(x) = outer(value(x)), and the matrix is J^T outer'' J with the Jacobian J of `value`.

    It must be differentiated inside `around()`: backward may call modules again
    (torch.utils.checkpoint), which must be in the state that the forward pass found.
    """

    value: Tensor
    outer: Outer | None
    weight: Callable[[], float]  # w_b, checked once against the loss; 0: leave the batch out
    unchecked_weight: Callable[[], float]  # w_b without the check
    around: Callable[[], AbstractContextManager[None]]
    holders: Sequence[Tensor] | None = None  # see `first_derivatives.vector_jacobian`

    def total(self) -> Tensor:
        """Return f_b, one number."""
        return self.value if self.outer is None else self.outer(self.value)


@dataclass
class ObjectiveTraits:
    """Properties of f that evaluations have shown."""

    evaluated: bool = False  # whether f has been evaluated
    # Index and number of samples of the batches whose first evaluation was checked.
    checked_batches: set[tuple[int, int | None]] = field(default_factory=set)
    fused_ops: set[str] = field(default_factory=set)  # those of `FUSED_OPERATIONS` that f uses
    needs_requires_grad: bool = False  # f differs, or fails, if no parameter requires grad
    by_backward: bool = False  # gradients come by backward() alone, not by torch.autograd.grad


def one_number(loss: object) -> Tensor:
    """Return a loss of one element as a tensor [].

    Raises:
        ValueError: it is not a tensor of one element.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn must return a tensor of one element, not {shape}: reduce it over samples by "
            "their mean, as torch's losses do at their default reduction"
        )
    return loss.reshape(())


class Objective:
    """A model with its loss as a function of the parameters, evaluated batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        finish: Callable[[Callable[..., Tensor], Any, Any, bool], tuple[Tensor, Outer | None]],
        *,
        forward: Callable[[nn.Module, Any], tuple[Any, Any]] | None,
        weight: Callable[[Any], float] | None,
        mean: bool,
        train: bool,
        autocast: torch.dtype | None,
        seed: int,
        alone: bool,
    ) -> None:
        """Prepare; most arguments are those of `operators.base.CurvatureOperator`.

        Args:
            finish: function (loss_fn, output, target, mean) -> (value, outer) of an `Evaluation`.
            mean: whether batches are averaged, not summed.
            train: whether the mode is "train".
            alone: whether no other process has data.
        """
        self.tree = _Tree([m for m in (model, loss_fn) if isinstance(m, nn.Module)])
        self.mean = mean
        self.autocast = autocast
        self.model = model
        self.traits = ObjectiveTraits()
        self.watched: Sequence[Tensor] = ()  # parameters that must get a gradient if f uses them
        self.foreign: frozenset[int] = frozenset()  # ids of the originals, if this is a copy
        self._dtype: torch.dtype | None = None
        self._loss_fn = loss_fn
        self._finish = finish
        self._forward = forward
        self._alone = alone and not _distributed.is_fsdp(self.tree)
        self._weight = weight
        self._weights = Weights(weight, self._total, alone=self._alone)
        self._first_error: str | None = None  # why the weight of the first batch is wrong
        self._checked: set[tuple[int, int]] = set()  # batches whose weights agree with the loss
        self._train = train
        self._seed = seed

    def names(self, params: Iterable[Tensor]) -> list[str]:
        """Return the names by which `at` of `evaluate` refers to these parameters."""
        names_by_id = {id(p): name for name, p in self.tree.named_parameters()}
        return [names_by_id[id(p)] for p in params]

    def public_names(self, params: Iterable[Tensor]) -> list[str]:
        """Return the names of parameters as the user knows them, for messages."""
        names = (name.removeprefix("members.0.") for name in self.names(params))
        return [name.replace("members.1.", "loss_fn.", 1) for name in names]

    def with_dtype(self, dtype: torch.dtype) -> Objective:
        """Return an objective of copies of the modules, whose floating tensors have `dtype`.

        Raises:
            ValueError: they cannot be copied.
        """
        clone = copy.copy(self)
        own = (self.model, self._loss_fn, self._forward, self._weight)
        try:
            # In one call, so that references between them are kept.
            clone.model, clone._loss_fn, clone._forward, clone._weight = copy.deepcopy(own)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"the model or the loss cannot be copied for dtype={dtype} ({error}): convert "
                "the model yourself, and leave dtype out"
            ) from error
        clone.tree = _Tree([m for m in (clone.model, clone._loss_fn) if isinstance(m, nn.Module)])
        clone.tree.to(dtype)
        clone.watched = [clone.tree.get_parameter(name) for name in self.names(self.watched)]
        clone._weights = Weights(clone._weight, clone._total, alone=clone._alone)
        clone.foreign = frozenset(id(p) for p in self.tree.parameters())
        clone._dtype = dtype
        return clone

    def evaluate(
        self,
        index: int,
        batch: Any,
        at: Mapping[str, Tensor] | None = None,
        *,
        exact: bool = True,
    ) -> Evaluation:
        """Return f on a batch, with its graph.

        Args:
            index: index of the batch, which determines its random numbers.
            batch: the batch.
            at: values to use in place of parameters, by name.
            exact: whether it will be differentiated twice, so that operations which do not allow
                that are replaced by equivalent ones.

        Raises:
            UnusableModelError: from the first evaluation of each batch, see
                `check_gradient_coverage`; or the forward pass writes to a parameter.
        """
        versions = [p._version for p in self.watched]
        here = self.plain(index, batch, at, exact=exact)
        if at is not None:
            return here
        key = index, samples_of(batch)  # a part of the batch does not tell of the rest
        new = key not in self.traits.checked_batches
        if new and versions != [p._version for p in self.watched]:
            pairs = zip(self.watched, versions, strict=True)
            name = self.public_names(p for p, version in pairs if p._version != version)[0]
            raise UnusableModelError(REWRITTEN.format(name))
        if exact and self._meets_fused_ops([here.value]):
            here = self.plain(index, batch, exact=exact)
        if not self.traits.evaluated:
            self._try_frozen(index, batch, here, exact=exact)
        if new:
            if check_gradient_coverage(self, index, batch, here, exact=exact):
                here = self.plain(index, batch, exact=exact)
            self.traits.checked_batches.add(key)
            self.traits.evaluated = True
        return here

    def value(self, index: int, batch: Any, *, exact: bool = True) -> Evaluation:
        """Return f on a batch, without a graph.

        Gradients stay enabled, because f may compute some itself. Parameters do not require grad
        meanwhile, which saves memory, unless f depends on that or differentiates with respect to
        them.
        """
        if not (self.traits.needs_requires_grad or self.traits.by_backward):
            try:
                with no_requires_grad(self.tree):
                    return _detach(self.plain(index, batch, exact=exact))
            except RuntimeError:  # autograd's; if it has another cause, it is raised again below
                self.traits.needs_requires_grad = True
        return _detach(self.plain(index, batch, exact=exact))

    def _try_frozen(self, index: int, batch: Any, here: Evaluation, *, exact: bool) -> None:
        """Record whether f is the same, bit for bit, if parameters do not require grad."""
        if not self.watched or self.traits.needs_requires_grad:
            return  # nothing is watched in a sharded model, of which only gradients are computed
        try:
            with warnings.catch_warnings(), no_requires_grad(self.tree):
                # Reentrant checkpointing warns here, and is noticed later.
                warnings.simplefilter("ignore")
                frozen = _detach(self.plain(index, batch, exact=exact)).value
        except Exception:  # of any kind: the model depends on requires_grad
            self.traits.needs_requires_grad = True
            return
        self.traits.needs_requires_grad |= not torch.equal(frozen, here.value.detach())

    def plain(
        self,
        index: int,
        batch: Any,
        at: Mapping[str, Tensor] | None = None,
        *,
        exact: bool = True,
    ) -> Evaluation:
        """Evaluate f on a batch as `evaluate` does, once and without checks."""
        replacements = frozenset(self.traits.fused_ops) if exact else frozenset()

        def run() -> Evaluation:
            return self._evaluate(index, batch, replacements)

        with self._surroundings(index, replacements), torch.enable_grad():
            return run() if at is None else functional_call(self.tree, dict(at), (run,))

    def _evaluate(self, index: int, batch: Any, replacements: frozenset[str]) -> Evaluation:
        if self._dtype is not None:
            batch = to_dtype(batch, self._dtype)
        if self._forward is None:
            x, target = to_device(batch, self._device)
            try:
                output = self.model(x)
            except (TypeError, AttributeError) as error:
                if isinstance(x, list | tuple):
                    error.add_note(f"Data in a tuple are one (input, target), {_SEVERAL}")
                raise
        else:
            output, target = self._forward(self.model, batch)
        value, outer = self._finish(self._loss_fn, output, target, self.mean)

        def outer_in_context(z: Tensor) -> Tensor:
            assert outer is not None
            fused_ops = replacements | self.traits.fused_ops
            with self._surroundings(index, fused_ops), torch.enable_grad():
                loss = outer(z)
            return outer_in_context(z) if self._meets_fused_ops([loss]) else loss

        return Evaluation(
            value,
            None if outer is None else outer_in_context,
            _weighing(lambda: self._weigh(index, batch, output, target)),
            _weighing(lambda: self._weights.of(batch, output) if self.mean else 1.0),
            lambda: self.around(index, replacements),
            self._holders(batch, value) if self.traits.by_backward else None,
        )

    def _meets_fused_ops(self, roots: Sequence[Tensor]) -> bool:
        """Record the operations of `FUSED_OPERATIONS` in a graph; return whether any is new."""
        new = replaceable(roots) - self.traits.fused_ops
        self.traits.fused_ops |= new
        for kind in new:
            _logger.info("%s", FUSED_OPERATIONS[kind])
        return bool(new)

    def _holders(self, batch: Any, value: Tensor) -> list[Tensor]:
        """Return the tensors in which backward() may leave a gradient, each once."""
        own = [*self.tree.parameters(), *leaves(batch), *reachable_leaves([value])]
        return list({id(t): t for t in own if t.is_leaf and t.requires_grad}.values())

    def _total(self, output: Any, target: Any) -> Tensor:
        value, outer = self._finish(self._loss_fn, output, target, self.mean)
        return value if outer is None else outer(value)

    def _weigh(self, index: int, batch: Any, output: Any, target: Any) -> float:
        """Return w_b, checked the first time; 1 if batches are summed."""
        if not self.mean:
            return 1.0
        weight = self._weights.of(batch, output)
        key = index, len(output) if isinstance(output, Tensor) and output.ndim else 0
        if weight and key not in self._checked:
            if self._first_error is not None:
                raise ValueError(self._first_error)
            try:
                self._check_weight(index, batch, output, target)
            except ValueError as error:
                if self._checked or not self._alone:
                    raise
                self._first_error = str(error)  # irrelevant, unless another batch follows
            self._checked.add(key)
        return weight

    def _check_weight(self, index: int, batch: Any, output: Any, target: Any) -> None:
        """Check a batch's weight against the derivative of the loss, or else f on its halves."""
        eps = _eps(self.autocast, output if isinstance(output, Tensor) else self._parameter)
        surroundings = self._surroundings(index, frozenset(self.traits.fused_ops))
        with surroundings, spared_buffers(self.tree), torch.enable_grad():
            conclusive = self._weights.check(index, batch, output, target, eps)
        if not conclusive:
            self._check_halves(index, batch, eps)

    def _check_halves(self, index: int, batch: Any, eps: float) -> None:
        """Check the weight of a batch against f on it and on its halves.

        The model is in evaluation mode, because batch statistics and dropout couple samples. A
        model that FSDP2 shards is not checked: all processes would have to do the same.
        """
        samples = rows_of(batch) or 0
        if samples < 2 or not is_divisible(batch, samples) or _distributed.is_fsdp(self.tree):
            self._weights.warn_unchecked(index, samples)
            return
        values: list[float] = []
        replacements = frozenset(self.traits.fused_ops)
        surroundings = self._surroundings(index, replacements, train=False)
        with logging_failures("f on half a batch"), surroundings, torch.enable_grad():
            evaluations = [
                self._evaluate(index, part, replacements)
                for part in (batch, *micro_batches(batch, -(-samples // 2), samples))
            ]
            weights = [one.unchecked_weight() for one in evaluations]
            values = [float(one.total().detach()) for one in evaluations]
        if values:
            check_values(index, values, weights, math.sqrt(eps))

    @contextmanager
    def around(
        self,
        index: int,
        replacements: frozenset[str] = frozenset(),
        *,
        train: bool | None = None,
    ) -> Iterator[None]:
        """Set modes, random numbers and buffers for a batch, and restore all afterwards.

        Args:
            index: index of the batch.
            replacements: the operations of `FUSED_OPERATIONS` that are replaced.
            train: whether the mode is "train"; by default the operator's mode.
        """
        train = self._train if train is None else train
        with ExitStack() as stack:
            stack.enter_context(self._mode(train))
            stack.enter_context(embeddings.smooth(self.tree))
            stack.enter_context(differentiable_kernels(replacements))
            if train:
                stack.enter_context(spared_buffers(self.tree))
            stack.enter_context(replay_random_numbers(self._seed + index, self._device))
            yield

    @contextmanager
    def _surroundings(
        self, index: int, replacements: frozenset[str], *, train: bool | None = None
    ) -> Iterator[None]:
        """Also set autocast, for the forward pass."""
        autocast = torch.autocast(
            self._device.type,
            dtype=self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=False,  # parameters may change within a surrounding autocast context
        )
        with self.around(index, replacements, train=train), autocast:
            yield

    @property
    def _parameter(self) -> Tensor:
        return next(self.tree.parameters())

    @property
    def _device(self) -> torch.device:
        return self._parameter.device

    @contextmanager
    def _mode(self, train: bool) -> Iterator[None]:
        """Set the mode of all modules, and restore that of each."""
        modes = [(module, module.training) for module in self.tree.modules()]
        try:
            self.tree.train(train)
            yield
        finally:
            for module, training in modes:
                module.training = training

    def beyond_max_norm(self) -> list[str]:
        """Return the embeddings with rows longer than max_norm, which f would scale."""
        return [name.removeprefix("members.0.") for name in embeddings.beyond_max_norm(self.tree)]


def _eps(autocast: torch.dtype | None, of: Tensor) -> float:
    """Return the unit of rounding in a loss."""
    own = torch.finfo(of.dtype).eps if of.is_floating_point() else 0.0
    return own if autocast is None else max(own, torch.finfo(autocast).eps)


def _weighing(weigh: Callable[[], float]) -> Callable[[], float]:
    """Return `weigh` with its ValueErrors as `BatchWeightError`, which no engine causes."""

    def weigh_or_raise() -> float:
        try:
            return weigh()
        except ValueError as error:
            raise BatchWeightError(str(error)) from error

    return weigh_or_raise


class _Tree(nn.Module):
    """One module of all modules that f uses, so that a call can replace their parameters."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, run: Callable[[], Evaluation]) -> Evaluation:
        return run()


def _detach(here: Evaluation) -> Evaluation:
    return here._replace(value=here.value.detach())
