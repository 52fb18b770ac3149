"""Readers of the formats that image data sets are published in; nothing in a file is executed."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PIXELS = 3 * 32 * 32

_READING = (OSError, EOFError, zlib.error, tarfile.TarError)


class Corrupt(Exception):
    """A file is not what its name says: one line with its path."""


def idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes in a file of MNIST's IDX format, which may be compressed by gzip.

    Args:
        path: the file.
        dimensions: how many the array must have.

    Raises:
        Corrupt: it is cut short, damaged, or of another format.

    Source: Y. LeCun, yann.lecun.com/exdb/mnist: 0, 0, 8 for bytes, d; d big-endian sizes; data.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except _READING as error:
        raise Corrupt(f"{path} cannot be read ({error})") from error
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise Corrupt(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    sizes = [int(size) for size in np.frombuffer(raw, ">u4", dimensions, 4)]
    if len(raw) - start != math.prod(sizes):
        raise Corrupt(
            f"{path} has {len(raw) - start} bytes of data where its head says {math.prod(sizes)}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def cifar_binary(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 3, 32, 32] and labels [n] of a binary file of CIFAR-10 or -100.

    Raises:
        Corrupt: it does not consist of whole records.

    Source: A. Krizhevsky, cs.toronto.edu/~kriz/cifar.html: labels (of 100: coarse, fine), pixels.
    """
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        raise Corrupt(f"{path} cannot be read ({error})") from error
    head = 1 if classes == 10 else 2
    if not len(raw) or len(raw) % (head + PIXELS):
        raise Corrupt(f"{path} has {len(raw)} bytes, not a multiple of {head + PIXELS}")
    records = raw.reshape(-1, head + PIXELS)
    return records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1]


def cifar_pickled(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 3, 32, 32] and labels [n] of a file for Python of CIFAR-10 or -100.

    Args:
        path: the file.
        key: of the labels.

    Raises:
        Corrupt: it is damaged, holds more than arrays and lists, or has no such entries.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise Corrupt(f"{path} cannot be read ({error})") from error
    return _unpickled(raw, str(path), key)


def _unpickled(raw: bytes, name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        entries = _Arrays(io.BytesIO(raw), encoding="latin1").load()
        pixels, labels = entries["data"], np.asarray(entries[key])
        if pixels.dtype != np.uint8 or labels.min() < 0 or labels.max() > 255:
            raise ValueError("its entries are of another type")
        return pixels.reshape(-1, 3, 32, 32), labels.astype(np.uint8)
    except Exception as error:  # what damaged pickles raise has no end
        raise Corrupt(f"{name} is not a file of CIFAR ({type(error).__name__}: {error})") from error


def cifar_archive(
    path: Path, names: Sequence[str], key: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `cifar_pickled` reads, for these files in a .tar.gz; nothing is unpacked on disk.

    Raises:
        Corrupt: it is damaged, or a file is not in it.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name in names else None
                if file is not None:
                    found[member.name] = file.read()
    except _READING as error:
        raise Corrupt(f"{path} cannot be read ({error})") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise Corrupt(f"{path} has no {missing[0]}")
    return [_unpickled(found[name], f"{name} in {path}", key) for name in names]


class _Arrays(pickle.Unpickler):
    """Unpickles arrays, and nothing that could run code."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
            *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
