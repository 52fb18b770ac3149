"""The folder of one run among many: who works in it, what it holds, how its run failed."""

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
PATIENCE = 3.0  # seconds that a run waits without a word for who is in its folder


@dataclass(frozen=True)
class RunSpec:
    """A run, and where it is to be run."""

    config: Config
    folder: Path
    data_dir: Path | None
    device: str


def folder_of(out: Path, name: str) -> Path:
    """Where the run of this name is, in the folder of all.

    Raises:
        ValueError: the name is not one of a folder.
    """
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} cannot be the name of a folder")
    return out / RUNS / name


def stored_options(folder: Path) -> dict[str, Any] | None:
    """The options of the run that a folder holds, begun, ended or failed, if it holds one.

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
        found = configs.read(folder / runs.CONFIG)
        configs.check_plain(found)
        return found
    except ValueError as error:
        raise UserError(f"{error}: remove {folder}") from error


def load_finished(config: Config, folder: Path) -> Record | None:
    """What a run left that need not be run again: it was completed, or it diverged.

    Raises:
        UserError: the folder holds a run of another configuration, or a damaged file.
    """
    there = stored_options(folder)
    if there is None:
        return None
    for name, value in config.as_dict().items():
        if there.get(name) != value:
            raise UserError(
                f"{folder} holds a run with {name} {quoted(there.get(name))}, not {quoted(value)}: "
                "give another --out, or remove it"
            )
    record = read_results(folder / runs.RESULTS)
    if record is None:
        return None
    return record if record["outcome"] == "complete" or record.get("diverged") else None


def attempt_run(spec: RunSpec, *, stop: Callable[[], bool], observe: runs.Observe) -> Record:
    """Go on with a run from where the last attempt came to.

    Returns:
        What `runs.run` does; where that raises, the failure, with its traceback printed unless
        it is an error of the user, which would come again.
    """
    config = spec.config
    if stop():
        return stopped_record(config)
    began, told = time.monotonic(), False

    def wait() -> bool:
        """The attempt before may be ending yet; whoever is there longer is told of."""
        nonlocal told
        if not told and time.monotonic() - began > PATIENCE:
            observe("waiting", 0, {"holder": holder(spec.folder, "training run")})
            told = True
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
    except Exception as error:  # of whatever kind: the other runs go on
        traceback.print_exc()
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        return failed_record(config, line) | {"crashed": True}


def failed_record(config: Config, error: str) -> Record:
    """The record of a run that came to no end; `error` is one line."""
    return {"outcome": "failed", "error": error, "diverged": False, "config": config.as_dict()}


def stopped_record(config: Config) -> Record:
    """The record of a run that was stopped where no results were written."""
    return {"outcome": "stopped", "config": config.as_dict()}


def write_failure(folder: Path, record: Record) -> None:
    """Write a failure where the results of a run are; one that diverged is not run again.

    Raises:
        UserError: it cannot be written.
    """
    replace_text(output_folder(folder) / runs.RESULTS, json.dumps(record, indent=1) + "\n")
