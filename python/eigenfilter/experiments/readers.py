"""Readers of the file formats in which image data sets are published.

The readers execute nothing from a file, and read no more than a published file of the format can
contain. A file that claims to be larger, or that unpacks to more, is rejected before memory is
allocated for it.
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
_MAX_OVERHEAD = 2**16  # bytes in a file or an archive other than its images
_MAX_GZIP_RATIO = 1032  # largest compression ratio of gzip
_BLOCK = 512  # bytes; sizes in a tar archive are padded to a multiple of it


class CorruptFile(Exception):
    """The content of a file does not match its name. The message is one line with the path."""


def idx(path: Path, dimensions: int, max_bytes: int) -> np.ndarray:
    """Read an array of bytes in the IDX format of MNIST, which may be compressed by gzip.

    Args:
        path: the file.
        dimensions: number of dimensions that the array must have.
        max_bytes: largest size of the array.

    Raises:
        CorruptFile: the file is truncated, damaged, too large, or of another format.

    Source: Y. LeCun, yann.lecun.com/exdb/mnist: 0, 0, 8 for bytes, d; d big-endian sizes; data.
    """
    start = 4 + 4 * dimensions
    raw = _read_bytes(path, start + max_bytes)
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise CorruptFile(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    sizes = [int(size) for size in np.frombuffer(raw, ">u4", dimensions, 4)]
    if len(raw) - start != math.prod(sizes) or not all(sizes):
        raise CorruptFile(
            f"{path} has {len(raw) - start} bytes of data, but its header says {math.prod(sizes)}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def cifar_binary(path: Path, classes: int, max_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Read images [n, 3, 32, 32] and labels [n] from a binary file of CIFAR-10 or CIFAR-100.

    Args:
        path: the file.
        classes: 10 or 100.
        max_images: largest number of images in the file.

    Raises:
        CorruptFile: the file does not consist of whole records, or has too many.

    Source: A. Krizhevsky, cs.toronto.edu/~kriz/cifar.html: labels (of 100: coarse, fine), pixels.
    """
    head = 1 if classes == 10 else 2
    raw = np.frombuffer(_read_bytes(path, max_images * (head + PIXELS)), np.uint8)
    if not len(raw) or len(raw) % (head + PIXELS):
        raise CorruptFile(f"{path} has {len(raw)} bytes, not a multiple of {head + PIXELS}")
    records = raw.reshape(-1, head + PIXELS)
    return records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1]


def cifar_pickled(path: Path, key: str, max_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Read images [n, 3, 32, 32] and labels [n] from a Python file of CIFAR-10 or CIFAR-100.

    Args:
        path: the file.
        key: key of the labels in the pickled dictionary.
        max_images: largest number of images in the file.

    Raises:
        CorruptFile: the file is damaged or too large, lacks the entries, or contains other objects
            than one array of bytes and lists.
    """
    return _unpickle(_read_bytes(path, _max_pickle_size(max_images)), str(path), key, max_images)


def cifar_archive(
    path: Path, names: Sequence[str], key: str, max_images: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Read files as `cifar_pickled` does, from a .tar.gz archive without unpacking it on disk.

    Raises:
        CorruptFile: the archive is damaged or too large, or a file is missing from it.
    """
    try:
        with gzip.open(path) as stream:
            members = _read_members(cast(BinaryIO, stream), names, _max_pickle_size(max_images))
    except (*_READING, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read ({error})") from error
    missing = [name for name in names if name not in members]
    if missing:
        raise CorruptFile(f"{path} has no {missing[0]}")
    return [_unpickle(members[name], f"{name} in {path}", key, max_images) for name in names]


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file, and decompress it if its name ends in .gz."""
    compressed = path.suffix == ".gz"
    try:
        # `read` allocates all that it is asked for at once, so ask for no more than can come.
        largest = path.stat().st_size * (_MAX_GZIP_RATIO if compressed else 1)
        with gzip.open(path) if compressed else path.open("rb") as file:
            raw = file.read(min(max_bytes, largest) + 1)  # gzip compares its checksum at the end
    except _READING as error:
        raise CorruptFile(f"{path} cannot be read ({error})") from error
    if len(raw) > max_bytes:
        raise CorruptFile(f"{path} has more than the {max_bytes} bytes that such a file can have")
    return raw


def _read_members(stream: BinaryIO, names: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """Read regular files from a tar archive.

    Python's tarfile trusts the headers of an archive, and sparse files or extended headers can
    make it allocate any amount of memory. The archives of CIFAR have neither.

    Args:
        stream: the uncompressed archive.
        names: names of the files.
        max_bytes: largest size of each file.

    Raises:
        ValueError: the archive is damaged or too large.

    Source: POSIX.1-1988, ustar: name, size in octal at 124, header checksum at 148, type at 156.
    """
    members: dict[str, bytes] = {}
    budget = _MAX_OVERHEAD + len(names) * (max_bytes + _BLOCK)
    while any(header := stream.read(_BLOCK)):
        name, size = _parse_header(header)
        padding = -size % _BLOCK
        budget -= _BLOCK + size + padding
        if budget < 0 or (name in names and size > max_bytes):
            raise ValueError("it contains more than such an archive can have")
        if name in names and header[156:157] in (b"0", b"\0"):
            members[name] = stream.read(size)
            size = 0
        stream.seek(size + padding, io.SEEK_CUR)
    while chunk := stream.read(2**20):  # read on to the end, where gzip compares its checksum
        budget -= len(chunk)
        if budget < 0:
            raise ValueError("it contains more than such an archive can have")
    return members


def _parse_header(header: bytes) -> tuple[str, int]:
    """Return the name and the size of an archive member, and check the header's checksum."""
    signed = header[:148] + b" " * 8 + header[156:]
    if len(header) != _BLOCK or _octal(header[148:156]) != sum(signed):
        raise ValueError("the header of a file in it is damaged")
    return header[:100].split(b"\0", 1)[0].decode("latin1"), _octal(header[124:136])


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits.isdigit():  # int() would also accept a sign
        raise ValueError("a number in it is damaged")
    return int(digits, 8)


# CIFAR's pickles contain a dictionary of lists and one array of bytes.

_U1 = object()  # stands for the NumPy dtype of bytes


class _EncodedBytes(NamedTuple):
    """Bytes in the form of text, as Python 3 writes them in protocol 2."""

    text: str


class _PixelArray:
    """Stands for the one NumPy array of a pickle, whose pixels are not copied."""

    def __init__(self) -> None:
        self.pixels: np.ndarray | None = None
        self._exists = False
        self.calls: Mapping[GlobalName, Callable[..., Any]] = {
            GlobalName("numpy.core.multiarray", "_reconstruct"): self._reconstruct,
            GlobalName("numpy._core.multiarray", "_reconstruct"): self._reconstruct,
            GlobalName("numpy", "dtype"): _dtype,
            GlobalName("_codecs", "encode"): _encode,
        }

    def _reconstruct(self, kind: Any, shape: Any, code: Any) -> _PixelArray:
        if kind != GlobalName("numpy", "ndarray") or self._exists:
            raise ForbiddenPickle("it has more than one array")
        self._exists = True
        return self

    def set_state(self, target: Any, state: Any) -> None:
        """Set the content of the array; for the dtype of bytes, check the state only."""
        if type(state) is not tuple:
            raise ForbiddenPickle("it sets the state of an object that has none")
        if target is _U1:
            if [value for value in state if type(value) in (str, int)] != [3, "|", -1, -1, 0]:
                raise ForbiddenPickle("its array does not consist of bytes")
            return
        _, shape, dtype, by_columns, data = state
        if target is not self or self.pixels is not None or dtype is not _U1:
            raise ForbiddenPickle("its array does not consist of bytes")
        if type(shape) is not tuple or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError("its array has no shape")
        text = data.text if type(data) is _EncodedBytes else data
        content = text.encode("latin1") if type(text) is str else text
        # Check the shape before multiplying: the product of many huge sizes would take forever.
        wrong_shape = len(shape) != 2 or shape[1] != PIXELS
        if type(content) is not bytes or wrong_shape or len(content) != shape[0] * PIXELS:
            raise ValueError(f"its array does not have rows of {PIXELS} bytes")
        order: Any = "F" if by_columns else "C"
        self.pixels = np.frombuffer(content, np.uint8).reshape(shape, order=order)


def _dtype(code: Any, align: Any, copy: Any) -> object:
    if type(code) is not str or code != "u1":
        raise ForbiddenPickle("its array does not consist of bytes")
    return _U1


def _encode(text: Any, encoding: Any) -> _EncodedBytes:
    if type(text) is not str or encoding != "latin1":
        raise ForbiddenPickle("it encodes an object other than bytes")
    return _EncodedBytes(text)


def _max_pickle_size(max_images: int) -> int:
    """Return the largest size of a pickle of images; some protocols write a byte as two."""
    return max_images * (2 * PIXELS + 256) + _MAX_OVERHEAD


def _unpickle(raw: bytes, name: str, key: str, max_images: int) -> tuple[np.ndarray, np.ndarray]:
    array = _PixelArray()
    try:
        # Each image has labels and a name, and each of these may be put into the memo.
        max_opcodes = 16 * max_images + 1000
        entries = pickles.load(raw, array.calls, set_state=array.set_state, max_opcodes=max_opcodes)
        labels = entries[key]
        if entries["data"] is not array or array.pixels is None or type(labels) is not list:
            raise ValueError("its entries have the wrong types")
        if any(type(label) is not int or not 0 <= label < 256 for label in labels):
            raise ValueError("its labels are not integers from 0 to 255")
        return array.pixels.reshape(-1, 3, 32, 32), np.array(labels, np.uint8)
    except _DAMAGED as error:
        reason = f"{type(error).__name__}: {str(error)!a:.120}"
        raise CorruptFile(f"{name} is not a file of CIFAR ({reason})") from error
