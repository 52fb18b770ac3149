"""What first evaluations tell of a model: how its gradient comes, and what it leaves out."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eigenfilter.curvature.loss.autograd_graph import leaves_reached, nodes, python_function
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
_NOISE = 10.0  # times what two evaluations at one point differ by


def check_gradient_coverage(
    objective: Objective, index: int, batch: object, here: Evaluation, *, exact: bool
) -> bool:
    """Look at the first evaluation of a batch; return whether it must be made again.

    Sets `known.by_backward` if gradients come by backward() alone.

    Raises:
        UnusableModelError: a parameter moves f, and no gradient reaches it.
    """
    params = objective.watched
    if not params or not here.value.requires_grad:  # whoever differentiates it says so
        return False
    reached = {id(t) for t in leaves_reached([here.value])}
    if reached & objective.foreign:
        raise UnusableModelError(
            "with dtype, f is that of a copy of the model, and loss_fn or forward uses a parameter "
            "of the model itself: take it from the model that forward is given, or let loss_fn be "
            "a module that holds it"
        )
    missing = [p for p in params if id(p) not in reached]
    again = False
    if any(python_function(node) for node in nodes([here.value])):
        # Parameters may hide in it, and it may leave out some that it was given.
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
    held = [p.grad for p in params]  # a Function may call backward() inside its own

    def missing(found: Products) -> list[Tensor]:
        return [p for p, g in zip(params, found, strict=True) if g is None]

    try:
        with here.around():
            # Compiled models that have run a backward without `retain` refuse it from there on.
            found = vector_jacobian([here.value], params, [_weights(here.value)], retain=True)
            without = missing(found)
    except RuntimeError as error:
        if not _BACKWARD_ONLY.search(str(error)):
            return []  # has no gradient at all, or is met again by the engines
        without = list(params)
    finally:
        for p, grad in zip(params, held, strict=True):
            p.grad = grad
    if not without:
        return []
    before = objective.traits.by_backward
    objective.traits.by_backward = True  # until it proves to reach no more
    here = objective.plain(index, batch, exact=exact)
    with here.around():
        found = vector_jacobian([here.value], params, [_weights(here.value)], holders=here.holders)
    objective.traits.by_backward = before or len(missing(found)) < len(without)
    if not before and objective.traits.by_backward:
        _logger.info(
            "gradients come by backward() alone (reentrant checkpointing?): there is no exact "
            "product, only finite differences"
        )
    return missing(found)


def _weights(value: Tensor) -> Tensor:
    """Return numbers like `value` that hardly cancel; constant ones would, after a softmax."""
    ramp = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device)
    return ramp.view_as(value)


def _check_still(
    objective: Objective, index: int, batch: object, missing: Sequence[Tensor], *, exact: bool
) -> None:
    """Raise if f moves with parameters that no gradient reaches."""

    def value() -> Tensor:
        found = objective.value(index, batch, exact=exact)
        return torch.stack([found.value.sum(), found.value.norm(), found.total().detach()])

    def change(moving: Sequence[Tensor]) -> float:
        return float((_moved(value, moving) - at_x).abs().nan_to_num(0.0).max())

    at_x = value()
    if not change(missing):
        return
    noise = _NOISE * float((value() - at_x).abs().nan_to_num(0.0).max())
    if change(missing) <= noise:
        return
    found = [p for p in missing if change([p]) > noise] or list(missing)
    names = [name.removeprefix("members.0.") for name in objective.names(found)]
    names = [name.replace("members.1.", "loss_fn.", 1) for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UnusableModelError(
        f"the loss depends on {', '.join(names[:_SHOWN])}{more}, and no gradient reaches it: used "
        "detached, through .data, under no_grad, or by an operation that cuts the graph, "
        f"{NO_INPUT_GRADIENT}. Its rows would be zero without reason: keep it in the graph, or "
        "leave it out by params=... or requires_grad_(False)"
    )


@torch.no_grad()
def _moved(value: object, moving: Sequence[Tensor]) -> Tensor:
    """Return `value()` with these parameters moved a little, and put them back bit for bit."""
    assert callable(value)
    backup = [p.detach().clone() for p in moving]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in moving:
            step = torch.finfo(p.dtype).eps ** (1 / 3)
            way = torch.randn(p.shape, generator=generator).to(p)
            p.data.add_(way * (1 + p.abs()), alpha=step)
        found: Tensor = value()
        return found
    finally:
        for p, was in zip(moving, backup, strict=True):
            p.data.copy_(was)
