"""The folder of one run of a sweep: its stored results, and attempts to complete the run."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenfilter.experiments import checkpoint, runs
from eigenfilter.experiments import config as configs
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError, quoted
from eigenfilter.experiments.files import output_folder, replace_text
from eigenfilter.experiments.locks import FolderBusy, holder
from eigenfilter.experiments.locks import try_folder_lock as try_folder_lock
from eigenfilter.experiments.runs import Record
from eigenfilter.experiments.trainer import Diverged
from eigenfilter.experiments.validation import read_results

RUNS = "runs"
PATIENCE = 3.0  # seconds that a run waits for the lock of its folder before it reports so


@dataclass(frozen=True)
class RunSpec:
    """A run: its configuration, its folder, the data folder, and the device."""

    config: Config
    folder: Path
    data_dir: Path | None
    device: str


def folder_of(out: Path, name: str) -> Path:
    """Return the folder of the run with a name.

    Raises:
        ValueError: the name cannot be the name of a folder.
    """
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} cannot be the name of a folder")
    return out / RUNS / name


def stored_options(folder: Path) -> dict[str, Any] | None:
    """Return the options of the run in a folder, in whatever state it is, or None without a run.

    Raises:
        UserError: a file is damaged.
    """
    record = read_results(folder / runs.RESULTS, whole=False)
    if record is not None:
        options: dict[str, Any] = record["config"]
        return options
    if not (folder / checkpoint.FILE).exists():
        return None
    try:
        values = configs.read(folder / runs.CONFIG)
        configs.check_plain(values)
        return values
    except ValueError as error:
        raise UserError(f"{error}; remove {folder}") from error


def load_finished(config: Config, folder: Path) -> Record | None:
    """Return the results of a run that is complete or diverged, else None.

    Raises:
        UserError: the folder contains a run of another configuration, or a damaged file.
    """
    stored = stored_options(folder)
    if stored is None:
        return None
    for name, value in config.as_dict().items():
        if stored.get(name) != value:
            raise UserError(
                f"{folder} contains a run with {name} {quoted(stored.get(name))}, not "
                f"{quoted(value)}; give another --out, or remove it"
            )
    record = read_results(folder / runs.RESULTS)
    if record is None:
        return None
    return record if record["outcome"] == "complete" or record.get("diverged") else None


def attempt_run(spec: RunSpec, *, stop: Callable[[], bool], observe: runs.Observe) -> Record:
    """Start a run, or resume it from its last checkpoint.

    Returns:
        The results of `runs.run`, or the record of a failure. The traceback of an unexpected
        exception is printed, and its record is marked as crashed, so that the run is retried.
    """
    config = spec.config
    if stop():
        return stopped_record(config)
    began, reported = time.monotonic(), False

    def wait() -> bool:
        """Wait for the lock, which the last attempt may still have; report longer waits once."""
        nonlocal reported
        if not reported and time.monotonic() - began > PATIENCE:
            observe("waiting", 0, {"holder": holder(spec.folder, "training run")})
            reported = True
        return not stop()

    try:
        return runs.run(
            config,
            spec.folder,
            data_dir=spec.data_dir,
            device=spec.device,
            resume=True,
            stop=stop,
            observe=observe,
            wait=wait,
        )
    except FolderBusy:
        return stopped_record(config)
    except Diverged as error:
        return failed_record(config, str(error)) | {"diverged": True, "step": error.step}
    except UserError as error:
        return failed_record(config, str(error))
    except Exception as error:  # no error of one run may end the others
        traceback.print_exc()
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        return failed_record(config, line) | {"crashed": True}


def failed_record(config: Config, error: str) -> Record:
    """Return the record of a run that failed with a one-line error."""
    return {"outcome": "failed", "error": error, "diverged": False, "config": config.as_dict()}


def stopped_record(config: Config) -> Record:
    """Return the record of a run that was stopped before it wrote results."""
    return {"outcome": "stopped", "config": config.as_dict()}


def write_failure(folder: Path, record: Record) -> None:
    """Write the record of a failure as the results of a run.

    Raises:
        UserError: the file cannot be written.
    """
    replace_text(output_folder(folder) / runs.RESULTS, json.dumps(record, indent=1) + "\n")
