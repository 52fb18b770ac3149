"""Measurement of the Hessian's spectrum at the end of a run, which is stored in its folder."""

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
TOLERANCE = 1e-3  # relative tolerance of eigenpairs
BATCH = 500  # images per batch


def load_spectrum(folder: Path, settings: SpectrumSettings) -> Record | None:
    """Read the spectrum that `measure_spectrum` stored with these settings, or return None.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    try:
        record: Record = read_json(path, "remove it")
    except FileNotFoundError:
        return None
    try:
        validate(record, HasEntries({"settings": dict}), "it")
        if record["settings"] != asdict(settings):
            return None
        if "error" in record:
            validate(record, HasEntries({"error": str}), "it")
        else:
            _check(record)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error
    return record


_SCHEMA = {
    "values": ListOf(float),
    "residuals": ListOf(float),
    "edge": Nullable(float),
    "parameters": int,
    "density": HasEntries({"nodes": list, "weights": list, "deflated": list, "matvecs": int}),
}


def _check(record: Record) -> None:
    """Check the entries of a spectrum, and that corresponding lists have equal lengths.

    Raises:
        ValueError: an entry is invalid.
    """
    validate(record, HasEntries(_SCHEMA), "it")
    validate(record["residuals"], [float] * max(len(record["values"]), 1), "its residuals")
    density = record["density"]
    validate(density["deflated"], ListOf(float), "its deflated eigenvalues")
    validate(density["nodes"], ListOf(list), "its nodes")
    rows = [[float] * max(len(density["nodes"][0]), 1)] * len(density["nodes"])
    for name in ("nodes", "weights"):
        validate(density[name], rows, f"its {name}")


def measure_spectrum(
    folder: Path, settings: SpectrumSettings, *, data_dir: Path | None, device: torch.device
) -> Record:
    """Measure the largest eigenvalues and the density of a run, and store them in its folder.

    The measured loss is the one that was trained: layers are in training mode, and batch
    normalization sees batches of BATCH images. The number of threads is that of the run.

    Args:
        folder: folder of a complete run.
        settings: settings of the measurement.
        data_dir: data folder.
        device: the device.

    Returns:
        `settings`, `edge` (None for SAM, whose edge depends on the gradient norm), `parameters`,
        `seconds`, and the entries of `spectrum.as_json`. If the Hessian overflows or memory runs
        out, only `settings` and `error`; the latter case is not stored, so that the next command
        measures again.

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
        return record | {"error": "out of memory while measuring the spectrum"}
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
        # The results mark pairs that did not converge, so the warnings are not needed.
        warnings.filterwarnings("ignore", r"stopped after|\d+ pairs converged", RuntimeWarning)
        pairs = curvature.eigsh(op, settings.pairs, which="LA", tol=TOLERANCE)
        density = curvature.spectral_density(op, settings.probes, settings.steps, deflate=pairs)
    return {
        "edge": edge_of(loaded.optimizer),
        "parameters": op.shape[0],
        "seconds": time.perf_counter() - began,
    } | as_json(pairs, density)
