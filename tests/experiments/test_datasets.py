"""Data sets: all layouts give the same images, and errors name the damaged files."""

from __future__ import annotations

import gzip
import os
import pickle
import tarfile
import tracemalloc
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from eigenfilter.experiments import datasets
from eigenfilter.experiments.errors import UserError
from experiments import folders


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make downloads fail as without a network."""

    def fail(*args: Any, **kw: Any) -> None:
        raise urllib.error.URLError("no network")

    for name in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"):
        monkeypatch.setattr(torchvision.datasets, name, fail)


def test_digits() -> None:
    data = datasets.load("digits")
    assert data.images.shape == (1437, 1, 8, 8)
    assert len(data.test_images) == len(data.test_labels) == 360
    assert data.images.dtype == torch.uint8
    assert int(data.images.max()) == 255
    scaled = data.images.double() / 255
    assert data.mean.item() == pytest.approx(scaled.mean().item(), rel=1e-12)
    assert data.deviation.item() == pytest.approx(scaled.std(correction=0).item(), rel=1e-12)
    assert data.first(100).mean.item() == pytest.approx(scaled[:100].mean().item(), rel=1e-12)
    with pytest.raises(UserError, match="1437 training images, not 2000"):
        data.first(2000)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_mnist(name: str, folder: str, packed: bool, tmp_path: Path) -> None:
    folders.mnist(tmp_path, folder, packed=packed)
    data = datasets.load(name, tmp_path)
    pixels, labels = folders.images(60, (28, 28), 10, seed=60)
    assert np.array_equal(data.images.numpy()[:, 0], pixels)
    assert np.array_equal(data.labels.numpy(), labels)
    assert data.test_images.shape == (20, 1, 28, 28)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("layout", ["python", "binary", "archive"])
def test_cifar(classes: int, layout: str, tmp_path: Path) -> None:
    folders.cifar(tmp_path, classes, layout)
    data = datasets.load(f"cifar{classes}", tmp_path)
    files = 5 if classes == 10 else 1
    assert data.classes == classes
    expected = [folders.images(10, (3, 32, 32), classes, seed) for seed in range(files)]
    assert np.array_equal(data.images.numpy(), np.concatenate([p for p, _ in expected]))
    assert np.array_equal(data.labels.numpy(), np.concatenate([labels for _, labels in expected]))
    pixels, labels = folders.images(10, (3, 32, 32), classes, files)
    assert np.array_equal(data.test_images.numpy(), pixels)
    assert np.array_equal(data.test_labels.numpy(), labels)
    scaled = data.images.double() / 255
    assert torch.allclose(data.mean, scaled.mean(dim=(0, 2, 3)), rtol=1e-12)
    deviation = scaled.std(dim=(0, 2, 3), correction=0)
    assert torch.allclose(data.deviation, deviation, rtol=1e-12)


def test_the_folder_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.mnist(tmp_path)
    monkeypatch.setenv("EIGENFILTER_DATA", str(tmp_path))
    assert len(datasets.load("mnist").images) == 60


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mnist", "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte"),
        ("fashion", "FashionMNIST/raw/"),
        ("cifar10", "cifar-10-batches-py/{data_batch_1,data_batch_2,"),
        ("cifar100", "cifar-100-python/train and test"),
    ],
)
def test_missing_files(name: str, says: str, tmp_path: Path) -> None:
    """The error is the same if only some files are missing."""
    if name == "mnist":
        folders.mnist(tmp_path)
        (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError) as error:
        datasets.load(name, tmp_path)
    text = str(error.value)
    assert says in text
    assert "no network" in text
    assert "--data-dir or EIGENFILTER_DATA" in text
    assert "\n" not in text


class Evil:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def damage(path: Path, how: str) -> None:
    raw = path.read_bytes()
    if how == "cut":
        path.write_bytes(raw[: len(raw) // 2 - 3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :])
    elif how == "page":
        path.write_bytes(b"<html>404</html>")
    elif how == "evil":
        path.write_bytes(pickle.dumps({"data": Evil(), "labels": [0]}))
    elif how == "other":
        path.write_bytes(pickle.dumps({"pixels": 0}))
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut", "empty", "page", "folder"])
def test_a_damaged_file_of_mnist(how: str, tmp_path: Path) -> None:
    folders.mnist(tmp_path)
    assert_damage_named(
        "mnist", tmp_path, tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", how
    )


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "page"])
def test_a_damaged_compressed_file(how: str, tmp_path: Path) -> None:
    folders.mnist(tmp_path, packed=True)
    assert_damage_named(
        "mnist", tmp_path, tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz", how
    )


@pytest.mark.parametrize("how", ["cut", "empty", "page", "evil", "other", "folder"])
def test_a_damaged_batch_of_cifar(how: str, tmp_path: Path) -> None:
    folders.cifar(tmp_path, 10, "python")
    assert_damage_named("cifar10", tmp_path, tmp_path / "cifar-10-batches-py" / "data_batch_3", how)


@pytest.mark.parametrize("how", ["cut", "empty"])
def test_a_damaged_binary_file_of_cifar(how: str, tmp_path: Path) -> None:
    folders.cifar(tmp_path, 100, "binary")
    assert_damage_named("cifar100", tmp_path, tmp_path / "cifar-100-binary" / "test.bin", how)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "page"])
def test_a_damaged_archive_of_cifar(how: str, tmp_path: Path) -> None:
    folders.cifar(tmp_path, 10, "archive")
    assert_damage_named("cifar10", tmp_path, tmp_path / "cifar-10-python.tar.gz", how)


def assert_damage_named(name: str, root: Path, path: Path, how: str) -> None:
    damage(path, how)
    with pytest.raises(UserError) as error:
        datasets.load(name, root)
    text = str(error.value)
    assert path.name in text
    assert "\n" not in text
    assert "remove it" in text


def test_images_of_another_shape(tmp_path: Path) -> None:
    folders.mnist(tmp_path, side=20)
    with pytest.raises(UserError, match=r"images \[1, 28, 28\].* 60 images \[1, 20, 20\]"):
        datasets.load("mnist", tmp_path)


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    folders.mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes(folders.idx(np.zeros(19, np.uint8)))
    with pytest.raises(UserError, match=r"20 images .* and 19 labels"):
        datasets.load("mnist", tmp_path)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(folders.idx(np.full(20, 10, np.uint8)))
    with pytest.raises(UserError, match="labels up to 9, but the files have 10"):
        datasets.load("mnist", tmp_path)


def test_a_checksum_tells_other_data(tmp_path: Path) -> None:
    folders.mnist(tmp_path)
    data = datasets.load("mnist", tmp_path)
    before = data.checksum
    data.test_labels[3] += 1
    assert data.checksum != before


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "holds", "mean", "deviation", "n"),
    [
        ("mnist", "MNIST/raw", [0.13066], [0.30811], 60_000),
        ("fashion", "FashionMNIST/raw", [0.28604], [0.35302], 60_000),
        (
            "cifar10",
            "cifar-10-batches-py",
            [0.49140, 0.48216, 0.44653],
            [0.24703, 0.24349, 0.26159],
            50_000,
        ),
    ],
)
def test_real_images(
    name: str, holds: str, mean: list[float], deviation: list[float], n: int
) -> None:
    """The statistics of available data sets are the published ones."""
    folder = os.environ.get("EIGENFILTER_DATA")
    if folder is None or not any(Path(folder, holds).glob("*")):
        pytest.skip(f"needs EIGENFILTER_DATA with {holds}")
    data = datasets.load(name)
    assert len(data.images) == n
    assert data.mean.tolist() == pytest.approx(mean, abs=6e-6)
    assert data.deviation.tolist() == pytest.approx(deviation, abs=6e-6)
    assert torch.equal(data.test_labels.bincount(), torch.full((10,), 1000)) or name == "mnist"


# Files that mean harm: refused, and no memory is taken for what they claim.

NDARRAY = b"cnumpy\nndarray\n"
MADE = b"cnumpy._core.multiarray\n_reconstruct\n" + NDARRAY + b"K\x00\x85U\x01b\x87R"
BYTES = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
ONE = b"K\x01M\x00\x0c\x86"  # the shape of one image


def batch(array: bytes) -> bytes:
    """Return the pickle of a batch of one image, with these opcodes for its array."""
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x03eu."


HOSTILE = {
    "a free array": b"\x80\x02" + NDARRAY + b"(K\x02\x85U\x01OtR.",
    "an array of objects": batch(MADE + b"(K\x01" + ONE + BYTES.replace(b"u1", b"O8") + b"\x89Ntb"),
    "state of a dtype": batch(MADE + b"(K\x01" + ONE + BYTES + b"(K\x03U\x01|NNNK\x08K\x08K\x3ftb"),
    "a short array": batch(MADE + b"(K\x01" + ONE + BYTES + b"\x89U\x03abctb"),
    "a huge shape": batch(
        MADE + b"(K\x01J\xff\xff\xff\x7fM\x00\x0c\x86" + BYTES + b"\x89U\x03abctb"
    ),
    "a negative shape": batch(
        MADE + b"(K\x01J\xff\xff\xff\xffJ\xff\xf3\xff\xff\x86" + BYTES + b"\x89U\0tb"
    ),
    "a shape whose product takes forever": batch(
        MADE
        + b"(K\x01(\x8a\xff"
        + b"\x7f" * 255
        + b"q\x05"
        + b"h\x05" * 80_000
        + b"t"
        + BYTES
        + b"\x89U\0tb"
    ),
    "a huge row": batch(
        MADE + b"(K\x01K\x01\x8a\xff" + b"\x7f" * 255 + b"\x86" + BYTES + b"\x89U\0tb"
    ),
    "an array without state": batch(MADE),
    "two arrays": batch(MADE + b"0" + MADE),
    "another call": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "an instance": b"\x80\x02(i__builtin__\nbytearray\n.",
    "NEWOBJ": b"\x80\x02" + NDARRAY + b"K\x05\x85\x81.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT4": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "a frame that lies": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    "bytes that lie": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x3fa.",
    "a long that lies": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
    "a memo that lies": b"\x80\x02j\xff\xff\xff\x7f.",
    "a key of nested tuples": b"\x80\x02}Nq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.",
    "many objects": b"\x80\x02(" + b"}" * 1_000_000 + b"l.",
    "a stack that is empty": b"\x80\x02tRb.",
    "a mark": b"\x80\x02(.",
    "digits": b"I" + b"9" * 5000 + b"\n.",
}
MOST = 40 * 2**20  # bytes that the reader may take for a small file


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle(what: str, tmp_path: Path) -> None:
    folders.cifar(tmp_path, 10, "python")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(HOSTILE[what])
    assert_refused("cifar10", tmp_path, path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_of_other_pythons(protocol: int, tmp_path: Path) -> None:
    folders.cifar(tmp_path, 10, "python")
    expected = datasets.load("cifar10", tmp_path)
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        entries = pickle.loads(path.read_bytes())
        entries["data"] = np.asfortranarray(entries["data"])
        path.write_bytes(pickle.dumps(entries | {"filenames": ["é.png"]}, protocol=protocol))
    assert datasets.load("cifar10", tmp_path).checksum == expected.checksum


@pytest.mark.parametrize("size", [200 * 2**20, 60_000 * 28 * 28 + 1])
def test_a_file_that_unpacks_to_more(size: int, tmp_path: Path) -> None:
    folders.mnist(tmp_path, packed=True)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    head = bytes([0, 0, 8, 3]) + np.array([60_000, 28, 28], ">u4").tobytes()
    with gzip.open(path, "wb", 1) as file:
        file.write(head)
        for _ in range(0, size, 2**20):
            file.write(bytes(2**20))
    assert_refused("mnist", tmp_path, path, most=120 * 2**20)


@pytest.mark.parametrize("sizes", [(60_000, 28, 28), (2**32 - 1, 2**32 - 1, 0), (2**32 - 1,) * 3])
def test_a_head_that_lies(sizes: tuple[int, ...], tmp_path: Path) -> None:
    folders.mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + np.array(sizes, ">u4").tobytes())
    assert_refused("mnist", tmp_path, path, most=60 * 2**20)


def test_a_file_with_holes(tmp_path: Path) -> None:
    """The file has terabytes of holes, which take no space on the disk."""
    folders.mnist(tmp_path / "m")
    path = tmp_path / "m" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    os.truncate(path, 2**42)
    assert_refused("mnist", tmp_path / "m", path, most=120 * 2**20)
    folders.cifar(tmp_path / "c", 10, "binary")
    path = tmp_path / "c" / "cifar-10-batches-bin" / "data_batch_1.bin"
    os.truncate(path, 2**42)
    assert_refused("cifar10", tmp_path / "c", path, most=120 * 2**20)


ENTRIES = {
    "a huge file": {"size": 2**33 - 1},
    "a link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "a link to itself": {"type": tarfile.LNKTYPE, "linkname": "cifar-10-batches-py/data_batch_1"},
    "a device": {"type": tarfile.CHRTYPE},
    "a header": {"type": tarfile.XHDTYPE, "size": 2**33 - 1},
    "a sparse file": {"type": tarfile.GNUTYPE_SPARSE},
    "a long name": {"type": tarfile.GNUTYPE_LONGNAME, "size": 2**33 - 1},
}


@pytest.mark.parametrize("what", ENTRIES)
def test_a_hostile_archive(what: str, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    for name, value in ENTRIES[what].items():
        setattr(info, name, value)
    path.write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)))
    assert_refused("cifar10", tmp_path, path)


@pytest.mark.parametrize(
    "size", [b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b" " * 12]
)
def test_an_invalid_size(size: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    head = bytearray(tarfile.TarInfo("cifar-10-batches-py/data_batch_1").tobuf())
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(gzip.compress(bytes(head) + bytes(1024)))
    assert_refused("cifar10", tmp_path, path)


def assert_refused(name: str, root: Path, path: Path, most: int = MOST) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            datasets.load(name, root)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.name in str(error.value)
    assert "remove it" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert peak < most
