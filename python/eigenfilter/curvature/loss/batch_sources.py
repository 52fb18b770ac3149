"""Sources of batches, which are the same in every pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eigenfilter.curvature.loss.batch_trees import leaves, micro_batches

_CHANGED = (
    "the loader gave other batches in a second pass, so that products would belong to no single "
    "matrix: give it a fixed order (shuffle=False, or neither a generator of its own nor "
    "persistent workers), switch off random augmentation, or pass list(loader)"
)


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


def _is_tensor(t: object) -> bool:
    return isinstance(t, Tensor)


def _check_batch(batch: Any, *, pairs: bool) -> None:
    """Raise ValueError if a batch is not as it must be, or has no samples."""
    if pairs and not (isinstance(batch, list | tuple) and len(batch) == 2):
        remedy = ""
        if isinstance(batch, Mapping):
            remedy = (
                ". For a causal language model call curvature.causal_lm(model, batches). Or say "
                "how it is read: forward=lambda model, batch: (output, target), as "
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
