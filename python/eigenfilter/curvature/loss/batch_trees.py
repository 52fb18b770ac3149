"""Trees of tensors, such as a batch: nested lists, tuples and mappings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, np.generic, type(None))  # types without samples


def micro_batches(batch: Any, size: int, samples: int | None = None) -> Iterator[Any]:
    """Yield a batch in pieces of `size` samples; the last one may be smaller.

    samples: the number of samples of the batch; by default the leading dimension of its tensors.

    Raises:
        ValueError: its tensors do not share their leading dimension.
    """
    samples = samples_of(batch) if samples is None else samples
    if samples is None:
        raise ValueError(
            "a batch cannot be split, because its tensors do not share a leading dimension of "
            "samples: choose another engine"
        )
    for start in range(0, samples, size):
        yield take_rows(batch, slice(start, start + size), samples)


def samples_of(batch: Any) -> int | None:
    """Return the leading dimension that all tensors of a batch share, or None."""
    sizes = {t.shape[0] if t.ndim else None for t in leaves(batch)}
    return sizes.pop() if len(sizes) == 1 else None


def rows_of(batch: Any) -> int | None:
    """Return the likely number of samples of a batch, or None.

    It is the number of rows of its first tensor, if another tensor has as many or no other has
    rows. Some tensors may hold no samples, such as class weights beside the targets.
    """
    sizes = [t.shape[0] for t in leaves(batch) if t.ndim]
    return sizes[0] if sizes and (len(sizes) == 1 or sizes.count(sizes[0]) > 1) else None


def leaves(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree: of nested lists, tuples and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _of(tree.values())
    elif isinstance(tree, list | tuple):
        yield from _of(tree)


def to_device(tree: Any, device: torch.device) -> Any:
    """Return a tree with its tensors on `device`; the tree itself, if they already are."""
    if all(t.device == device for t in leaves(tree)):
        return tree
    return _map_tensors(tree, lambda t: t.to(device, non_blocking=True))


def to_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """Return a tree with its floating tensors in `dtype`; the tree itself, if they already are."""
    if all(t.dtype == dtype or not t.is_floating_point() for t in leaves(tree)):
        return tree
    return _map_tensors(tree, lambda t: t.to(dtype) if t.is_floating_point() else t)


def replace_floating_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """Return a tree with its floating tensors replaced, in the order of `leaves`."""
    others = iter(tensors)
    return _map_tensors(tree, lambda t: next(others) if t.is_floating_point() else t)


def replace_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """Return `tree` with its tensors, as `leaves` yields them, replaced by others."""
    others = iter(tensors)
    return _map_tensors(tree, lambda _: next(others))


def _of(trees: Iterable[Any]) -> Iterator[Tensor]:
    for tree in trees:
        yield from leaves(tree)


def is_divisible(tree: Any, samples: int) -> bool:
    """Whether `take_rows` can divide a tree.

    It has parts with one row for each sample, or consists of numbers, text and None. An object of
    another class may contain samples, and makes it not divisible.
    """
    parts = list(_parts_with_rows(tree, samples))
    return all(part is not None for part in parts) and (
        any(parts) or not any(isinstance(t, Tensor) and t.ndim for t in leaves(tree))
    )


def take_rows(tree: Any, part: slice, samples: int) -> Any:
    """Return a tree with the rows `part` of every part that has `samples` rows."""
    if _has_rows(tree, samples):
        return tree[part]
    return _map_members(tree, lambda value: take_rows(value, part, samples))


def clone_tensors(tree: Any) -> Any:
    """Return a tree with copies of its tensors."""
    return _map_tensors(tree, lambda t: t.detach().clone())


def can_join(one: Any, other: Any, sizes: tuple[int, int]) -> bool:
    """Whether two trees are alike except for the rows of parts with one row for each sample.

    sizes: the numbers of samples of the two.
    """
    if _has_rows(one, sizes[0]) and _has_rows(other, sizes[1]):
        return type(one) is type(other) and _row(one) == _row(other)
    if isinstance(one, Tensor | np.ndarray):
        same = type(one) is type(other) and _row(one) == _row(other) and one.shape == other.shape
        return same and bool((one == other).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(
            can_join(one[key], other[key], sizes) for key in one
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(
            can_join(a, b, sizes) for a, b in zip(one, other, strict=True)
        )
    return isinstance(one, _PLAIN) and bool(one == other)


def join_rows(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    """Return a tree with the rows of both trees, for which `can_join` holds.

    Parts without rows are taken from the first.
    """
    if _has_rows(one, sizes[0]) and _has_rows(other, sizes[1]):
        if isinstance(one, Tensor):
            return torch.cat((one, other))
        return np.concatenate((one, other)) if isinstance(one, np.ndarray) else one + other
    if isinstance(one, Mapping):
        return {key: join_rows(value, other[key], sizes) for key, value in one.items()}
    if isinstance(one, list | tuple):
        pairs = iter(other)
        return _map_members(one, lambda value: join_rows(value, next(pairs), sizes))
    return one


def _has_rows(tree: Any, samples: int) -> bool:
    """Whether a part of a tree has one row for each sample: a tensor, an array, or a plain list.

    A list of tensors that have one row for each sample themselves is no such part.
    """
    if isinstance(tree, Tensor | np.ndarray):
        return tree.ndim > 0 and len(tree) == samples
    if not isinstance(tree, list | tuple) or hasattr(tree, "_fields") or len(tree) != samples:
        return False
    return not any(isinstance(t, Tensor | np.ndarray) and _has_rows(t, samples) for t in tree)


def _row(rows: Any) -> Any:
    """Return the properties that rows must share to be joined."""
    if isinstance(rows, Tensor):
        return rows.shape[1:], rows.dtype, rows.device
    return (rows.shape[1:], rows.dtype) if isinstance(rows, np.ndarray) else None


def _parts_with_rows(tree: Any, samples: int) -> Iterator[bool | None]:
    """Yield, for each part of a tree, whether it has one row for each sample; None if unknown."""
    if _has_rows(tree, samples):
        yield True
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _parts_with_rows(value, samples)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _parts_with_rows(value, samples)
    else:
        yield False if isinstance(tree, (Tensor, np.ndarray, *_PLAIN)) else None


def _map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    return _map_members(tree, lambda value: _map_tensors(value, change))


def _map_members(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return a list, tuple or mapping with its members changed; anything else unchanged."""
    if isinstance(tree, Mapping):
        return {key: change(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [change(value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree
