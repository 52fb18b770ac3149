"""One training run in a folder, from a configuration to results; resumable at every checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import eigenfilter as ef
from eigenfilter.experiments import checkpoint, datasets, logs
from eigenfilter.experiments import config as configs
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.devices import device_of
from eigenfilter.experiments.errors import UserError, quoted
from eigenfilter.experiments.files import replace_text
from eigenfilter.experiments.locks import alone
from eigenfilter.experiments.networks import size
from eigenfilter.experiments.processes import ALONE, Processes
from eigenfilter.experiments.saved import check_session, read_results
from eigenfilter.experiments.trainer import Diverged, Trainer, reproducible
from eigenfilter.monitor import SharpnessCheck

RESULTS = "results.json"
CONFIG = "config.yaml"
PAUSE = 10.0  # seconds at least between checkpoints at the ends of epochs

Record = dict[str, Any]
Observe = Callable[[str, int, Record], object]


def run(
    config: Config,
    out: Path,
    *,
    data_dir: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    tensorboard: bool = False,
    stop: Callable[[], bool] = lambda: False,
    observe: Observe = lambda kind, step, record: None,
    processes: Processes = ALONE,
    wait: Callable[[], bool] = lambda: False,
) -> Record:
    """Train, and write checkpoints, logs and results into a folder.

    Args:
        config: what to train.
        out: the folder: checkpoint.pt, config.yaml, log.jsonl, results.json, tensorboard/.
        data_dir: of the data, see `datasets.folder_of`.
        device: "cpu", "cuda", "cuda:1"; "auto": a GPU if there is one.
        resume: go on from the checkpoint in `out`, if there is one; the steps after it, and the
            final weights, are those of a run that was never interrupted, bit for bit.
        tensorboard: write events too.
        stop: asked after every step; once it says True, a checkpoint is written and the run ends.
        observe: gets every record of the log: its kind ("train", "test", "sharpness"; "start" and
            "checkpoint" besides), step and values.
        processes: that train together, see `processes.launched`; each calls this function. The
            leading one reads and writes `out` and observes; `stop` may be asked of any.
        wait: asked while another process is at work in `out` whether to go on waiting.

    Returns:
        What results.json holds: `outcome` ("complete" or "stopped"), the last records, the history
        of tests, times, the configuration, versions.

    Raises:
        UserError: bad input; another process is at work in `out`; `out` holds a run and `resume`
            is False, or one of another configuration, or a damaged file; the disk is full; memory
            does not suffice. `Diverged` is one of them. The last checkpoint is kept, and the
            message says so.
    """
    place = device_of(processes.device(device))
    with ExitStack() as held:

        def hold() -> None:
            held.enter_context(alone(out, "training run", wait))

        processes.led(hold)
        return _run(config, out, place, data_dir, resume, tensorboard, stop, observe, processes)


def _run(
    config: Config,
    out: Path,
    place: torch.device,
    data_dir: Path | None,
    resume: bool,
    tensorboard: bool,
    stop: Callable[[], bool],
    observe: Observe,
    processes: Processes,
) -> Record:
    saved, done = processes.led(lambda: _begun(config, out, resume))
    if done is not None:
        return done
    data = processes.after_download(lambda: datasets.load(config.dataset, data_dir))
    with reproducible(config, place, processes):
        try:
            trainer = Trainer(config, data, place, processes)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"{place} has no room for the model and its data") from error
        session = _Session(trainer, out, saved, tensorboard, observe, processes)
        del saved  # as large as the model and its optimizer
        return session.run(stop)


class _Session:
    """The part of a run from its start, or from a checkpoint, until it ends or is stopped."""

    _log: logs.Log  # of the process that leads

    def __init__(
        self,
        trainer: Trainer,
        out: Path,
        saved: Record | None,
        tensorboard: bool,
        observe: Observe,
        processes: Processes,
    ) -> None:
        self._trainer, self._out, self._processes = trainer, out, processes
        self._observe: Observe = observe if processes.leads else lambda kind, step, record: None
        self._checksum = trainer.data.checksum
        if len(set(processes.gathered(self._checksum))) > 1:
            raise UserError("machines have different data: copy --data-dir from one to the others")
        self._history: list[Record] = []
        self._last: dict[str, Record] = {}
        self._seconds = 0.0  # of the sessions before
        self._kept: int | None = None  # the step of the checkpoint that is on disk
        size_of_log = records = 0
        if saved is not None:
            if saved["data"] != self._checksum:
                raise UserError(f"{out} was trained on other data: give another --out")
            try:
                trainer.load_state_dict(saved["trainer"])
                records = check_session(saved, trainer)
            except ValueError as error:
                raise UserError(
                    f"{out / checkpoint.FILE} is damaged, or does not fit its configuration: "
                    f"{error}; restore it, or train again into another --out"
                ) from error
            self._history, self._last = saved["history"], saved["last"]
            self._seconds, self._kept = saved["seconds"], trainer.step
            size_of_log = saved["log"]

        def open_files() -> None:
            if saved is None:
                configs.write(trainer.config, out / CONFIG)
                (out / RESULTS).unlink(missing_ok=True)
            logs.check(out, size_of_log, records)
            self._log = logs.Log(out, size=size_of_log, step=trainer.step, tensorboard=tensorboard)

        processes.led(open_files)
        self._began = self._marked = self._saved_at = time.perf_counter()
        self._aside = 0.0  # seconds since the mark that were not spent on steps
        self._uncounted = trainer.pending  # steps since the last record that others took

    def run(self, stop: Callable[[], bool]) -> Record:
        trainer = self._trainer
        self._observe("start", trainer.step, {"total": trainer.total_steps})
        try:
            if trainer.monitor is not None and not trainer.step:
                self._sharpness(trainer.monitor.check)
            stopped = False
            while not trainer.finished and not stopped:
                trainer.advance()
                self._after_step()
                stopped = self._processes.any(stop()) and not trainer.finished
            if trainer.finished and "test" not in self._last:  # every epoch was too early
                self._test()
            self._save()
            return self._results("stopped" if stopped else "complete")
        except Diverged as error:
            rates = " or ".join(f"{name} ({x:.3g})" for name, x in trainer.rates().items())
            raise Diverged(f"{error}: lower {rates}; {self._advice()}", error.step) from error
        except UserError as error:
            raise UserError(f"{error}; {self._advice()}") from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"memory does not suffice for step {trainer.step + 1}: lower batch_size; "
                f"{self._advice()}"
            ) from error
        finally:
            if self._processes.leads:
                self._log.close()

    def _after_step(self) -> None:
        trainer, config = self._trainer, self._trainer.config
        step, ends = trainer.step, trainer.step % trainer.steps_per_epoch == 0
        epoch = step // trainer.steps_per_epoch
        if trainer.monitor is not None:
            self._sharpness(trainer.monitor.step)
        if step % config.log_every == 0 or trainer.finished:
            self._train()
        if ends and (epoch % config.evaluate_every == 0 or trainer.finished):
            self._test()
        if trainer.finished:  # saved at the end
            return
        every = config.checkpoint_every
        if step % every == 0 if every else ends and self._due():
            self._save()

    def _due(self) -> bool:
        return self._processes.any(time.perf_counter() - self._saved_at >= PAUSE)

    def _train(self) -> None:
        trainer = self._trainer
        steps = trainer.pending
        record = trainer.drain() | trainer.rates()
        now = time.perf_counter()
        images = (steps - self._uncounted) * trainer.batch_size
        record["images_per_second"] = images / max(now - self._marked - self._aside, 1e-9)
        self._marked, self._aside, self._uncounted = now, 0.0, 0
        self._write("train", record)

    def _test(self) -> None:
        with self._not_training():
            self._write("test", self._trainer.evaluate())
        self._history.append({"step": self._trainer.step} | self._last["test"])

    def _sharpness(self, look: Callable[[], SharpnessCheck | None]) -> None:
        try:
            found = look()
        except FloatingPointError as error:  # before the losses were read
            self._trainer.check()
            step = self._trainer.step
            raise Diverged(f"the Hessian after step {step} is not finite", step) from error
        if found is not None:
            self._aside += found.seconds
            names = ("sharpness", "residual", "edge")
            self._write("sharpness", {name: getattr(found, name) for name in names})

    def _write(self, kind: str, record: Record) -> None:
        trainer = self._trainer
        record = {"epoch": trainer.step / trainer.steps_per_epoch} | record
        self._processes.led(lambda: self._log.write(kind, trainer.step, record))
        self._last[kind] = logs.plain(record)
        self._observe(kind, trainer.step, record)

    def _save(self) -> None:
        """Write a checkpoint, of a state that is finite."""
        trainer = self._trainer
        trainer.check()
        state = {
            "config": trainer.config.as_dict(),
            "data": self._checksum,
            "trainer": trainer.state_dict(),
            "history": self._history,
            "last": self._last,
            "seconds": self._spent(),
            "versions": _versions(),
        }

        def write() -> None:
            log = {"log": self._log.synchronised()}
            checkpoint.write(self._out / checkpoint.FILE, state | log)

        with self._not_training():
            self._processes.led(write)
        self._kept = trainer.step
        self._observe("checkpoint", trainer.step, {})
        self._saved_at = time.perf_counter()

    def _results(self, outcome: str) -> Record:
        trainer = self._trainer
        results = {
            "command": "train",
            "outcome": outcome,
            "step": trainer.step,
            "epochs": trainer.step / trainer.steps_per_epoch,
            "gradients": trainer.gradients,
            **self._last,
            "parameters": size(trainer.model),
            "seconds": self._spent(),
            "device": str(trainer.device),
            "processes": self._processes.count,
            "versions": _versions(),
            "config": trainer.config.as_dict(),
            "history": self._history,
        }
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        self._processes.led(lambda: replace_text(self._out / RESULTS, text))
        return results

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Leaves the time inside out of the throughput."""
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)  # the steps' work is theirs
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def _spent(self) -> float:
        return self._seconds + time.perf_counter() - self._began

    def _advice(self) -> str:
        if self._kept is None:
            return "there was no checkpoint yet"
        return f"the checkpoint of step {self._kept} is kept"


def _begun(config: Config, out: Path, resume: bool) -> tuple[Record | None, Record | None]:
    """What the folder holds: the checkpoint to go on from, and the results of a complete run."""
    saved = _saved(config, out, resume)
    if saved is not None:
        done = read_results(out / RESULTS)
        if done is not None and done["outcome"] == "complete":
            step = saved["trainer"].get("step")
            if done["config"] != config.as_dict() or done["step"] != step:
                raise UserError(
                    f"{out / RESULTS} is of another run than {checkpoint.FILE} beside it: remove "
                    "it to have the run gone on with, or give another --out"
                )
            return None, done
    return saved, None


def _saved(config: Config, out: Path, resume: bool) -> Record | None:
    """The checkpoint to go on from, if there is one.

    Raises:
        UserError: there is one and `resume` is False, or it is of another configuration.
    """
    path = out / checkpoint.FILE
    if not path.exists():
        return None
    if not resume:
        raise UserError(f"{out} holds a run: go on with it by --resume, or give another --out")
    saved = checkpoint.read_run(path)
    there, here = saved["config"], config.as_dict()
    for name in here:
        if there.get(name) != here[name]:
            raise UserError(
                f"{out} holds a run with {name} {quoted(there.get(name))}, not "
                f"{quoted(here[name])}: leave the configuration as it was, or give another --out"
            )
    return saved


def out_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice, of a GPU or of the host."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _versions() -> dict[str, str]:
    return {"eigenfilter": ef.__version__, "torch": str(torch.__version__)}
