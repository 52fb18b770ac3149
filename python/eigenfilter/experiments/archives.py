"""A reader of what torch.save writes: tensors and plain data, every byte checked.

torch.load, even of weights only, believes a file: a storage may claim more bytes than it has, and
calls that are allowed may be given any size. Here a tensor is made from bytes that were read, and
only where they suffice for it.
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

_DIMENSIONS = 64  # that a tensor has at most, as in torch's own kernels
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of 0x1950a86a20f9469cfc6c
_FEW = 100_000  # opcodes that any file may have
_LENGTH = 2  # bytes an opcode has at least, on average: a file of shorter ones is none of ours
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
_ZIP = (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, zlib.error, *_DAMAGED)


def read(path: Path) -> Any:
    """Read tensors and plain data, to the CPU.

    Raises:
        UserError: there is no such file, it is damaged, or it holds other objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _ArchiveRecords(archive, path.stat().st_size)
            pickled = records.take("data.pkl")
            try:
                found = pickles.load(
                    pickled,
                    _CALLS,
                    set_state=_set_state,
                    fetch=_StorageReader(records).fetch,
                    max_opcodes=_FEW + len(pickled) // _LENGTH,
                )
            except (*_DAMAGED, NotImplementedError) as error:
                raise UserError(
                    f"{path} holds more than tensors and plain data, or is damaged ({_line(error)})"
                ) from error
            records.check_rest()
            return found
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(f"memory does not suffice to read {path}") from error
    except _ZIP as error:
        if _is_legacy(path):
            raise UserError(
                f"{path} is in the format of torch before 1.6: save it again, by "
                "torch.save(torch.load(path, weights_only=True), path)"
            ) from error
        raise UserError(f"{path} is damaged: {_line(error)}") from error


def _is_legacy(path: Path) -> bool:
    """Whether a file begins as those that torch wrote before its archives."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY
    return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _ArchiveRecords:
    """The files in the archive, each read once."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        infos = archive.infolist()
        self._left = {info.filename: info for info in infos}
        stored = all(
            info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            for info in infos
        )
        # They may not overlap either: then they would be larger together than the file.
        if not stored or len(self._left) < len(infos) or sum(i.file_size for i in infos) > size:
            raise zipfile.BadZipFile("it does not hold what it says")
        roots = [name for name in self._left if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise zipfile.BadZipFile("it is not an archive of torch.save")
        self._root = roots[0].removesuffix("data.pkl")
        if self.take("byteorder", b"little") != b"little":
            raise zipfile.BadZipFile("its bytes are in another order")

    def take(self, name: str, default: bytes | None = None) -> bytes:
        """The content of a file; its checksum is compared."""
        info = self._left.pop(self._root + name, None)
        if info is not None:
            return self._archive.read(info)
        if default is None:
            raise zipfile.BadZipFile(f"it has no {name!a:.80}")
        return default

    def check_rest(self) -> None:
        """Compare the checksums of what was not taken."""
        for info in self._left.values():
            self._archive.read(info)


class _StorageReader:
    """What tensors are views of: each a tensor [n] over all its bytes."""

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
        self._found: dict[str, Tensor] = {}

    def fetch(self, identity: Any) -> Tensor:
        """The storage of a persistent id: ("storage", type, key, device, elements)."""
        kind, target, key, _, count = identity
        if kind != "storage" or type(target) is not GlobalName:
            raise ForbiddenPickle("it refers to what is no storage")
        dtype = (
            self._DTYPES.get(target.name) if target.module in ("torch", "torch.storage") else None
        )
        if dtype is None or type(key) is not str or type(count) is not int:
            raise ForbiddenPickle("it has a storage of an unknown type")
        if key not in self._found:
            content = bytearray(self._records.take(f"data/{key}"))
            self._found[key] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        storage = self._found[key]
        if storage.dtype != dtype or len(storage) != count:
            raise ValueError(f"a storage has not the {count} elements that it claims")
        return storage


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    """A view of a storage."""
    sizes, strides = _counts(size), _counts(stride)
    [first] = _counts((offset,))
    if type(storage) is not Tensor or len(sizes) != len(strides) or hooks or metadata:
        raise ForbiddenPickle("a tensor is made of something else")
    last = first + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if all(sizes) and last >= len(storage):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(sizes, strides, first if all(sizes) else 0)


def _typed_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A view of a storage of bytes, of a dtype that has no storage of its own."""
    *flags, dtype = rest[:3]
    if type(dtype) is not GlobalName or dtype not in _TYPES:  # only names are sure to have a hash
        raise ForbiddenPickle("a tensor is of an unknown type")
    found = getattr(torch, dtype.name)
    if type(storage) is not Tensor or len(storage) % found.itemsize:
        raise ForbiddenPickle("a tensor is made of something else")
    return _tensor(storage.view(found), offset, size, stride, *flags, *rest[3:])


_TYPES = frozenset(
    GlobalName("torch", name)
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype)
)


def _counts(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or any(type(n) is not int or not 0 <= n < 2**62 for n in values):
        raise ValueError("a size is no number")
    if len(values) > _DIMENSIONS:
        raise ValueError(f"a tensor has more than {_DIMENSIONS} dimensions")
    return values


def _parameter(data: Any, grad: Any, hooks: Any) -> Tensor:
    if type(data) is not Tensor or hooks:
        raise ForbiddenPickle("a parameter is made of something else")
    return data


def _set_state(target: Any, state: Any) -> None:
    """The versions of a state_dict's modules, which torch keeps as an attribute."""
    if type(target) is not OrderedDict or type(state) is not dict or [*state] != ["_metadata"]:
        raise ForbiddenPickle("it sets the state of what has none")
    versions = state["_metadata"]
    if not isinstance(versions, dict) or not all(isinstance(v, dict) for v in versions.values()):
        raise ForbiddenPickle("it has versions that are none")
    target._metadata = versions  # type: ignore[attr-defined]


def _ordered() -> dict[str | int, Any]:
    return OrderedDict()


_CALLS: Mapping[GlobalName, Callable[..., Any]] = {
    GlobalName("torch._utils", "_rebuild_tensor_v2"): _tensor,
    GlobalName("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    GlobalName("torch._utils", "_rebuild_parameter"): _parameter,
    GlobalName("torch", "Size"): lambda values: torch.Size(_counts(values)),
    GlobalName("collections", "OrderedDict"): _ordered,
}
