"""First derivatives, by torch.autograd.grad, or by backward() and `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from eigenfilter.curvature.loss.batch_sources import UnusableModelError

NO_INPUT_GRADIENT = (
    "or by torch.utils.checkpoint with use_reentrant=True, whose inputs do not require grad: pass "
    "use_reentrant=False, or call x.requires_grad_() on an input"
)

Products = Sequence[Tensor | None]  # None: zero


def vector_jacobian(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    u: Sequence[Tensor] | None = None,
    *,
    holders: Sequence[Tensor] | None = None,
    retain: bool = False,
) -> Products:
    """Return u^T d outputs / d inputs, dense and without a graph.

    Args:
        outputs: the outputs of a graph.
        inputs: leaves of it.
        u: tensors shaped like `outputs`; by default ones.
        holders: None uses torch.autograd.grad. Otherwise backward() is used, and these are all
            tensors in whose `.grad` it may leave a gradient; their `.grad` is restored.
        retain: whether the graph is kept for another use.

    Raises:
        UnusableModelError: a holder has hooks that run as its gradient arrives.
    """
    if holders is None:
        with without_hooks(inputs):
            grads = torch.autograd.grad(outputs, inputs, u, retain_graph=retain, allow_unused=True)
        return dense(grads)
    if any(t._post_accumulate_grad_hooks for t in holders):
        raise UnusableModelError(
            "the model leaves gradients only in backward(), where a parameter has hooks that would "
            "run as they arrive (an optimizer in the backward pass?): remove the hooks first"
        )
    before = [t.grad for t in holders]
    try:
        for t in holders:
            t.grad = None
        with without_hooks(holders):
            torch.autograd.backward(outputs, u, retain_graph=retain)
        return dense([t.grad for t in inputs])
    finally:
        for t, grad in zip(holders, before, strict=True):
            t.grad = grad


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Remove the hooks of these tensors for the duration: they must not change a derivative of f.

    Hooks stay while f itself is evaluated, which may differentiate.
    """
    saved = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    try:
        for hooks, _ in saved:  # autograd refers to this very dictionary
            hooks.clear()
        yield
    finally:
        for hooks, own in saved:
            hooks.clear()
            hooks.update(own)


def dense(grads: Products) -> Products:
    """Return derivatives with sparse ones, of embeddings for example, converted to dense."""
    if all(g is None or g.layout == torch.strided for g in grads):
        return grads
    return [g if g is None or g.layout == torch.strided else g.to_dense() for g in grads]
