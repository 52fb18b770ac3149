"""One training run in a folder, from a configuration to results. It resumes at any checkpoint."""

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
from eigenfilter.experiments.locks import folder_lock
from eigenfilter.experiments.networks import size
from eigenfilter.experiments.processes import SINGLE_PROCESS, Processes
from eigenfilter.experiments.trainer import Diverged, Trainer, reproducible
from eigenfilter.experiments.validation import check_session, read_results
from eigenfilter.monitor import SharpnessCheck

RESULTS = "results.json"
CONFIG = "config.yaml"
PAUSE = 10.0  # smallest time in seconds between checkpoints at ends of epochs

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
    processes: Processes = SINGLE_PROCESS,
    wait: Callable[[], bool] = lambda: False,
) -> Record:
    """Train, and write checkpoints, logs and results into a folder.

    Args:
        config: the configuration.
        out: the folder. The run writes checkpoint.pt, config.yaml, log.jsonl, results.json and
            tensorboard/ into it.
        data_dir: data folder; see `datasets.folder_of`.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
        resume: whether to continue from the checkpoint in `out`, if there is one. The steps after
            it and the final weights have the same bits as in a run that was never interrupted.
        tensorboard: whether to write TensorBoard events too.
        stop: called after every step. When it returns True, the run writes a checkpoint and ends.
        observe: called with every record of the log: its kind ("train", "test" or "sharpness", and
            also "start" and "checkpoint"), its step and its values.
        processes: the processes that train together; see `processes.init_distributed`. Each of
            them calls this function. The main process reads and writes `out` and calls `observe`.
            Any process may stop the run.
        wait: called while another process has the lock of `out`; waiting ends when it returns
            False.

    Returns:
        The content of results.json: `outcome` ("complete" or "stopped"), the last records, the
        history of evaluations, times, the configuration and versions.

    Raises:
        UserError: the input is invalid; another process has the lock of `out`; `out` contains a
            run and `resume` is False, or it contains a run of another configuration or a damaged
            file; the disk is full; memory runs out. `Diverged` is a subclass. The last checkpoint
            is kept, and the message says so.
    """
    torch_device = device_of(processes.device_name(device))
    with ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(folder_lock(out, "training run", wait))

        processes.run_on_main(lock)
        return _run(
            config, out, torch_device, data_dir, resume, tensorboard, stop, observe, processes
        )


def _run(
    config: Config,
    out: Path,
    torch_device: torch.device,
    data_dir: Path | None,
    resume: bool,
    tensorboard: bool,
    stop: Callable[[], bool],
    observe: Observe,
    processes: Processes,
) -> Record:
    saved, results = processes.run_on_main(lambda: _load_previous(config, out, resume))
    if results is not None:
        return results
    data = processes.main_process_first(lambda: datasets.load(config.dataset, data_dir))
    with reproducible(config, torch_device, processes):
        try:
            trainer = Trainer(config, data, torch_device, processes)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory on {torch_device} for the model and its data; choose a smaller "
                "model or fewer samples"
            ) from error
        session = _TrainingSession(trainer, out, saved, tensorboard, observe, processes)
        del saved  # it is as large as the model and its optimizer
        return session.run(stop)


class _TrainingSession:
    """The part of a run from its start or a checkpoint until it ends or is stopped."""

    _log: logs.RunLog  # on the main process only

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
        self._observe: Observe = observe if processes.is_main else lambda kind, step, record: None
        self._checksum = trainer.data.checksum
        if len(set(processes.all_gather(self._checksum))) > 1:
            raise UserError(
                "the processes have different data; copy --data-dir from one machine to the others"
            )
        self._history: list[Record] = []
        self._last: dict[str, Record] = {}
        self._earlier_seconds = 0.0  # time that earlier sessions took
        self._checkpoint_step: int | None = None  # step of the checkpoint on disk
        size_of_log = records = 0
        if saved is not None:
            if saved["data"] != self._checksum:
                raise UserError(
                    f"{out} was trained on other data; give the same --data-dir, or another --out"
                )
            try:
                trainer.load_state_dict(saved["trainer"])
                records = check_session(saved, trainer)
            except ValueError as error:
                raise UserError(
                    f"{out / checkpoint.FILE} is damaged, or does not fit its configuration: "
                    f"{error}; restore it, or train again into another --out"
                ) from error
            self._history, self._last = saved["history"], saved["last"]
            self._earlier_seconds, self._checkpoint_step = saved["seconds"], trainer.step
            size_of_log = saved["log"]

        def open_files() -> None:
            if saved is None:
                configs.write(trainer.config, out / CONFIG)
                (out / RESULTS).unlink(missing_ok=True)
            logs.check(out, size_of_log, records)
            self._log = logs.RunLog(
                out, size=size_of_log, step=trainer.step, tensorboard=tensorboard
            )

        processes.run_on_main(open_files)
        self._started = self._window_start = self._saved_at = time.perf_counter()
        # Throughput is measured over a window that starts at the last record. Time for tests,
        # checkpoints and the sharpness, and steps of an earlier session, do not count.
        self._excluded_seconds = 0.0
        self._uncounted_steps = trainer.pending

    def run(self, stop: Callable[[], bool]) -> Record:
        trainer = self._trainer
        self._observe("start", trainer.step, {"total": trainer.total_steps})
        try:
            is_controlled = trainer.config.sharpness_target > 0  # from its first step on
            if trainer.monitor is not None and not trainer.step and not is_controlled:
                self._sharpness(trainer.monitor.check)
            stopped = False
            while not trainer.finished and not stopped:
                trainer.advance()
                self._after_step()
                stopped = self._processes.any_process(stop()) and not trainer.finished
            if trainer.finished and "test" not in self._last:  # no evaluation was due before
                self._test()
            self._save()
            return self._results("stopped" if stopped else "complete")
        except Diverged as error:
            rates = " or ".join(f"{name} ({x:.3g})" for name, x in trainer.rates().items())
            raise Diverged(f"{error}; lower {rates}; {self._advice()}", error.step) from error
        except UserError as error:
            raise UserError(f"{error}; {self._advice()}") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory at step {trainer.step + 1}; lower batch_size; {self._advice()}"
            ) from error
        finally:
            if self._processes.is_main:
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
        if trainer.finished:  # `run` saves the last checkpoint
            return
        every = config.checkpoint_every
        if step % every == 0 if every else ends and self._checkpoint_is_due():
            self._save()

    def _checkpoint_is_due(self) -> bool:
        return self._processes.any_process(time.perf_counter() - self._saved_at >= PAUSE)

    def _train(self) -> None:
        trainer = self._trainer
        steps = trainer.pending
        record = trainer.drain() | trainer.rates()
        now = time.perf_counter()
        images = (steps - self._uncounted_steps) * trainer.batch_size
        record["images_per_second"] = images / max(
            now - self._window_start - self._excluded_seconds, 1e-9
        )
        self._window_start, self._excluded_seconds, self._uncounted_steps = now, 0.0, 0
        self._write("train", record)

    def _test(self) -> None:
        with self._not_training():
            self._write("test", self._trainer.evaluate())
        self._history.append({"step": self._trainer.step} | self._last["test"])

    def _sharpness(self, measure: Callable[[], SharpnessCheck | None]) -> None:
        try:
            check = measure()
        except FloatingPointError as error:  # the losses have not been read yet
            self._trainer.check()
            step = self._trainer.step
            raise Diverged(f"the Hessian after step {step} is not finite", step) from error
        if check is not None:
            self._excluded_seconds += check.seconds
            names = ("sharpness", "residual", "edge")
            record = {name: getattr(check, name) for name in names}
            self._write("sharpness", record | self._trainer.controlled())

    def _write(self, kind: str, record: Record) -> None:
        trainer = self._trainer
        record = {"epoch": trainer.step / trainer.steps_per_epoch} | record
        self._processes.run_on_main(lambda: self._log.write(kind, trainer.step, record))
        self._last[kind] = logs.json_safe(record)
        self._observe(kind, trainer.step, record)

    def _save(self) -> None:
        """Write a checkpoint, after checking that the state is finite."""
        trainer = self._trainer
        trainer.check()
        state = {
            "config": trainer.config.as_dict(),
            "data": self._checksum,
            "trainer": trainer.state_dict(),
            "history": self._history,
            "last": self._last,
            "seconds": self._elapsed(),
            "versions": _versions(),
        }

        def write() -> None:
            log = {"log": self._log.sync()}
            checkpoint.write(self._out / checkpoint.FILE, state | log)

        with self._not_training():
            self._processes.run_on_main(write)
        self._checkpoint_step = trainer.step
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
            "seconds": self._elapsed(),
            "device": str(trainer.device),
            "processes": self._processes.world_size,
            "versions": _versions(),
            "config": trainer.config.as_dict(),
            "history": self._history,
        }
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        self._processes.run_on_main(lambda: replace_text(self._out / RESULTS, text))
        return results

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Exclude the time inside the context from the throughput."""
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)  # earlier steps still count
        began = time.perf_counter()
        yield
        self._excluded_seconds += time.perf_counter() - began

    def _elapsed(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started

    def _advice(self) -> str:
        if self._checkpoint_step is None:
            return "there was no checkpoint yet"
        return f"the checkpoint of step {self._checkpoint_step} is kept"


def _load_previous(config: Config, out: Path, resume: bool) -> tuple[Record | None, Record | None]:
    """Return the checkpoint to resume from and the results of a complete run, if there are any."""
    saved = _load_checkpoint(config, out, resume)
    if saved is not None:
        results = read_results(out / RESULTS)
        if results is not None and results["outcome"] == "complete":
            step = saved["trainer"].get("step")
            if results["config"] != config.as_dict() or results["step"] != step:
                raise UserError(
                    f"{out / RESULTS} belongs to another run than {checkpoint.FILE} beside it; "
                    "remove it to resume the run, or give another --out"
                )
            return None, results
    return saved, None


def _load_checkpoint(config: Config, out: Path, resume: bool) -> Record | None:
    """Read the checkpoint to resume from, or return None if there is none.

    Raises:
        UserError: there is one and `resume` is False, or it has another configuration.
    """
    path = out / checkpoint.FILE
    if not path.exists():
        return None
    if not resume:
        raise UserError(f"{out} contains a run; continue it with --resume, or give another --out")
    saved = checkpoint.read_run(path)
    stored = saved["config"]
    for name, value in config.as_dict().items():
        if stored.get(name) != value:
            raise UserError(
                f"{out} contains a run with {name} {quoted(stored.get(name))}, not "
                f"{quoted(value)}; leave the configuration as it was, or give another --out"
            )
    return saved


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error means that a GPU or the host ran out of memory."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _versions() -> dict[str, str]:
    return {"eigenfilter": ef.__version__, "torch": str(torch.__version__)}
