"""Checks of a batch's first evaluation: whether gradients reach every parameter that moves f."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eigenfilter.curvature.loss.autograd_graph import nodes, python_function, reachable_leaves
from eigenfilter.curvature.loss.batch_sources import UnusableModelError
from eigenfilter.curvature.loss.first_derivatives import (
    NO_INPUT_GRADIENT,
    Products,
    vector_jacobian,
)

if TYPE_CHECKING:
    from eigenfilter.curvature.loss.objective import Evaluation, Objective

_logger = logging.getLogger(__name__)

_BACKWARD_ONLY = re.compile(r"(incompatible|not compatible) with \.grad\(\)")
_SHOWN = 5  # names in a message
_NOISE = 10.0  # a change counts above this multiple of the difference of two equal evaluations


def check_gradient_coverage(
    objective: Objective, index: int, batch: object, here: Evaluation, *, exact: bool
) -> bool:
    """Check the first evaluation of a batch; return whether it must be repeated.

    Sets `traits.by_backward` if gradients come by backward() alone.

    Raises:
        UnusableModelError: f depends on a parameter that no gradient reaches.
    """
    params = objective.watched
    if not params or not here.value.requires_grad:  # differentiating it will raise
        return False
    reached = {id(t) for t in reachable_leaves([here.value])}
    if reached & objective.foreign:
        raise UnusableModelError(
            "with dtype, f is that of a copy of the model, and loss_fn or forward uses a parameter "
            "of the model itself: take it from the model that forward is given, or let loss_fn be "
            "a module that holds it"
        )
    missing = [p for p in params if id(p) not in reached]
    again = False
    if any(python_function(node) for node in nodes([here.value])):
        # It may use parameters that the graph does not show, and omit some that it shows.
        again = True
        missing = _without_gradient(objective, index, batch, here, exact=exact)
    if missing:
        _check_still(objective, index, batch, missing, exact=exact)
    return again


def _without_gradient(
    objective: Objective, index: int, batch: object, here: Evaluation, *, exact: bool
) -> list[Tensor]:
    """Return the parameters that no gradient reaches by grad() or backward()."""
    params = objective.watched
    saved = [p.grad for p in params]  # a Function may call backward() inside its own

    def missing(grads: Products) -> list[Tensor]:
        return [p for p, g in zip(params, grads, strict=True) if g is None]

    try:
        with here.around():
            # After one backward without `retain`, compiled models refuse `retain` for good.
            grads = vector_jacobian([here.value], params, [_weights(here.value)], retain=True)
            without = missing(grads)
    except RuntimeError as error:
        if not _BACKWARD_ONLY.search(str(error)):
            return []  # there is no gradient at all, or the engines will meet the same error
        without = list(params)
    finally:
        for p, grad in zip(params, saved, strict=True):
            p.grad = grad
    if not without:
        return []
    before = objective.traits.by_backward
    objective.traits.by_backward = True  # unless it reaches no more parameters
    here = objective.plain(index, batch, exact=exact)
    with here.around():
        grads = vector_jacobian([here.value], params, [_weights(here.value)], holders=here.holders)
    objective.traits.by_backward = before or len(missing(grads)) < len(without)
    if not before and objective.traits.by_backward:
        _logger.info(
            "gradients come by backward() alone (reentrant checkpointing?): there is no exact "
            "product, only finite differences"
        )
    return missing(grads)


def _weights(value: Tensor) -> Tensor:
    """Return weights shaped like `value` whose gradients do not cancel as those of a constant may.

    After a softmax, the gradient of a constant is zero.
    """
    ramp = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device)
    return ramp.view_as(value)


def _check_still(
    objective: Objective, index: int, batch: object, missing: Sequence[Tensor], *, exact: bool
) -> None:
    """Raise if f changes with parameters that no gradient reaches."""

    def value() -> Tensor:
        evaluation = objective.value(index, batch, exact=exact)
        value, total = evaluation.value, evaluation.total().detach()
        return torch.stack([value.sum(), value.norm(), total])

    def change(params: Sequence[Tensor]) -> float:
        return float((_at_perturbed(value, params) - at_x).abs().nan_to_num(0.0).max())

    at_x = value()
    if not change(missing):
        return
    noise = _NOISE * float((value() - at_x).abs().nan_to_num(0.0).max())
    if change(missing) <= noise:
        return
    culprits = [p for p in missing if change([p]) > noise] or list(missing)
    names = objective.public_names(culprits)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UnusableModelError(
        f"the loss depends on {', '.join(names[:_SHOWN])}{more}, and no gradient reaches it: used "
        "detached, through .data, under no_grad, or by an operation that cuts the graph, "
        f"{NO_INPUT_GRADIENT}. Its rows would be zero without reason: keep it in the graph, or "
        "leave it out by params=... or requires_grad_(False)"
    )


@torch.no_grad()
def _at_perturbed(value: Callable[[], Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return `value()` with these parameters perturbed a little; restore them bit for bit."""
    backup = [p.detach().clone() for p in params]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in params:
            step = torch.finfo(p.dtype).eps ** (1 / 3)
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.data.add_(noise * (1 + p.abs()), alpha=step)
        return value()
    finally:
        for p, original in zip(params, backup, strict=True):
            p.data.copy_(original)
