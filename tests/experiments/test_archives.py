"""The reader agrees with torch.load, and rejects files that claim more than they contain."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenfilter.experiments import archives
from eigenfilter.experiments.errors import UserError

SHARED = torch.arange(20.0).view(4, 5)
VALUES: dict[str, Any] = {
    "shared": {"a": SHARED, "b": SHARED[1:, ::2], "c": SHARED.T},
    "module": nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).state_dict(),
    "parameter": {"w": nn.Parameter(torch.ones(3))},
    "expanded": torch.ones(1, 3).expand(4, 3),
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 3),
    "plain": {"a": [1, 2.5, None, True, "é", (1, -2)], "b": 2**70, "c": torch.Size([2])},
    **{
        str(dtype): torch.ones(3, dtype=dtype)
        for dtype in (
            *(torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16),
            *(torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128),
            *(torch.uint16, torch.uint32, torch.float8_e4m3fn),
        )
    },
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        same = (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        return same and a.tolist() == b.tolist()
    if isinstance(a, dict):
        versions = [getattr(each, "_metadata", None) for each in (a, b)]
        return [*a] == [*b] and all(equal(a[k], b[k]) for k in a) and versions[0] == versions[1]
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", VALUES)
def test_as_torch_reads_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(VALUES[name], path)
    contents = archives.read(path)
    assert equal(contents, torch.load(path, weights_only=True))
    if name == "shared":  # tensors of one storage stay so
        contents["a"][1, 0] = -1
        assert contents["b"][0, 0] == contents["c"][0, 1] == -1


def test_damaged_versions_of_modules(tmp_path: Path) -> None:
    state = nn.Linear(2, 3).state_dict()
    state._metadata = {"": 7}  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt")


def test_the_format_before_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    state = nn.Linear(2, 3).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"before 1\.6; save it again with torch\.save\(torch\.load"
    ):
        archives.read(path)
    torch.save(torch.load(path, weights_only=True), path)
    assert equal(archives.read(path), state)


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
)
HUGE = b"J\xff\xff\xff\x7f"


def tensor(
    count: bytes = b"K\x08",
    offset: bytes = b"K\x00",
    size: bytes = b"K\x08",
    stride: bytes = b"K\x01",
) -> bytes:
    """Return the pickle of a view of a storage with eight elements."""
    made = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % count
    return made + offset + b"(" + size + b"t(" + stride + b"t\x89}tR."


BYTES = b"(X\x07\x00\x00\x00storagectorch\nUntypedStorage\nX\x01\x00\x00\x000NK\x20tQ"


def typed(dtype: bytes) -> bytes:
    """Return the pickle of a view of the same bytes with another dtype."""
    made = b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(" + BYTES
    return made + b"K\x00(K\x08t(K\x01t\x89}" + dtype + b"tR."


def numbers(keys: list[int]) -> bytes:
    """Return the pickle of a dictionary with these keys."""
    lines = [b"\x8a\x0c" + key.to_bytes(12, "little") + b"N" for key in keys]
    return b"\x80\x02}(" + b"".join(lines) + b"u."


PICKLES = {
    "a dtype that is a tuple of its name": typed(
        b"X\x05\x00\x00\x00torchX\x07\x00\x00\x00float32\x86"
    ),
    "a dtype of nested tuples": typed(b"N" + b"\x85" * 80_000),
    "a dtype whose hash takes forever": typed(b"N" + b"q\x00h\x00\x86" * 60),
    "a dtype that is a list": typed(b"]"),
    "a dtype of another module": typed(b"cos\nsystem\n"),
    "keys that share a hash": numbers([i * (2**61 - 1) for i in range(1, 20_000)]),
    "many dimensions": tensor(size=b"K\x01" * 65, stride=b"K\x00" * 65),
    "a name as the whole": b"\x80\x02ctorch\nfloat32\n.",
    "a name in place of data": b"\x80\x02}U\x01a](N(ctorch\nfloat32\nttes.",
    "a storage that lies": tensor(count=HUGE),
    "a size that lies": tensor(size=HUGE),
    "a stride that lies": tensor(stride=HUGE),
    "an offset that lies": tensor(offset=b"K\x01"),
    "a negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
    "a negative size": tensor(size=b"J\xff\xff\xff\xff"),
    "a negative stride": tensor(stride=b"J\xff\xff\xff\xff"),
    "too many sizes": tensor(size=HUGE * 3, stride=b"K\x00" * 3),
    "fewer strides": tensor(size=b"K\x02K\x02"),
    "a size of text": tensor(size=b"U\x018"),
    "bytearray": b"\x80\x02c__builtin__\nbytearray\n" + HUGE + b"\x85R.",
    "a free tensor": b"\x80\x02ctorch\nTensor\n" + HUGE + b"\x85R.",
    "a set": b"\x80\x02c__builtin__\nset\n](K\x01e\x85R.",
    "code": b"\x80\x02cos\nsystem\nU\x04true\x85R.",
    "many dictionaries": b"\x80\x02(" + b"}" * 300_000 + b"l.",
    "nested tuples": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
}


def archive(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> None:
    """Write the archive of eight elements as torch.save does, with files changed or left out."""
    buffer = io.BytesIO()
    torch.save(torch.arange(8.0), buffer)
    with zipfile.ZipFile(buffer) as contents, zipfile.ZipFile(path, "w", **options) as copy:
        for name in contents.namelist():
            content = change(name, contents.read(name))
            if content is not None:
                copy.writestr(name, content)


@pytest.mark.parametrize("what", PICKLES)
def test_a_hostile_pickle(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    archive(path, lambda name, raw: PICKLES[what] if name.endswith("data.pkl") else raw)
    assert_refused(path)


@pytest.mark.parametrize("pickled", [tensor(), typed(b"ctorch\nfloat32\n")])
def test_the_unmodified_pickles_are_valid(pickled: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    archive(path, lambda name, raw: pickled if name.endswith("data.pkl") else raw)
    assert torch.equal(archives.read(path), torch.arange(8.0))


CHANGES: dict[str, Callable[[str, bytes], bytes | None]] = {
    "a storage is short": lambda name, raw: raw[:-4] if name.endswith("/data/0") else raw,
    "a storage is missing": lambda name, raw: None if name.endswith("/data/0") else raw,
    "no pickle": lambda name, raw: None if name.endswith("data.pkl") else raw,
    "the other order of bytes": lambda name, raw: b"big" if name.endswith("byteorder") else raw,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_archive(what: str, tmp_path: Path) -> None:
    archive(tmp_path / "x.pt", CHANGES[what])
    assert_refused(tmp_path / "x.pt")


def test_what_unpacks_to_more(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    more = bytes(200 * 2**20)
    archive(
        path,
        lambda name, raw: more if name.endswith("/data/0") else raw,
        compression=zipfile.ZIP_DEFLATED,
    )
    assert_refused(path)


def test_files_that_lie_over_each_other(tmp_path: Path) -> None:
    """All entries of the directory point to the same part of the file."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive_file:
        archive_file.writestr("a/data.pkl", pickle.dumps(1, protocol=2))
        archive_file.writestr("a/data/0", bytes(2**20))
        last = archive_file.infolist()[-1]
        for i in range(1, 100):
            copy = zipfile.ZipInfo(f"a/data/{i}")
            for name in ("header_offset", "CRC", "file_size", "compress_size"):
                setattr(copy, name, getattr(last, name))
            archive_file.filelist.append(copy)
            archive_file.NameToInfo[copy.filename] = copy
    assert_refused(path)


def assert_refused(path: Path, most: int = 40 * 2**20) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            archives.read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert peak < most
