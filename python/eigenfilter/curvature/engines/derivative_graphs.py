"""The graphs of the first derivative of one batch's loss, and products through them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd.graph import GradientEdge, get_gradient_edge

from eigenfilter.curvature.loss.autograd_graph import Root, nodes, python_function, runs_python
from eigenfilter.curvature.loss.batch_sources import UnusableModelError
from eigenfilter.curvature.loss.first_derivatives import (
    NO_INPUT_GRADIENT,
    Products,
    dense,
    vector_jacobian,
    without_hooks,
)
from eigenfilter.curvature.loss.objective import Evaluation

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative .* not implemented|differentiate twice|double.?backward|with \.grad\(\)|"
    r"create_graph=False",
    re.IGNORECASE,
)
_NO_BATCHING = re.compile(r"vmap|batching rule|sparse", re.IGNORECASE)
_ONCE_DIFFERENTIABLE = "torch::autograd::Error"  # the node that `once_differentiable` inserts
_WAYS_OUT = "Use engine='finite_difference', which needs first derivatives only."
_CAUSE = (
    "An operation in the model or the loss has no second derivative, which an exact product needs. "
    + _WAYS_OUT
)

Tensors = Sequence[Tensor]


class HessianGraph:
    """H v = d/dx <g(x), v>, with the graph of g = df/dx."""

    def __init__(self, evaluation: Evaluation, params: Tensors) -> None:
        """Differentiate f_b once.

        Raises:
            RuntimeError: f_b does not depend on anything through autograd, or an operation in it
                cannot be differentiated twice.
        """
        self._params = params
        self._around = _around(evaluation, evaluation.value)
        self._gradient = _Derivative(evaluation.value, params)
        self.roots: list[Root] = [evaluation.value, *self._gradient.outputs]

    def product(self, v: Tensors, *, batched: bool = False) -> Products:
        """Return H v in pieces; with `batched`, for all vectors [b, ...] at once."""
        with self._around():
            return self._gradient.back(v, self._params, batched=batched)


class Pullback:
    """The map u -> J^T phi''(z) u for f_b = phi(z(x)), with u shaped like z."""

    def __init__(self, evaluation: Evaluation, params: Tensors) -> None:
        """Differentiate phi once.

        Raises:
            RuntimeError: see `HessianGraph`.
        """
        assert evaluation.outer is not None
        self._params = params
        self._holders = evaluation.holders
        self._z = _dependent(evaluation.value)
        self._point = self._z.detach().requires_grad_()
        phi = evaluation.outer(self._point)
        self._around = _around(evaluation, self._z, phi)
        self._gradient = _Derivative(phi, [self._point])
        self.roots: list[Root] = [self._z, phi, *self._gradient.outputs]

    def __call__(self, u: Tensor, *, batched: bool = False) -> Products:
        """Return J^T phi''(z) u in pieces; with `batched`, for all u [b, ...] at once."""
        with self._around():
            return self._pull(u, batched)

    def _pull(self, u: Tensor, batched: bool) -> Products:
        (curved,) = self._gradient.back([u], [self._point], batched=batched)
        if curved is None:
            return [None] * len(self._params)
        if self._holders is not None:
            return vector_jacobian(
                [self._z], self._params, [curved], holders=self._holders, retain=True
            )
        return back([self._z], self._params, [curved], batched=batched)


class GaussNewtonGraph:
    """J^T phi''(z) J v, with J v = d/du <J^T u, v>, since J^T u is linear in u."""

    def __init__(self, evaluation: Evaluation, params: Tensors) -> None:
        """Differentiate z and phi once.

        Raises:
            RuntimeError: see `HessianGraph`.
        """
        self._params = params
        self._around = _around(evaluation, evaluation.value)
        self._pullback = Pullback(evaluation, params)
        z = evaluation.value
        # Any u without zeros that is not constant, because J^T u of a softmax vanishes for those.
        u = torch.linspace(1, 2, z.numel(), dtype=z.dtype, device=z.device).view_as(z)
        u = u + u.new_zeros((), requires_grad=True)  # the graph keeps the memory of a leaf
        self._transpose = _Derivative(z, params, u)
        self._u = get_gradient_edge(u)
        self.roots: list[Root] = [*self._pullback.roots, *self._transpose.outputs]

    def product(self, v: Tensors, *, batched: bool = False) -> Products:
        """Return the product in pieces; with `batched`, for all vectors [b, ...] at once."""
        with self._around():
            (along,) = self._transpose.back(v, [self._u], batched=batched)
        if along is None:
            return [None] * len(self._params)
        return self._pullback(along, batched=batched)


Graph = HessianGraph | GaussNewtonGraph


def graph_of(evaluation: Evaluation, params: Tensors) -> Graph:
    """Return the graph for an evaluation: of a Hessian, or of a Gauss-Newton matrix.

    Raises:
        RuntimeError: see `HessianGraph`.
    """
    if evaluation.holders is not None:
        raise RuntimeError(
            "gradients of this model come by backward() alone, through reentrant checkpointing "
            "say, which autograd cannot differentiate again. " + _WAYS_OUT + " Or call "
            "torch.utils.checkpoint with use_reentrant=False"
        )
    with torch.enable_grad(), noting_remedy(), evaluation.around():
        kind = HessianGraph if evaluation.outer is None else GaussNewtonGraph
        return kind(evaluation, params)


def back(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    u: Tensors,
    *,
    batched: bool,
) -> Products:
    """Return u^T d outputs / d inputs, keeping the graph; `batched`: for all u [b, ...] at once."""

    def products(u: Tensors) -> Products:
        return torch.autograd.grad(outputs, inputs, u, retain_graph=True, allow_unused=True)

    # torch.autograd.grad(is_grads_batched=True) does the same, but does not take edges.
    mapped = _vmap(products, 0, 0, allow_none_pass_through=True) if batched else products
    try:
        with noting_remedy(), without_hooks(t for t in inputs if isinstance(t, Tensor)):
            return dense(mapped(tuple(u)))
    except RuntimeError as error:
        if batched and _NO_BATCHING.search(str(error)):
            error.add_note("No vectorized backward: engine='cached_graph' goes vector by vector.")
        raise


def gradient(evaluation: Evaluation, params: Tensors) -> Products:
    """Return df_b/dx without a graph."""
    with evaluation.around():
        return vector_jacobian([_dependent(evaluation.value)], params, holders=evaluation.holders)


def check_recorded(evaluation: Evaluation, params: Tensors) -> None:
    """Raise RuntimeError if a Function written in Python hides its backward from autograd.

    Torch's own operations raise by themselves where a derivative is missing. The check costs a
    forward pass, and a backward pass only if there are such Functions.
    """
    value = _dependent(evaluation.value)
    if evaluation.holders is not None or any(python_function(node) for node in nodes([value])):
        graph_of(evaluation, params)


@contextmanager
def noting_remedy() -> Iterator[None]:
    """If torch raises because a derivative is missing, add a note that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not hasattr(error, "__notes__") and _NO_SECOND_DERIVATIVE.search(str(error)):
            error.add_note(_CAUSE)
        raise


class _Derivative:
    """The graph of d<seed, output> / d inputs, without the memory of these derivatives."""

    def __init__(self, output: Tensor, inputs: Tensors, seed: Tensor | None = None) -> None:
        """Differentiate; `seed` must require grad, and is 1 by default.

        Raises:
            RuntimeError: see `HessianGraph`.
        """
        output = _dependent(output)
        if seed is None:
            seed = torch.ones_like(output, requires_grad=True)
        with _raising_if_unrecorded(output), without_hooks(inputs):
            grads = dense(
                torch.autograd.grad(output, inputs, seed, create_graph=True, allow_unused=True)
            )
        active = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._active = [i for i, _ in active]
        self.outputs = [get_gradient_edge(g) for _, g in active]

    def back(
        self,
        v: Tensors,
        inputs: Sequence[Tensor] | Sequence[GradientEdge],
        *,
        batched: bool,
    ) -> Products:
        """Return d<v, this derivative> / d inputs."""
        if not self.outputs:
            return [None] * len(inputs)
        return back(self.outputs, inputs, [v[i] for i in self._active], batched=batched)


def _around(evaluation: Evaluation, *roots: Tensor) -> Callable[[], AbstractContextManager[None]]:
    """Return the context that a backward pass from `roots` needs."""
    return evaluation.around if runs_python(roots) else nullcontext


def _dependent(value: Tensor) -> Tensor:
    if not value.requires_grad:
        raise UnusableModelError(
            "the loss does not depend on the parameters through autograd: was it detached, or "
            f"computed under no_grad or inference_mode, {NO_INPUT_GRADIENT}?"
        )
    return value


def _nonzero(g: Tensor) -> bool:
    return bool((g.to_dense() if g.layout != torch.strided else g).any())


@contextmanager
def _raising_if_unrecorded(output: Tensor) -> Iterator[None]:
    """Make the first backward of `output` raise if an operation's own backward is not recorded.

    Torch would silently omit that operation's contribution from the product: a backward that
    autograd does not see returns tensors without a graph, and one marked `once_differentiable` a
    node that no path from the parameters leads to. A gradient is linear in its seed. So if the seed
    requires grad, every gradient that has no graph and is not zero is an omission.
    """

    def hook(name: str) -> Callable[[Sequence[Tensor | None], Sequence[Tensor | None]], None]:
        def check(grads: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
            for g in grads:
                if g is None or (g.grad_fn is None and g.requires_grad):  # that is the seed
                    continue
                node = g.grad_fn
                hidden = _nonzero(g) if node is None else node.name() == _ONCE_DIFFERENTIABLE
                if hidden:
                    raise RuntimeError(f"the backward of {name} was not recorded. {_CAUSE}")

        return check

    hooks = [node.register_hook(hook(node.name())) for node in nodes([output])]
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()
