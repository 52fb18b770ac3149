"""Readers of the formats that image data sets are published in.

Nothing in a file is executed, and no more is read than the published files of its format hold: a
file that says it is larger, or unpacks to more, is refused before memory is taken for it.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from eigenfilter.experiments import pickles
from eigenfilter.experiments.pickles import ForbiddenPickle, GlobalName

PIXELS = 3 * 32 * 32

_READING = (OSError, EOFError, zlib.error)
_DAMAGED = (ValueError, LookupError, TypeError, EOFError)
_ASIDE = 2**16  # bytes of a file or an archive besides its images, at most
_RATIO = 1032  # bytes that gzip unpacks a byte to at most
_BLOCK = 512  # bytes that everything in a tar archive is a multiple of


class CorruptFile(Exception):
    """A file is not what its name says: one line with its path."""


def idx(path: Path, dimensions: int, most: int) -> np.ndarray:
    """The bytes in a file of MNIST's IDX format, which may be compressed by gzip.

    Args:
        path: the file.
        dimensions: how many the array must have.
        most: bytes that the array has at most.

    Raises:
        Corrupt: it is cut short, damaged, larger, or of another format.

    Source: Y. LeCun, yann.lecun.com/exdb/mnist: 0, 0, 8 for bytes, d; d big-endian sizes; data.
    """
    start = 4 + 4 * dimensions
    raw = _bytes(path, start + most)
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise CorruptFile(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    sizes = [int(size) for size in np.frombuffer(raw, ">u4", dimensions, 4)]
    if len(raw) - start != math.prod(sizes) or not all(sizes):
        raise CorruptFile(
            f"{path} has {len(raw) - start} bytes of data where its head says {math.prod(sizes)}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def cifar_binary(path: Path, classes: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 3, 32, 32] and labels [n] of a binary file of CIFAR-10 or -100.

    Args:
        path: the file.
        classes: 10 or 100.
        most: images that it holds at most.

    Raises:
        Corrupt: it does not consist of whole records, or of more.

    Source: A. Krizhevsky, cs.toronto.edu/~kriz/cifar.html: labels (of 100: coarse, fine), pixels.
    """
    head = 1 if classes == 10 else 2
    raw = np.frombuffer(_bytes(path, most * (head + PIXELS)), np.uint8)
    if not len(raw) or len(raw) % (head + PIXELS):
        raise CorruptFile(f"{path} has {len(raw)} bytes, not a multiple of {head + PIXELS}")
    records = raw.reshape(-1, head + PIXELS)
    return records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1]


def cifar_pickled(path: Path, key: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 3, 32, 32] and labels [n] of a file for Python of CIFAR-10 or -100.

    Args:
        path: the file.
        key: of the labels.
        most: images that it holds at most.

    Raises:
        Corrupt: it is damaged, larger, holds more than one array of bytes and lists, or has no such
            entries.
    """
    return _unpickled(_bytes(path, _pickled_size(most)), str(path), key, most)


def cifar_archive(
    path: Path, names: Sequence[str], key: str, most: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `cifar_pickled` reads, for these files in a .tar.gz; nothing is unpacked on disk.

    Raises:
        Corrupt: it is damaged, larger, or a file is not in it.
    """
    try:
        with gzip.open(path) as stream:
            found = _members(cast(BinaryIO, stream), names, _pickled_size(most))
    except (*_READING, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read ({error})") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise CorruptFile(f"{path} has no {missing[0]}")
    return [_unpickled(found[name], f"{name} in {path}", key, most) for name in names]


def _bytes(path: Path, most: int) -> bytes:
    """The content of a file, unpacked where it is compressed."""
    packed = path.suffix == ".gz"
    try:
        # As much as is asked for is taken at once.
        largest = path.stat().st_size * (_RATIO if packed else 1)
        with gzip.open(path) if packed else path.open("rb") as file:
            raw = file.read(min(most, largest) + 1)  # to the end, where a checksum is compared
    except _READING as error:
        raise CorruptFile(f"{path} cannot be read ({error})") from error
    if len(raw) > most:
        raise CorruptFile(f"{path} holds more than the {most} bytes that such a file can have")
    return raw


def _members(stream: BinaryIO, names: Sequence[str], most: int) -> dict[str, bytes]:
    """The regular files of these names in a tar archive, each of `most` bytes at most.

    Python's tarfile trusts what an archive says of itself: sparse files and extended headers make
    it take any amount of memory. These archives have neither.

    Raises:
        ValueError: it is damaged or larger.

    Source: POSIX.1-1988, ustar: name, size in octal at 124, sum of the head at 148, type at 156.
    """
    found: dict[str, bytes] = {}
    left = _ASIDE + len(names) * (most + _BLOCK)
    while any(head := stream.read(_BLOCK)):
        name, size = _entry(head)
        padding = -size % _BLOCK
        left -= _BLOCK + size + padding
        if left < 0 or (name in names and size > most):
            raise ValueError("it holds more than such an archive can have")
        if name in names and head[156:157] in (b"0", b"\0"):
            found[name] = stream.read(size)
            size = 0
        stream.seek(size + padding, io.SEEK_CUR)
    while chunk := stream.read(2**20):  # to the end, where a checksum is compared
        left -= len(chunk)
        if left < 0:
            raise ValueError("it holds more than such an archive can have")
    return found


def _entry(head: bytes) -> tuple[str, int]:
    """Name and size of an archive's next member."""
    signed = head[:148] + b" " * 8 + head[156:]
    if len(head) != _BLOCK or _octal(head[148:156]) != sum(signed):
        raise ValueError("the head of a file in it is damaged")
    return head[:100].split(b"\0", 1)[0].decode("latin1"), _octal(head[124:136])


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():  # which int would take a sign for
        raise ValueError("a number in it is damaged")
    return int(digits, 8)


# CIFAR's pickles: a dictionary of lists and of one array of bytes.

_U1 = object()  # stands for numpy's dtype of bytes


class _EncodedBytes(NamedTuple):
    """Bytes as text, which Python 3 writes them as in protocol 2."""

    text: str


class _PixelArray:
    """What stands for numpy's array, of which there is one; what it is made of is not copied."""

    def __init__(self) -> None:
        self.pixels: np.ndarray | None = None
        self._exists = False
        self.calls: Mapping[GlobalName, Callable[..., Any]] = {
            GlobalName("numpy.core.multiarray", "_reconstruct"): self._reconstruct,
            GlobalName("numpy._core.multiarray", "_reconstruct"): self._reconstruct,
            GlobalName("numpy", "dtype"): _dtype,
            GlobalName("_codecs", "encode"): _encoded,
        }

    def _reconstruct(self, kind: Any, shape: Any, code: Any) -> _PixelArray:
        if kind != GlobalName("numpy", "ndarray") or self._exists:
            raise ForbiddenPickle("it has more than one array")
        self._exists = True
        return self

    def set_state(self, target: Any, state: Any) -> None:
        """Take the array's content; a dtype of bytes has no other state than its own."""
        if type(state) is not tuple:
            raise ForbiddenPickle("it sets the state of what has none")
        if target is _U1:
            if [value for value in state if type(value) in (str, int)] != [3, "|", -1, -1, 0]:
                raise ForbiddenPickle("its array is not one of bytes")
            return
        _, shape, dtype, by_columns, data = state
        if target is not self or self.pixels is not None or dtype is not _U1:
            raise ForbiddenPickle("its array is not one of bytes")
        if type(shape) is not tuple or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("its array has no shape")
        text = data.text if type(data) is _EncodedBytes else data
        content = text.encode("latin1") if type(text) is str else text
        # In this order: the product of whatever sizes a file may give would take forever.
        other = len(shape) != 2 or shape[1] != PIXELS
        if type(content) is not bytes or other or len(content) != shape[0] * PIXELS:
            raise ValueError(f"its array is not one of rows of {PIXELS} bytes")
        order: Any = "F" if by_columns else "C"
        self.pixels = np.frombuffer(content, np.uint8).reshape(shape, order=order)


def _dtype(code: Any, align: Any, copy: Any) -> object:
    if type(code) is not str or code != "u1":
        raise ForbiddenPickle("its array is not one of bytes")
    return _U1


def _encoded(text: Any, encoding: Any) -> _EncodedBytes:
    if type(text) is not str or encoding != "latin1":
        raise ForbiddenPickle("it encodes what is not bytes")
    return _EncodedBytes(text)


def _pickled_size(most: int) -> int:
    """Bytes of a pickle of so many images at most: some protocols write a byte as two."""
    return most * (2 * PIXELS + 256) + _ASIDE


def _unpickled(raw: bytes, name: str, key: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    array = _PixelArray()
    try:
        # An image has a label of each kind and a name, and those may be kept in the memo.
        entries = pickles.load(
            raw, array.calls, set_state=array.set_state, max_opcodes=16 * most + 1000
        )
        labels = entries[key]
        if entries["data"] is not array or array.pixels is None or type(labels) is not list:
            raise ValueError("its entries are of another type")
        if any(type(label) is not int or not 0 <= label < 256 for label in labels):
            raise ValueError("its labels are no classes")
        return array.pixels.reshape(-1, 3, 32, 32), np.array(labels, np.uint8)
    except _DAMAGED as error:
        what = f"{type(error).__name__}: {str(error)!a:.120}"
        raise CorruptFile(f"{name} is not a file of CIFAR ({what})") from error
