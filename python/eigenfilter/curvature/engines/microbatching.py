"""Micro-batches whose graphs fit in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter.curvature.engines.derivative_graphs import graph_of
from eigenfilter.curvature.engines.memory import graph_bytes
from eigenfilter.curvature.loss.batch_sources import BatchSource, MicroBatches
from eigenfilter.curvature.loss.batch_trees import micro_batches, samples_of
from eigenfilter.curvature.loss.objective import Evaluation, Objective

_logger = logging.getLogger(__name__)

_PROBE = 8  # a batch's memory is estimated from one in this many of its samples


def split_to_fit(
    objective: Objective, source: BatchSource, params: Sequence[Tensor], budget: int
) -> MicroBatches:
    """Return the batches of `source`, split so that each graph takes at most `budget` bytes.

    Raises:
        ValueError: a batch cannot be split, or f on it is not the weighted mean (or sum) of f on
            its pieces, as with the batch statistics or dropout of mode="train".
    """
    batch, _ = first_batch(objective, source)
    size = piece_size(objective, batch, params, budget)
    whole = objective.value(0, batch)
    parts = [objective.value(0, piece) for piece in micro_batches(batch, size)]
    weights = [part.unchecked_weight() for part in parts]
    if objective.mean:
        weights = [w / sum(weights) for w in weights]
    shares = [w * float(part.total()) for w, part in zip(weights, parts, strict=True) if w]
    recombined = sum(shares)
    expected = float(whole.total())
    if math.isnan(expected) and math.isnan(recombined):  # which does not show whether f splits
        _logger.warning(
            "f is nan on a batch, as a mean over nothing is: of an ignored sample, say, that the "
            "empirical Fisher takes alone (a loss_fn with reduction='none' gives it 0)"
        )
        return MicroBatches(source, size)
    eps = torch.finfo(objective.autocast or params[0].dtype).eps
    if not abs(recombined - expected) <= eps**0.5 * max(map(abs, [expected, *shares])):
        raise ValueError(
            f"f is {expected:.6g} on a batch and {recombined:.6g} on its pieces: samples are "
            "coupled, by batch statistics or dropout say, or weigh otherwise than weight= and "
            "reduction= tell, so batches cannot be split: pass these, choose another engine, or "
            "make the batches smaller"
        )
    return MicroBatches(source, size)


def first_batch(
    objective: Objective, source: BatchSource, *, graph: bool = False
) -> tuple[object, Evaluation]:
    """Return the first batch of positive weight with its evaluation; else the very first."""
    first = None
    for batch in source.batches():
        if not graph and not objective.traits.evaluated and (samples := samples_of(batch)):
            # The first evaluation checks the model; a small part of the batch suffices for that.
            objective.evaluate(0, next(micro_batches(batch, -(-samples // _PROBE))))
        evaluated = batch, (objective.evaluate if graph else objective.value)(0, batch)
        if source.single or evaluated[1].unchecked_weight():
            return evaluated
        first = first or evaluated
    assert first is not None
    return first


def piece_size(objective: Objective, batch: object, params: Sequence[Tensor], budget: int) -> int:
    """Return the number of samples, >= 1, whose graph takes about `budget` bytes."""
    samples = samples_of(batch) or 1
    size = -(-samples // _PROBE)
    probe = next(micro_batches(batch, size))
    graph = graph_of(objective.evaluate(0, probe), params)
    used = graph_bytes(graph.roots, objective.tree.parameters())
    return max(1, min(samples, size * budget // max(used, 1)))
