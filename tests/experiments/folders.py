"""Small data sets in the layouts of the published ones."""

from __future__ import annotations

import gzip
import pickle
import tarfile
from pathlib import Path

import numpy as np


def images(n: int, shape: tuple[int, ...], classes: int, seed: int) -> tuple[np.ndarray, ...]:
    """Return random images whose first pixels depend on the class, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n).astype(np.uint8)
    labels[: min(n, classes)] = np.arange(classes)[:n]
    pixels = generator.integers(0, 120, (n, *shape)).astype(np.uint8)
    pixels.reshape(n, -1)[:, :64] = (2 * labels)[:, None] * (250 // (2 * classes))
    return pixels, labels


def idx(array: np.ndarray) -> bytes:
    """Return an array of bytes in the IDX format."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def mnist(root: Path, name: str = "MNIST", *, packed: bool = False, side: int = 28) -> None:
    """Write MNIST with 60 training and 20 test images, compressed by gzip if `packed`."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for kind, n in (("train", 60), ("t10k", 20)):
        pixels, labels = images(n, (side, side), 10, seed=n)
        for file, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            path = raw / f"{kind}-{file}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array), 1))
            else:
                path.write_bytes(idx(array))


def cifar(root: Path, classes: int, layout: str) -> None:
    """Write CIFAR-10 or CIFAR-100 with 10 images per file: "python", "binary" or "archive"."""
    ten = classes == 10
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    folder = (
        root
        / {
            ("python", True): "cifar-10-batches-py",
            ("python", False): "cifar-100-python",
            ("binary", True): "cifar-10-batches-bin",
            ("binary", False): "cifar-100-binary",
        }[("binary" if layout == "binary" else "python", ten)]
    )
    folder.mkdir(parents=True)
    for seed, name in enumerate(names):
        pixels, labels = images(10, (3, 32, 32), classes, seed)
        if layout == "binary":
            head = labels[:, None] if ten else np.stack([labels // 5, labels], 1)
            records = np.concatenate([head, pixels.reshape(10, -1)], 1)
            (folder / f"{name}.bin").write_bytes(records.astype(np.uint8).tobytes())
        else:
            key = "labels" if ten else "fine_labels"
            entries = {"data": pixels.reshape(10, -1), key: labels.tolist(), "batch_label": name}
            (folder / name).write_bytes(pickle.dumps(entries, protocol=2))
    if layout == "archive":
        with tarfile.open(root / f"cifar-{classes}-python.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
