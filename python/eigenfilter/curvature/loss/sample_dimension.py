"""Batches whose outputs differ in another dimension than the first, compared along that one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from eigenfilter.curvature.loss.batch_trees import can_join, leaves, replace_tensors

Loss = Callable[[Any, Any], Tensor]
Samples = tuple[Tensor, Any]  # output, target


def other_dimension(one: Tensor, other: Tensor) -> int | None:
    """Return the dimension in which two outputs differ, if it is exactly one and not the first."""
    if one.ndim != other.ndim:
        return None
    differ = [d for d in range(one.ndim) if one.shape[d] != other.shape[d]]
    return differ[0] if len(differ) == 1 and differ[0] > 0 else None


def with_samples_first(
    one: Samples, other: Samples, dimension: int, loss: Loss
) -> tuple[Samples, Samples, Loss] | None:
    """Return two batches with `dimension` of their outputs moved to the front, and their loss.

    In a target it is the dimension whose sizes differ as those of the outputs do. None if a target
    differs in another way, so that the two batches cannot be joined.
    """
    sizes = one[0].shape[dimension], other[0].shape[dimension]
    targets = list(leaves(one[1])), list(leaves(other[1]))
    if len(targets[0]) != len(targets[1]):
        return None
    places: list[int | None] = []
    for a, b in zip(*targets, strict=True):
        differ = [d for d in range(a.ndim) if a.ndim == b.ndim and a.shape[d] != b.shape[d]]
        if a.shape == b.shape:
            places.append(None)
        elif len(differ) == 1 and (a.shape[differ[0]], b.shape[differ[0]]) == sizes:
            places.append(differ[0])
        else:
            return None

    def first(samples: Samples) -> Samples:
        moves = zip(leaves(samples[1]), places, strict=True)
        target = replace_tensors(samples[1], _moved(moves, lambda t, d: t.movedim(d, 0)))
        return samples[0].movedim(dimension, 0), target

    def loss_samples_first(output: Tensor, target: Any) -> Tensor:
        moves = zip(leaves(target), places, strict=True)
        back = replace_tensors(target, _moved(moves, lambda t, d: t.movedim(0, d)))
        return loss(output.movedim(0, dimension), back)

    here, there = first(one), first(other)
    return (here, there, loss_samples_first) if can_join(here, there, sizes) else None


def _moved(
    moves: Iterable[tuple[Tensor, int | None]], move: Callable[[Tensor, int], Tensor]
) -> Iterator[Tensor]:
    for t, d in moves:
        yield t if d is None else move(t, d)
