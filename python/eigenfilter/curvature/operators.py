"""Curvature of a model's loss as a linear operator. Operators see models; solvers do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eigenfilter import _perturbation
from eigenfilter.curvature.engines import RetainedEngine
from eigenfilter.curvature.point import Point, leaves

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_ENGINES = {"retained": RetainedEngine}
_CHANGED = (
    "parameters, buffers or data changed while a solver was using the operator: its products "
    "belong to no single matrix"
)


class HessianOperator:
    """The Hessian of a model's loss over some batches, by products with vectors.

        f(x) = sum_b w_b loss_b(x) / sum_b w_b    (reduction="mean")
        f(x) = sum_b loss_b(x)                    (reduction="sum")
        H v = d/dt grad f(x + t v) at t = 0

    x [n] holds the parameters in the order given, each flattened in row-major order. w_b is the
    number of samples of batch b, so that uneven batches give the Hessian of the whole data set when
    `loss_fn` is a mean over samples.

    The model is evaluated in eval mode, where dropout is off and batch normalisation uses its
    running statistics: in training mode H would be random, or would depend on the batch split. The
    mode of every submodule is put back. A surrounding `torch.autocast` does not apply (use it in
    `forward`); `p.grad` is never touched; results carry no graph.

    The operator follows its model. Version counters show that parameters, buffers or data were
    changed in place or replaced; because torch's fused optimizers and writes through `.data` leave
    no trace there, the sum of every parameter and buffer is compared as well, once a product (one
    pass over the parameters and one synchronisation). What was kept is then rebuilt. Inside
    `fixed()`, which solvers use, a change raises instead, and the sums are compared at the end
    only. Data changed through `.data` or NumPy is not noticed.

    Args:
        model: the module.
        loss_fn: (output, target) -> tensor of one element. Its own parameters and buffers count too
            if it is a module.
        data: one batch, or a list of batches. A batch is a pair (input, target), evaluated as
            loss_fn(model(input), target).
        params: parameters of the model (or of loss_fn), each once; None for all. Those that do not
            require grad are left out.
        engine: "retained", or "auto", which chooses it.
        reduction: "mean" or "sum".
        forward: (model, batch) -> (output, target), for batches of any other layout.
        weight: batch -> w_b > 0, for reduction="mean" where the number of samples, taken to be the
            leading dimension of the output, is not what `loss_fn` averages over: ignored tokens,
            say, or an output that is not a tensor.
        process_group: None; distributed products do not exist yet.

    Attributes:
        params: the parameters x consists of.
        engine: the engine in use.

    Raises:
        ValueError: an argument is not as above; the parameters are not real and floating, of one
            dtype, on one device.
        RuntimeError: from a product, when an optimizer holds the parameters away from x, when
            something changed inside `fixed()`, or when the loss cannot be differentiated twice.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
    (1994), eq. (3), by automatic differentiation of the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        params: Iterable[nn.Parameter] | None = None,
        engine: str = "auto",
        reduction: str = "mean",
        forward: Callable[[nn.Module, Any], tuple[Any, Any]] | None = None,
        weight: Callable[[Any], float] | None = None,
        process_group: object | None = None,
    ) -> None:
        if engine != "auto" and engine not in _ENGINES:
            raise ValueError(f"engine must be 'auto' or one of {list(_ENGINES)}, not {engine!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
        if reduction == "sum" and weight is not None:
            raise ValueError("weight has no meaning for reduction='sum'")
        if process_group is not None:
            raise ValueError("process_group is not supported yet: pass None")
        self.engine = "retained" if engine == "auto" else engine
        self._tree = nn.ModuleList(m for m in (model, loss_fn) if isinstance(m, nn.Module))
        self._model = model
        self._loss_fn = loss_fn
        self._batches = _batches(data, pairs=forward is None)
        self._forward = forward or _forward_pair
        self._mean = reduction == "mean"
        self._weight = weight
        self.params = _selected(self._tree.parameters() if params is None else params)
        self._check_owned(ValueError)
        self._kept: tuple[RetainedEngine, Point] | None = None
        self._fixed = False

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        n = sum(p.numel() for p in self.params)
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, and of the vectors taken and given."""
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters, and of the vectors taken and given."""
        return self.params[0].device

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] for v [n], of the operator's dtype and on its device.

        Raises:
            ValueError: v is not such a vector.
            RuntimeError: see the class.
        """
        if v.shape != self.shape[:1] or v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"v must be [{self.shape[0]}], {self.dtype}, on {self.device}; got "
                f"{list(v.shape)}, {v.dtype}, on {v.device}"
            )
        with torch.autocast(self.device.type, enabled=False):
            return self._current()[0].matvec(v)

    def matmat(self, V: Tensor) -> Tensor:
        """Return H V [n, b] for V [n, b]: one product a column, all at the same x.

        Raises:
            ValueError: V is not such a matrix, or b is 0.
            RuntimeError: see the class.
        """
        if V.ndim != 2 or not V.shape[1]:
            raise ValueError(f"V must be [n, b] with b >= 1; got {list(V.shape)}")
        with self.fixed():
            return torch.stack([self.matvec(v) for v in V.unbind(1)], dim=1)

    def to_scipy(self) -> LinearOperator:
        """Return the operator as a `scipy.sparse.linalg.LinearOperator`. Needs SciPy."""
        from scipy.sparse.linalg import LinearOperator

        def matvec(x: Any) -> Any:
            v = torch.tensor(x.reshape(-1), dtype=self.dtype, device=self.device)
            return self.matvec(v).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=matvec, rmatvec=matvec, dtype=dtype)

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """A context in which x must not change: a product or the exit raises if it did.

        Raises:
            RuntimeError: parameters, buffers or data changed inside.
        """
        if self._fixed:
            yield
            return
        _, point = self._current()
        self._fixed = True
        try:
            yield
            if not point.holds(*self._tensors()):
                raise RuntimeError(_CHANGED)
        finally:
            self._fixed = False

    def _current(self) -> tuple[RetainedEngine, Point]:
        """Return the engine for the model as it is now, and where that is."""
        holder = _perturbation.holder(self._tree.parameters())
        if holder is not None:
            raise RuntimeError(
                f"{type(holder).__name__} holds the parameters away from x: finish its step(), or "
                "call its restore(), before using the operator"
            )
        if self._kept is not None:
            _, point = self._kept
            if point.unmarked() if self._fixed else point.holds(*self._tensors()):
                return self._kept
            if self._fixed:
                raise RuntimeError(_CHANGED)
        self._kept = None  # frees the old graph before the new one is built
        self._check_owned(RuntimeError)
        with (
            _eval_mode(self._tree),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            engine = _ENGINES[self.engine](self._loss(), self.params)
        self._kept = engine, Point(*self._tensors())
        return self._kept

    def _loss(self) -> Tensor:
        """Return f, with its graph."""
        losses, weights = [], []
        weighted = self._mean and len(self._batches) > 1
        for batch in self._batches:
            output, target = self._forward(self._model, batch)
            loss = self._loss_fn(output, target)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a tensor of one element, not {shape}")
            losses.append(loss.reshape(()))
            weights.append(self._samples(batch, output) if weighted else 1.0)
        scale = math.fsum(weights) if self._mean else 1.0
        return torch.stack([w / scale * f for w, f in zip(weights, losses, strict=True)]).sum()

    def _samples(self, batch: Any, output: Any) -> float:
        if self._weight is not None:
            value = float(self._weight(batch))
        elif isinstance(output, Tensor) and output.ndim:
            value = float(output.shape[0])
        else:
            raise ValueError(
                "the number of samples is unknown, because the output is not a tensor with a "
                "leading dimension: pass weight, or reduction='sum'"
            )
        if not 0 < value < math.inf:
            raise ValueError(f"a batch weighs {value}; weights must be positive and finite")
        return value

    def _check_owned(self, error: type[Exception]) -> None:
        owned = {id(p) for p in self._tree.parameters()}
        if any(id(p) not in owned for p in self.params):
            raise error(
                "a parameter of the operator is not a parameter of the model: of a copy, or "
                "replaced since? Make a new operator from the model's own parameters"
            )

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what f depends on: the model's tensors and the data's."""
        return [*self._tree.parameters(), *self._tree.buffers()], list(leaves(self._batches))


def _forward_pair(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    x, target = batch
    return model(x), target


def _batches(data: Any, *, pairs: bool) -> list[Any]:
    """Return `data` as a list of batches; with `pairs`, each must be an (input, target) pair."""
    batches = list(data) if isinstance(data, list) else [data]
    if not batches:
        raise ValueError("data must hold at least one batch")
    for batch in batches:
        if pairs and not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise ValueError(
                "data must be an (input, target) tuple or a list of such pairs (of a DataLoader, "
                f"list(loader)), or forward be given; got a batch of type {type(batch).__name__}"
            )
    return batches


def _selected(params: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """Return those of `params` that require grad, checked to be of one real dtype and device."""
    selected = tuple(p for p in params if p.requires_grad)
    if not selected:
        raise ValueError("no parameter requires grad")
    if len({id(p) for p in selected}) < len(selected):
        raise ValueError("params lists a parameter twice")
    kinds = {(p.dtype, p.device) for p in selected}
    if len(kinds) > 1 or not selected[0].dtype.is_floating_point:
        raise ValueError(
            "parameters must be real and floating, of one dtype and on one device; got "
            + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        )
    return selected


@contextmanager
def _eval_mode(tree: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and every submodule back into its own mode afterwards."""
    modes = [(module, module.training) for module in tree.modules()]
    tree.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
