"""First derivatives, by torch.autograd.grad or by what backward() leaves in .grad."""

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
    """Return u^T d outputs / d inputs, dense and without a graph; u is 1 by default.

    Args:
        outputs: of a graph.
        inputs: leaves of it.
        u: like `outputs`.
        holders: None for torch.autograd.grad. Else derivatives are what backward() leaves in
            `.grad`; these are all the tensors that it may write to, whose `.grad` is put back.
        retain: whether the graph is needed again.

    Raises:
        UnusableModelError: a holder has hooks that run as its gradient arrives.
    """
    if holders is None:
        with unhooked(inputs):
            found = torch.autograd.grad(outputs, inputs, u, retain_graph=retain, allow_unused=True)
        return dense(found)
    if any(t._post_accumulate_grad_hooks for t in holders):
        raise UnusableModelError(
            "the model leaves gradients only in backward(), where a parameter has hooks that would "
            "run as they arrive (an optimizer in the backward pass?): remove the hooks first"
        )
    held = [t.grad for t in holders]
    try:
        for t in holders:
            t.grad = None
        with unhooked(holders):
            torch.autograd.backward(outputs, u, retain_graph=retain)
        return dense([t.grad for t in inputs])
    finally:
        for t, grad in zip(holders, held, strict=True):
            t.grad = grad


@contextmanager
def unhooked(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let no hook of these tensors see or change their gradients: a derivative of f has none.

    Hooks stay while f itself is evaluated, which may differentiate.
    """
    held = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    try:
        for hooks, _ in held:  # autograd holds this very dictionary
            hooks.clear()
        yield
    finally:
        for hooks, own in held:
            hooks.clear()
            hooks.update(own)


def dense(found: Products) -> Products:
    """Return derivatives as they are stored: sparse ones, of embeddings say, with their zeros."""
    if all(g is None or g.layout == torch.strided for g in found):
        return found
    return [g if g is None or g.layout == torch.strided else g.to_dense() for g in found]
