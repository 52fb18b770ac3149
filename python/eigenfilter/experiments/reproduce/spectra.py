"""The Hessian at the end of a run, kept beside it."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from eigenfilter import curvature
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import read_json, replace_text
from eigenfilter.experiments.loaded_models import load_trained
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.reproduce.plan import SpectrumSettings
from eigenfilter.experiments.runs import Record, is_out_of_memory
from eigenfilter.experiments.schema import HasEntries, ListOf, Nullable, validate
from eigenfilter.experiments.spectrum import as_json, edge_of
from eigenfilter.experiments.trainer import threads

FILE = "spectrum.json"
TOLERANCE = 1e-3  # relative, of eigenpairs
BATCH = 500  # images at a time


def load_spectrum(folder: Path, settings: SpectrumSettings) -> Record | None:
    """What `measure_spectrum` found before with these settings, if it did.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    try:
        found: Record = read_json(path, "remove it")
    except FileNotFoundError:
        return None
    try:
        validate(found, HasEntries({"settings": dict}), "it")
        if found["settings"] != asdict(settings):
            return None
        if "error" in found:
            validate(found, HasEntries({"error": str}), "it")
        else:
            _check(found)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it") from error
    return found


_PLAIN = {
    "values": ListOf(float),
    "residuals": ListOf(float),
    "edge": Nullable(float),
    "parameters": int,
    "density": HasEntries({"nodes": list, "weights": list, "deflated": list, "matvecs": int}),
}


def _check(found: Record) -> None:
    """Check what a spectrum has, and that lists which belong together are of one length.

    Raises:
        ValueError: they are not.
    """
    validate(found, HasEntries(_PLAIN), "it")
    validate(found["residuals"], [float] * max(len(found["values"]), 1), "its residuals")
    density = found["density"]
    validate(density["deflated"], ListOf(float), "what its density is without")
    validate(density["nodes"], ListOf(list), "its nodes")
    rows = [[float] * max(len(density["nodes"][0]), 1)] * len(density["nodes"])
    for name in ("nodes", "weights"):
        validate(density[name], rows, f"its {name}")


def measure_spectrum(
    folder: Path, settings: SpectrumSettings, *, data_dir: Path | None, device: torch.device
) -> Record:
    """Measure the largest eigenvalues and the density of a run, and keep them beside it.

    The function is the one that was trained: layers in training mode, batches of BATCH images where
    there is batch normalisation; by as many threads as the run had.

    Args:
        folder: of a complete run.
        settings: how.
        data_dir: of the data.
        device: where.

    Returns:
        `settings`, `edge` (None for SAM, whose filter moves), `parameters`, `seconds`, and what
        `spectrum.as_json` gives; `error` alone besides the settings where the Hessian overflows,
        or memory does not suffice, which is not kept: it may the next time.

    Raises:
        UserError: the run cannot be read.
    """
    record: Record = {"settings": asdict(settings)}
    try:
        with folder_lock(folder, "spectrum"):
            record |= _measure_spectrum(folder, settings, data_dir, device)
    except FloatingPointError as error:
        record["error"] = " ".join(str(error).split())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return record | {"error": "memory does not suffice for its spectrum"}
    replace_text(folder / FILE, json.dumps(record, allow_nan=False) + "\n")
    return record


def _measure_spectrum(
    folder: Path, settings: SpectrumSettings, data_dir: Path | None, device: torch.device
) -> Record:
    began = time.perf_counter()
    loaded = load_trained(
        folder, device, data_dir=data_dir, samples=settings.samples, batch_size=BATCH
    )
    op = curvature.HessianOperator(loaded.model, loaded.loss_fn, loaded.data, mode="train")
    with threads(loaded.source["config"]["threads"]), warnings.catch_warnings():
        # What did not converge is marked, and its bound is given.
        warnings.filterwarnings("ignore", r"stopped after|\d+ pairs converged", RuntimeWarning)
        pairs = curvature.eigsh(op, settings.pairs, which="LA", tol=TOLERANCE)
        density = curvature.spectral_density(op, settings.probes, settings.steps, deflate=pairs)
    return {
        "edge": edge_of(loaded.optimizer),
        "parameters": op.shape[0],
        "seconds": time.perf_counter() - began,
    } | as_json(pairs, density)
