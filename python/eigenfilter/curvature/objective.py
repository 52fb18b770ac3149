"""What is differentiated: a model's loss on a batch, in surroundings that make it one function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eigenfilter import _distributed
from eigenfilter.curvature.data import divisible, moved, pieces, samples_of
from eigenfilter.curvature.weights import Weights, attempt, check_values

Outer = Callable[[Tensor], Tensor]


class Evaluation(NamedTuple):
    """A batch's share of f at some parameters x.

    With no `outer`, f_b(x) = value(x), whose Hessian is wanted; else f_b(x) = outer(value(x)), of
    which J^T outer'' J is wanted, J being the Jacobian of `value`.

    Whatever differentiates it, or looks at its graph, does so in a context `around()`: backward
    may call the modules again (torch.utils.checkpoint), and must find them as the forward pass did.
    """

    value: Tensor
    outer: Outer | None
    weight: Callable[[], float]  # 0 for a batch that is to be left out; checked by the loss once
    claimed: Callable[[], float]  # the same unchecked
    around: Callable[[], AbstractContextManager[None]]

    def total(self) -> Tensor:
        """Return f_b, one number."""
        return self.value if self.outer is None else self.outer(self.value)


def one_number(loss: object) -> Tensor:
    """Return a loss as a tensor [], which it must be but for its shape.

    Raises:
        ValueError: it is no tensor, or not of one element.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a tensor of one element, not {shape}")
    return loss.reshape(())


class Objective:
    """A model with its loss, evaluated on a batch; the same at every evaluation."""

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
        """See `operators.CurvatureOperator`; `finish`: loss_fn, output, target -> value, outer;
        `alone`: whether no other process holds data."""
        self.tree = _Tree([m for m in (model, loss_fn) if isinstance(m, nn.Module)])
        self.mean = mean
        self.autocast = autocast
        self.model = model
        self._loss_fn = loss_fn
        self._finish = finish
        self._forward = forward
        self._alone = alone and not _distributed.is_fsdp(self.tree)
        self._weights = Weights(weight, self._total, alone=self._alone)
        self._refused: str | None = None  # why the first batch does not weigh what is said
        self._checked: set[tuple[int, int]] = set()  # batches whose weights are what f says
        self._train = train
        self._seed = seed

    def names(self, params: Iterable[Tensor]) -> list[str]:
        """Return what `at` of `evaluate` calls these parameters."""
        known = {id(p): name for name, p in self.tree.named_parameters()}
        return [known[id(p)] for p in params]

    def evaluate(
        self,
        index: int,
        batch: Any,
        at: Mapping[str, Tensor] | None = None,
        *,
        graph: bool = True,
    ) -> Evaluation:
        """Return a batch's share of f.

        Args:
            index: of the batch, which decides its random numbers.
            batch: what the source gave.
            at: values to use in place of parameters, by name.
            graph: whether it is to be differentiated.
        """

        def run() -> Evaluation:
            return self._evaluate(index, batch)

        with self._surroundings(index), torch.set_grad_enabled(graph):
            return run() if at is None else functional_call(self.tree, dict(at), (run,))

    def _evaluate(self, index: int, batch: Any) -> Evaluation:
        if self._forward is None:
            x, target = moved(batch, self._device)
            output = self.model(x)
        else:
            output, target = self._forward(self.model, batch)
        value, outer = self._finish(self._loss_fn, output, target, self.mean)

        def surrounded(z: Tensor) -> Tensor:
            assert outer is not None
            with self._surroundings(index):
                return outer(z)

        return Evaluation(
            value,
            None if outer is None else surrounded,
            lambda: self._weigh(index, batch, output, target),
            lambda: self._weights.of(batch, output) if self.mean else 1.0,
            lambda: self.around(index),
        )

    def _total(self, output: Any, target: Any) -> Tensor:
        value, outer = self._finish(self._loss_fn, output, target, self.mean)
        return value if outer is None else outer(value)

    def _weigh(self, index: int, batch: Any, output: Any, target: Any) -> float:
        """Return w_b, checked the first time; 1 where batches are added."""
        if not self.mean:
            return 1.0
        weight = self._weights.of(batch, output)
        key = index, len(output) if isinstance(output, Tensor) and output.ndim else 0
        if weight and key not in self._checked:
            if self._refused is not None:
                raise ValueError(self._refused)
            try:
                self._check_weight(index, batch, output, target)
            except ValueError as error:
                if self._checked or not self._alone:
                    raise
                self._refused = str(error)  # a batch alone may weigh anything: see if others come
            self._checked.add(key)
        return weight

    def _check_weight(self, index: int, batch: Any, output: Any, target: Any) -> None:
        """Check what a batch weighs by its loss, or else by f on its halves."""
        eps = _eps(self.autocast, output if isinstance(output, Tensor) else self._parameter)
        with self._surroundings(index), _spared_buffers(self.tree), torch.enable_grad():
            told = self._weights.check(index, batch, output, target, eps)
        if not told:
            self._check_halves(index, batch, eps)

    def _check_halves(self, index: int, batch: Any, eps: float) -> None:
        """Check what a batch weighs by f on it and on its halves.

        In evaluation mode, whatever that of the operator: batch statistics and dropout couple
        samples. Not of a model that FSDP2 shards, where all processes would have to do the same.
        """
        samples = samples_of(batch) or 0
        if samples < 2 or not divisible(batch, samples) or _distributed.is_fsdp(self.tree):
            return
        values: list[float] = []
        with attempt("f on half a batch"), self._surroundings(index, train=False), torch.no_grad():
            found = [
                self._evaluate(index, part) for part in (batch, *pieces(batch, -(-samples // 2)))
            ]
            values = [float(one.total()) for one in found]
            weights = [one.claimed() for one in found]
        if values:
            check_values(index, values, weights, math.sqrt(eps))

    @contextmanager
    def around(self, index: int, *, train: bool | None = None) -> Iterator[None]:
        """Set modes, random numbers and buffers for a batch; put all back afterwards.

        train: the mode, if not the operator's.
        """
        train = self._train if train is None else train
        with ExitStack() as stack:
            stack.enter_context(self._modes(train))
            if train:
                stack.enter_context(_spared_buffers(self.tree))
            stack.enter_context(_replayed(self._seed + index, self._device))
            yield

    @contextmanager
    def _surroundings(self, index: int, *, train: bool | None = None) -> Iterator[None]:
        """Also set autocast, for the forward pass."""
        autocast = torch.autocast(
            self._device.type,
            dtype=self.autocast,
            enabled=self.autocast is not None,
            cache_enabled=False,  # parameters may move while a context around this one lasts
        )
        with self.around(index, train=train), autocast:
            yield

    @property
    def _parameter(self) -> Tensor:
        return next(self.tree.parameters())

    @property
    def _device(self) -> torch.device:
        return self._parameter.device

    @contextmanager
    def _modes(self, train: bool) -> Iterator[None]:
        modes = [(module, module.training) for module in self.tree.modules()]
        try:
            self.tree.train(train)
            yield
        finally:
            for module, training in modes:
                module.training = training


def _eps(autocast: torch.dtype | None, of: Tensor) -> float:
    """The unit of rounding in a loss."""
    own = torch.finfo(of.dtype).eps if of.is_floating_point() else 0.0
    return own if autocast is None else max(own, torch.finfo(autocast).eps)


class _Tree(nn.Module):
    """The modules f depends on, as one, so that their parameters can be replaced in a call."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, run: Callable[[], Evaluation]) -> Evaluation:
        return run()


@contextmanager
def _spared_buffers(tree: nn.Module) -> Iterator[None]:
    """Let modules write to copies of their buffers; graphs that saved the originals stay valid."""
    own = [(m._buffers, name, b) for m in tree.modules() for name, b in m._buffers.items()]
    copies = {id(b): None if b is None else b.detach().clone() for _, _, b in own}
    try:
        for buffers, name, b in own:
            buffers[name] = copies[id(b)]
        yield
    finally:
        for buffers, name, b in own:
            buffers[name] = b


@contextmanager
def _replayed(seed: int, device: torch.device) -> Iterator[None]:
    """Draw the same random numbers in every such context, and leave the generators as they were."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield
