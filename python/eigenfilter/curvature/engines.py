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


class RetainedEngine:
    """Products from one double-backward graph, kept and used again for every vector.

        H v = d/dx <g(x), v>,    g = df/dx with its graph

    One gradient with a graph when made; then one backward pass through that graph a product. Keeps
    the graph of f and of g, over all batches, in memory for as long as the engine lives.
    """

    def __init__(self, loss: Tensor, params: Sequence[Tensor]) -> None:
        """Differentiate `loss`, a tensor of one element, once. Call under `torch.enable_grad()`.

        Raises:
            RuntimeError: the loss or its gradient does not depend on `params`.
        """
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss does not depend on the parameters through autograd: was it detached, or "
                "computed under no_grad or inference_mode?"
            )
        with _explained():
            grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        self._params = params
        self._shapes = [p.shape for p in params]
        self._sizes = [p.numel() for p in params]
        # A parameter that f does not use, or uses linearly, has a gradient without a graph.
        self._active = [i for i, g in enumerate(grads) if g.requires_grad]
        self._grads = [grads[i] for i in self._active]
        if not self._active:
            raise RuntimeError(
                "the gradient does not depend on the parameters: the loss is linear in them, or an "
                "operation's backward cannot be differentiated"
            )

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] for v [n], parameters in order, each flattened in row-major order."""
        pieces = torch.split(v, self._sizes)
        cotangents = [pieces[i].view(self._shapes[i]) for i in self._active]
        with _explained():
            products = torch.autograd.grad(
                self._grads, self._params, cotangents, retain_graph=True, materialize_grads=True
            )
        return torch.cat([product.reshape(-1) for product in products])


@contextmanager
def _explained() -> Iterator[None]:
    """Add the cause to an error of torch that says a second derivative is missing."""
    try:
        yield
    except RuntimeError as error:
        if _NO_SECOND_DERIVATIVE.search(str(error)):
            error.add_note(
                "An operation in the model or the loss has no second derivative, which an exact "
                "Hessian product needs; for fused attention, call the model in `forward` under "
                "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
            )
        raise
