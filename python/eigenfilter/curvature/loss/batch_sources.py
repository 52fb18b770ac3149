"""Sources of batches, which are the same in every pass, and trees of tensors such as a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_CHANGED = (
    "the loader gave other batches in a second pass, so that products would belong to no single "
    "matrix: give it a fixed order (shuffle=False, or neither a generator of its own nor "
    "persistent workers), switch off random augmentation, or pass list(loader)"
)

_PLAIN = (bool, int, float, complex, str, bytes, np.generic, type(None))  # types without samples


class UnusableModelError(RuntimeError):
    """The model, the loss or the data cannot be used, by any engine."""


class BatchWeightError(UnusableModelError, ValueError):
    """The weight of a batch is unknown, or is not what its loss averages over."""


class BatchSource(Protocol):
    """Batches, the same in every pass."""

    @property
    def single(self) -> bool:
        """Whether there is certainly one batch only, whose weight does not matter."""

    @property
    def count(self) -> int | None:
        """The number of batches, if it is known."""

    @property
    def failure(self) -> Exception | None:
        """The last exception that reading a batch raised, which is no engine's fault."""

    def batches(self) -> Iterator[Any]:
        """Yield the batches in order."""


class InMemoryBatches:
    """Batches in memory."""

    failure = None

    def __init__(self, data: list[Any], *, pairs: bool, alone: bool = True) -> None:
        """Check the batches.

        Args:
            data: the batches, at least one.
            pairs: whether each must be an (input, target) pair.
            alone: whether no other process has batches.
        """
        if not data:
            raise ValueError("data must hold at least one batch")
        for batch in data:
            _check_batch(batch, pairs=pairs)
        self._data = list(data)
        self.single = alone and len(data) == 1

    @property
    def count(self) -> int:
        return len(self._data)

    def batches(self) -> Iterator[Any]:
        return iter(self._data)

    def tensors(self) -> list[Tensor]:
        """Return the tensors whose version counters show whether the data changed."""
        return list(leaves(self._data))

    def forget(self) -> None:
        """Allow batches to differ from those of earlier passes, because x has changed."""


class LoaderBatches:
    """Batches of a DataLoader, read again in each pass.

    Random numbers that the loader draws from torch's global generator are replayed, and the
    generator is restored, so that an order or an augmentation which depends on nothing else is the
    same in every pass. Any other change is noticed by comparing the sums of every batch with those
    of the first pass.
    """

    single = False

    def __init__(self, loader: DataLoader[Any], *, pairs: bool, seed: int) -> None:
        self._loader = loader
        self._pairs = pairs
        self._seed = seed
        self.failure: Exception | None = None
        self._fingerprints: list[list[tuple[object, ...]]] = []  # of each batch, of each tensor
        self._complete = False  # whether a pass has read all batches

    @property
    def count(self) -> int | None:
        try:
            return len(self._loader)
        except TypeError:  # of an IterableDataset
            return None

    def batches(self) -> Iterator[Any]:
        """Yield the batches in order.

        Raises:
            RuntimeError: they differ from those of an earlier pass, or there are none.
        """
        index = 0
        for batch in self._replay():
            _check_batch(batch, pairs=self._pairs)
            fingerprints = [_fingerprint(t) for t in leaves(batch)]
            if index == len(self._fingerprints) and not self._complete:
                self._fingerprints.append(fingerprints)
            elif index >= len(self._fingerprints) or fingerprints != self._fingerprints[index]:
                raise UnusableModelError(_CHANGED)
            index += 1
            yield batch
        if index < len(self._fingerprints):
            raise UnusableModelError(_CHANGED)
        if not index:
            raise UnusableModelError(
                "the loader gave no batch: its data set, sampler or filter leaves nothing"
            )
        self._complete = True

    def tensors(self) -> list[Tensor]:
        """Return no tensors: changes in the loader's data set are not noticed here."""
        return []

    def forget(self) -> None:
        """Allow batches to differ from those of earlier passes, because x has changed."""
        self._fingerprints, self._complete = [], False

    def _replay(self) -> Iterator[Any]:
        state = torch.Generator().manual_seed(self._seed).get_state()
        iterator: Iterator[Any] | None = None
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                try:
                    if iterator is None:
                        iterator = iter(self._loader)
                    batch = next(iterator)
                except StopIteration:
                    return
                except Exception as error:
                    self.failure = error
                    raise
                state = torch.get_rng_state()
            yield batch


class MicroBatches:
    """The batches of a source, split into micro-batches of `size` samples."""

    single = False
    count = None
    failure = None

    def __init__(self, source: BatchSource, size: int) -> None:
        self._source = source
        self._size = size

    def batches(self) -> Iterator[Any]:
        for batch in self._source.batches():
            yield from micro_batches(batch, self._size)


def source_of(data: Any, *, pairs: bool, alone: bool, seed: int) -> InMemoryBatches | LoaderBatches:
    """Return the source of the batches of `data`: one batch, a list of batches, or a DataLoader.

    Args:
        data: see above.
        pairs: whether each batch must be an (input, target) pair.
        alone: whether no other process has batches.
        seed: seed of the random numbers that a loader draws.

    Raises:
        ValueError: there is no batch, or with `pairs` one is not an (input, target) pair.
    """
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, Sized) and len(data.dataset) == 0:
            raise ValueError("the loader gives no batch: its data set is empty")
        return LoaderBatches(data, pairs=pairs, seed=seed)
    if isinstance(data, Dataset):
        raise ValueError(
            f"{type(data).__name__} gives samples, not batches: pass "
            "torch.utils.data.DataLoader(data, batch_size=...)"
        )
    if isinstance(data, Iterator):
        raise ValueError(
            f"a {type(data).__name__} can be read once, and products need several passes: pass "
            "list(data), or the DataLoader itself"
        )
    if pairs and isinstance(data, list) and len(data) == 2 and all(_is_tensor(t) for t in data):
        raise ValueError(
            "a list holds batches, and these are two tensors (got a batch of type Tensor): pass "
            "one batch as the tuple (input, target)"
        )
    return InMemoryBatches(data if isinstance(data, list) else [data], pairs=pairs, alone=alone)


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


def _is_tensor(t: object) -> bool:
    return isinstance(t, Tensor)


def _check_batch(batch: Any, *, pairs: bool) -> None:
    """Raise ValueError if a batch is not as it must be, or has no samples."""
    if pairs and not (isinstance(batch, list | tuple) and len(batch) == 2):
        remedy = ""
        if isinstance(batch, Mapping):
            remedy = (
                ". Say how it is read: forward=lambda model, batch: (output, target), as "
                "(model(**inputs).logits, batch['labels']); or loss_fn=lambda loss, _: loss with "
                "forward=lambda model, batch: (model(**batch).loss, None) and weight=..."
            )
        elif (
            isinstance(batch, tuple)
            and batch
            and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in batch)
        ):
            remedy = ", of pairs: several batches go in a list, list(data)"
        elif isinstance(batch, list | tuple) and len(batch) > 2:
            remedy = (
                f" of {len(batch)}. Name them in forward=, as by forward=lambda model, batch: "
                "(model(batch[0], batch[1]), batch[2])"
            )
        raise ValueError(
            "data must be an (input, target) tuple, a list of such pairs or a DataLoader of them, "
            f"or forward be given; got a batch of type {type(batch).__name__}{remedy}"
        )
    if pairs and isinstance(batch[0], np.ndarray):
        raise ValueError(
            "the input of a batch is a NumPy array: convert it, with torch.as_tensor, to the dtype "
            "of the model's parameters"
        )
    tensors = list(leaves(batch))
    if any(t.is_inference() for t in tensors):
        raise ValueError(
            "a batch holds tensors made in torch.inference_mode(), which cannot take part in "
            "derivatives: make them outside it, or clone() them there"
        )
    if any(t.is_meta for t in tensors):
        raise ValueError("data on the meta device hold no numbers: pass tensors that do")
    if tensors and all(t.ndim and not t.shape[0] for t in tensors):
        raise ValueError("a batch holds no samples: leave it out")


@torch.no_grad()
def _fingerprint(t: Tensor) -> tuple[object, ...]:
    """Return a tensor's shape, dtype and sum, which takes one pass over it."""
    wide = t.is_floating_point() or t.is_complex()
    total = t.sum(dtype=torch.promote_types(t.dtype, torch.float64) if wide else torch.int64)
    # NaN is not equal to itself, but its text is.
    return tuple(t.shape), t.dtype, repr(total.item())
