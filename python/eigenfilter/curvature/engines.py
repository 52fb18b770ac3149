"""Ways to multiply by a Hessian. An engine knows a loss and its parameters, at one point."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_NO_SECOND_DERIVATIVE = re.compile(
    r"derivative .* not implemented|differentiate twice|double.?backward", re.IGNORECASE
)
_MARKED = "torch::autograd::Error"  # the node that `once_differentiable` puts
_CAUSE = (
    "An operation in the model or the loss has no second derivative, which an exact Hessian "
    "product needs; for fused attention, call the model in `forward` under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)


class RetainedEngine:
    """Products from one double-backward graph, kept and used again for every vector.

        H v = d/dx <g(x), v>,    g = df/dx with its graph

    One gradient with a graph when made; then one backward pass through that graph a product. Keeps
    the graph of f and of g, over all batches, in memory for as long as the engine lives.
    """

    def __init__(self, loss: Tensor, params: Sequence[Tensor]) -> None:
        """Differentiate `loss`, a tensor of one element, once. Call under `torch.enable_grad()`.

        Raises:
            RuntimeError: the loss does not depend on anything through autograd, or an operation in
                it cannot be differentiated twice.
        """
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss does not depend on the parameters through autograd: was it detached, or "
                "computed under no_grad or inference_mode?"
            )
        seed = torch.ones_like(loss, requires_grad=True)
        with _explained(), _guarded(loss):
            grads = torch.autograd.grad(loss, params, seed, create_graph=True, allow_unused=True)
        self._params = params
        self._shapes = [p.shape for p in params]
        self._sizes = [p.numel() for p in params]
        self._active = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._grads = [g for g in grads if g is not None and g.requires_grad]

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] for v [n], parameters in order, each flattened in row-major order."""
        if not self._grads:
            return torch.zeros_like(v)
        pieces = torch.split(v, self._sizes)
        cotangents = [pieces[i].view(self._shapes[i]) for i in self._active]
        with _explained():
            products = torch.autograd.grad(
                self._grads, self._params, cotangents, retain_graph=True, materialize_grads=True
            )
        return torch.cat([product.reshape(-1) for product in products])


@contextmanager
def _guarded(loss: Tensor) -> Iterator[None]:
    """Make the first backward of `loss` raise where an operation's own backward is not recorded.

    Torch would leave that operation's share out of the product without a word: a backward that
    autograd does not see returns tensors without a graph, and one marked `once_differentiable` a
    node that no path from the parameters leads to. A gradient is linear in the seed it started
    from, so if the seed requires grad, all that is not recorded and not zero is a loss.
    """

    def check(grad_inputs: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        for g in grad_inputs:
            if g is not None and (
                g.grad_fn.name() == _MARKED if g.grad_fn is not None else bool(g.any())
            ):
                raise RuntimeError(f"a backward was not recorded. {_CAUSE}")

    stack, hooks = [loss.grad_fn], {}
    while stack:
        node = stack.pop()
        if node is not None and node not in hooks:
            hooks[node] = node.register_hook(check)
            stack.extend(edge for edge, _ in node.next_functions)
    try:
        yield
    finally:
        for hook in hooks.values():
            hook.remove()


@contextmanager
def _explained() -> Iterator[None]:
    """Add the cause to an error of torch that says a second derivative is missing."""
    try:
        yield
    except RuntimeError as error:
        if _NO_SECOND_DERIVATIVE.search(str(error)):
            error.add_note(_CAUSE)
        raise
