"""Eigenpairs and density of a Hessian, by products that are kept while they may be needed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenfilter import curvature
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import replace

Record = dict[str, Any]


class PeakMemory:
    """The most bytes of memory that this process held since the last `restart`."""

    @staticmethod
    def restart() -> None:
        """Start again from the memory in use now."""
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def most() -> int:
        """Return the high-water mark of resident memory."""
        status = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


class KeptProducts:
    """A symmetric operator whose products are written to a folder, and read from it in a later run.

    A solver that is started again with the same seed asks for the same products, so that it goes on
    where it was stopped. A product is kept with a checksum of its vector, and computed again where
    the vector is another one.

    Attributes:
        count: the number of products so far.
        seconds: the time that they took, also in earlier runs.
    """

    def __init__(self, op: Any, folder: Path, label: str) -> None:
        self.op, self.shape, self.dtype, self.device = op, op.shape, op.dtype, op.device
        self.fixed = op.fixed
        self._folder, self._label = folder, label
        self.count, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] for v [n]."""
        self.count += 1
        file = self._folder / f"{self.count:04}.pt"
        checksum = int(v.view(torch.int32).sum(dtype=torch.int64))
        kept: Record = torch.load(file) if file.exists() else {}
        if kept.get("checksum") != checksum:
            start = time.monotonic()
            kept = {"checksum": checksum, "product": self.op.matvec(v)}
            kept["seconds"] = time.monotonic() - start
            _save(file, kept)
            print(f"{self._label}: product {self.count}, {kept['seconds']:.1f} s", flush=True)
        self.seconds += kept["seconds"]
        product: Tensor = kept["product"]
        return product

    def matmat(self, V: Tensor) -> Tensor:
        """Return H V [n, b] for V [n, b]."""
        return torch.stack([self.matvec(v) for v in V.unbind(1)], 1)

    def discard(self) -> None:
        """Delete the products."""
        shutil.rmtree(self._folder)


def _save(file: Path, content: Record) -> None:
    needed = 2 * content["product"].nbytes
    if shutil.disk_usage(file.parent).free < needed:
        raise UserError(
            f"{file.parent} has no room for a product of {needed / 2e9:.1f} GB: free some, and "
            "give the same command again"
        )
    replace(file, lambda out: torch.save(content, out))


def eigenpairs(op: Any, pairs: int, tol: float, folder: Path, seed: int) -> Record:
    """Find the largest eigenvalues, write eigenpairs.pt, and return what it took."""
    kept = KeptProducts(op, folder / "eigenpairs", "eigenpairs")
    PeakMemory.restart()
    with op.fixed():
        op.matvec(torch.zeros(op.shape[0], dtype=op.dtype))
        before = PeakMemory.most()
    PeakMemory.restart()
    start = time.monotonic()
    result = curvature.eigsh(kept, pairs, tol=tol, basis_dtype=torch.float16, seed=seed)
    elapsed = time.monotonic() - start
    if not bool(result.converged.all()):
        raise UserError(f"the eigenpairs did not converge: {result.reason}")
    record = {
        "values": result.values.tolist(),
        "residuals": result.residuals.tolist(),
        "errors": result.errors.tolist(),
        "miss probability": result.miss_probability,
        "products": result.matvecs,
        "multiplicity products": result.multiplicity_matvecs,
        "memory of a product": before,
        "minutes of products": kept.seconds / 60,
        "minutes": elapsed / 60,
        "peak memory": PeakMemory.most(),
    }
    pairs_file = folder / "eigenpairs.pt"
    tensors = {"values": result.values, "vectors": result.vectors, "residuals": result.residuals}
    replace(pairs_file, lambda out: torch.save(tensors, out))
    kept.discard()
    return record


def density(op: Any, steps: int, folder: Path, seed: int) -> Record:
    """Return the quadrature that one random vector gives, and what it took."""
    kept = KeptProducts(op, folder / f"density{seed}", f"density, vector {seed + 1}")
    PeakMemory.restart()
    start = time.monotonic()
    result = curvature.spectral_density(kept, probes=1, steps=steps, seed=seed)
    record = {
        "nodes": result.nodes[0].tolist(),
        "weights": result.weights[0].tolist(),
        "products": result.matvecs,
        "minutes of products": kept.seconds / 60,
        "minutes": (time.monotonic() - start) / 60,
        "peak memory": PeakMemory.most(),
    }
    kept.discard()
    return record


def joined(records: list[Record], n: int) -> curvature.SpectralDensity:
    """Return the density of all random vectors together."""
    nodes, weights = (
        torch.tensor([record[key] for record in records], dtype=torch.float64)
        for key in ("nodes", "weights")
    )
    products = sum(record["products"] for record in records)
    return curvature.SpectralDensity(nodes, weights, nodes.new_empty(0), n, products)
