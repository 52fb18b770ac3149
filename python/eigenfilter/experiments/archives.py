"""A reader of files that torch.save wrote: tensors and plain data, with every byte checked.

torch.load trusts a file even with `weights_only=True`: a storage may claim more bytes than it has,
and allowed calls may request any size. This reader makes a tensor only from bytes that it has read,
and only if there are enough of them.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenfilter.experiments import pickles
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.pickles import ForbiddenPickle, GlobalName

_MAX_DIMENSIONS = 64  # of a tensor, as in torch's own kernels
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of 0x1950a86a20f9469cfc6c
_BASE_OPCODES = 100_000  # a file of any size may have so many opcodes
_BYTES_PER_OPCODE = 2  # smallest mean length of opcodes in the files that torch.save writes
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
_ZIP = (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, zlib.error, *_DAMAGED)


def read(path: Path) -> Any:
    """Read tensors and plain data into memory of the CPU.

    Raises:
        UserError: the file does not exist, is damaged, or contains other objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _ArchiveRecords(archive, path.stat().st_size)
            pickled = records.take("data.pkl")
            try:
                content = pickles.load(
                    pickled,
                    _CALLS,
                    set_state=_set_state,
                    fetch=_StorageReader(records).fetch,
                    max_opcodes=_BASE_OPCODES + len(pickled) // _BYTES_PER_OPCODE,
                )
            except (*_DAMAGED, NotImplementedError) as error:
                raise UserError(
                    f"{path} contains more than tensors and plain data, or is damaged "
                    f"({_message(error)})"
                ) from error
            records.check_rest()
            return content
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"out of memory while reading {path}; free some memory") from error
    except _ZIP as error:
        if _is_legacy(path):
            raise UserError(
                f"{path} is in the format of torch before 1.6; save it again with "
                "torch.save(torch.load(path, weights_only=True), path)"
            ) from error
        raise UserError(f"{path} is damaged: {_message(error)}") from error


def _is_legacy(path: Path) -> bool:
    """Return whether a file has the format that torch wrote before version 1.6."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC
    return False


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _ArchiveRecords:
    """The files in the archive, each of which can be taken once."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        infos = archive.infolist()
        self._left = {info.filename: info for info in infos}
        stored = all(
            info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            for info in infos
        )
        # Entries that overlap would together be larger than the file.
        if not stored or len(self._left) < len(infos) or sum(i.file_size for i in infos) > size:
            raise zipfile.BadZipFile("its directory does not match its content")
        roots = [name for name in self._left if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise zipfile.BadZipFile("it is not an archive of torch.save")
        self._root = roots[0].removesuffix("data.pkl")
        if self.take("byteorder", b"little") != b"little":
            raise zipfile.BadZipFile("its byte order is not little-endian")

    def take(self, name: str, default: bytes | None = None) -> bytes:
        """Return the content of a file after comparing its checksum."""
        info = self._left.pop(self._root + name, None)
        if info is not None:
            return self._archive.read(info)
        if default is None:
            raise zipfile.BadZipFile(f"it has no {name!a:.80}")
        return default

    def check_rest(self) -> None:
        """Compare the checksums of the files that were not taken."""
        for info in self._left.values():
            self._archive.read(info)


class _StorageReader:
    """Reads storages, each as a flat tensor [n] of all its elements."""

    _DTYPES: Mapping[str, torch.dtype] = {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
        "ComplexDoubleStorage": torch.complex128,
        "ComplexFloatStorage": torch.complex64,
        "UntypedStorage": torch.uint8,
    }

    def __init__(self, records: _ArchiveRecords) -> None:
        self._records = records
        self._cache: dict[str, Tensor] = {}

    def fetch(self, identity: Any) -> Tensor:
        """Return the storage of a persistent id ("storage", type, key, device, elements)."""
        kind, storage_type, key, _, count = identity
        if kind != "storage" or type(storage_type) is not GlobalName:
            raise ForbiddenPickle("it refers to an object that is not a storage")
        known = storage_type.module in ("torch", "torch.storage")
        dtype = self._DTYPES.get(storage_type.name) if known else None
        if dtype is None or type(key) is not str or type(count) is not int:
            raise ForbiddenPickle("it has a storage of an unknown type")
        if key not in self._cache:
            content = bytearray(self._records.take(f"data/{key}"))
            self._cache[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        storage = self._cache[key]
        if storage.dtype != dtype or len(storage) != count:
            raise ValueError(f"a storage does not have the {count} elements that it claims")
        return storage


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    """Return a view of a storage, after checking that the storage is large enough."""
    sizes, strides = _check_counts(size), _check_counts(stride)
    [first] = _check_counts((offset,))
    if type(storage) is not Tensor or len(sizes) != len(strides) or hooks or metadata:
        raise ForbiddenPickle("a tensor is not a plain view of a storage")
    last = first + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if all(sizes) and last >= len(storage):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(sizes, strides, first if all(sizes) else 0)


def _typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Return a view of a storage of bytes, for a dtype that has no storage type of its own."""
    *flags, name = rest[:3]
    if type(name) is not GlobalName or name not in _TYPES:  # other objects may not be hashable
        raise ForbiddenPickle("a tensor has an unknown dtype")
    dtype = getattr(torch, name.name)
    if type(storage) is not Tensor or len(storage) % dtype.itemsize:
        raise ForbiddenPickle("a tensor is not a plain view of a storage")
    return _tensor(storage.view(dtype), offset, size, stride, *flags, *rest[3:])


_TYPES = frozenset(
    GlobalName("torch", name)
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype)
)


def _check_counts(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or any(type(n) is not int or not 0 <= n < 2**62 for n in values):
        raise ValueError("a size is not an integer from 0 to 2**62")
    if len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has more than {_MAX_DIMENSIONS} dimensions")
    return values


def _parameter(data: Any, grad: Any, hooks: Any) -> Tensor:
    if type(data) is not Tensor or hooks:
        raise ForbiddenPickle("a parameter is not made of a tensor")
    return data


def _set_state(target: Any, state: Any) -> None:
    """Set the versions of a state_dict's modules, which torch stores as an attribute."""
    if type(target) is not OrderedDict or type(state) is not dict or [*state] != ["_metadata"]:
        raise ForbiddenPickle("it sets the state of an object that has none")
    versions = state["_metadata"]
    if not isinstance(versions, dict) or not all(isinstance(v, dict) for v in versions.values()):
        raise ForbiddenPickle("the module versions of a state_dict are not dictionaries")
    target._metadata = versions  # type: ignore[attr-defined]


def _ordered_dict() -> dict[str | int, Any]:
    return OrderedDict()


_CALLS: Mapping[GlobalName, Callable[..., Any]] = {
    GlobalName("torch._utils", "_rebuild_tensor_v2"): _tensor,
    GlobalName("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    GlobalName("torch._utils", "_rebuild_parameter"): _parameter,
    GlobalName("torch", "Size"): lambda values: torch.Size(_check_counts(values)),
    GlobalName("collections", "OrderedDict"): _ordered_dict,
}
