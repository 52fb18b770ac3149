"""The processes of one run, which torchrun started, and what they do together.

Code asks a `Processes` object instead of looking at its rank. A single process (`SINGLE_PROCESS`)
does all the work itself. Under torchrun (`init_distributed`) the hosts communicate through Gloo,
which waits for no device, and gradients are reduced by NCCL where there are GPUs.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eigenfilter.experiments.errors import UserError

T = TypeVar("T")


class Processes:
    """The processes of a run, seen from one of them.

    The methods of this base class are those of a single process. A method that is collective must
    be called by all processes, in the same order.

    Attributes:
        world_size: number of processes.
        is_main: whether this process writes and prints on behalf of all.
        sample_slice: the slice of shared data that this process works on. It takes every
            `world_size`-th sample, so that the first samples of a batch are the first of all
            slices.
        process_group: the group of an operator over the data of all processes, or None.
        launch_command: the command that starts the run again.
    """

    world_size = 1
    is_main = True
    sample_slice = slice(0, None, 1)
    process_group: dist.ProcessGroup | None = None
    launch_command = "eigenfilter"

    def device_name(self, name: str) -> str:
        """Return the device of this process, given the device that the user asked for."""
        return name

    def process_seed(self, seed: int) -> int:
        """Return a seed that differs between processes, for dropout."""
        return seed

    def samples_per_process(self, images: int, name: str) -> int:
        """Return how many of the images of a step each process takes.

        Args:
            images: number of images in a step.
            name: the option that sets this number, for the message.

        Raises:
            ValueError: the images cannot be divided evenly among the processes.
        """
        if images % self.world_size:
            raise ValueError(
                f"{name} gives {images} images per step, which {self.world_size} processes cannot "
                f"share evenly; make it a multiple of {self.world_size}"
            )
        return images // self.world_size

    def wrap_model(self, model: nn.Module, example: Tensor) -> nn.Module:
        """Wrap the model so that backward averages gradients over processes (collective).

        Args:
            model: the model, equal in all processes.
            example: a batch that the model accepts.
        """
        return model

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Run the action on the main process and return its result everywhere (collective).

        The result must be picklable.

        Raises:
            UserError: the action raised it on the main process.
        """
        return action()

    def main_process_first(self, load: Callable[[], T]) -> T:
        """Run `load` in every process, on the first of each machine before the rest (collective).

        The first process downloads what is missing, and the others read it.

        Raises:
            UserError: `load` raised it in some process.
        """
        return load()

    def any_process(self, flag: bool) -> bool:
        """Return whether the flag is set in any process (collective)."""
        return flag

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order of their ranks (collective)."""
        return [value]

    def own_value(self, values: Sequence[T]) -> T | None:
        """Return this process's entry of a list that `all_gather` returned.

        The result is None if fewer processes gathered the list.
        """
        return values[0]

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, the same bits in each (collective)."""
        return value

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors in place by their mean over processes (collective)."""


class SingleProcess(Processes):
    """The only process of a run."""


SINGLE_PROCESS = SingleProcess()


class _TorchrunProcesses(Processes):
    """One of several processes that torchrun started, in torch's default group."""

    def __init__(self) -> None:
        rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._rank, self._local_rank = rank, int(os.environ["LOCAL_RANK"])
        self.is_main = rank == 0
        self.sample_slice = slice(rank, None, self.world_size)
        self.process_group = dist.group.WORLD
        self.launch_command = "torchrun ... -m eigenfilter"

    def destroy(self) -> None:
        """Destroy the group and drop all references to it.

        The threads of the group end with the last reference to it. A thread that still holds a
        tensor when the interpreter shuts down aborts the process (pytorch/pytorch#190489).
        """
        self.process_group = None
        dist.destroy_process_group()
        gc.collect()  # DistributedDataParallel refers to the group from a reference cycle

    def device_name(self, name: str) -> str:
        if name == "cpu" or not torch.cuda.is_available():
            return name
        if name not in ("auto", "cuda"):
            raise UserError(
                f"under torchrun each process takes its own GPU; give --device cuda or cpu, "
                f"not {name}"
            )
        return f"cuda:{self._local_rank}"

    def process_seed(self, seed: int) -> int:
        # Only the lower 32 bits change, because the generator of a CPU uses no others.
        return seed ^ (0x9E3779B1 * self._rank) % 2**32

    def wrap_model(self, model: nn.Module, example: Tensor) -> nn.Module:
        network = nn.parallel.DistributedDataParallel(model)
        # DistributedDataParallel reorders its buckets after the first backward pass, and the order
        # decides how sums round. Taking that pass here makes a resumed run round like one that was
        # never interrupted.
        model.eval()
        network(example).sum().backward()
        model.train()
        model.zero_grad()
        return network

    def run_on_main(self, action: Callable[[], T]) -> T:
        outcome = _capture(action) if self.is_main else None
        return _unwrap(cast("_Outcome[T]", self._broadcast(outcome)))

    def main_process_first(self, load: Callable[[], T]) -> T:
        outcome: _Outcome[T] = None, None
        for first in (True, False):
            if first == (self._local_rank == 0):
                outcome = _capture(load)
            for error in self.all_gather(outcome[1]):
                _raise_user_error(error)
        return _unwrap(outcome)

    def any_process(self, flag: bool) -> bool:
        return bool(self.all_reduce(torch.tensor(int(flag))))

    def all_gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def own_value(self, values: Sequence[T]) -> T | None:
        return values[self._rank] if self._rank < len(values) else None

    def all_reduce(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        flat = self.all_reduce(torch.cat([t.reshape(-1) for t in tensors])) / self.world_size
        parts = flat.split([t.numel() for t in tensors])  # type: ignore[no-untyped-call]
        torch._foreach_copy_(
            list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]
        )

    def _broadcast(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]


@contextmanager
def init_distributed() -> Iterator[Processes]:
    """Initialize torch.distributed if torchrun started this process.

    Yields:
        The processes of the run; without torchrun, `SINGLE_PROCESS`.

    Raises:
        UserError: another process ended, so this one cannot go on.
    """
    if not is_distributed():
        yield SINGLE_PROCESS
        return
    # DistributedDataParallel imports it. If that happens while a group exists, the threads of the
    # group outlive it.
    import torch._dynamo

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        processes = _TorchrunProcesses()
        yield processes
    except RuntimeError as error:
        if not _is_communication_error(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            "another process of the run ended, or cannot be reached; the last checkpoint, if there "
            f"was one, is kept ({reason})"
        ) from error
    processes.destroy()  # not after an error, which the others may not have noticed yet


def claim_first_failure() -> bool:
    """Return whether this process is the first of its run to fail, and so reports the error.

    torchrun ends the other processes as soon as one has failed. The first to fail must therefore
    not wait for any other before it prints. Without torchrun the result is True.
    """
    if not is_distributed():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it before the error is printed
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
        first: bytes = store.compare_set(f"eigenfilter/failed/{attempt}", "", rank)
        return first == rank.encode()
    except dist.DistError:  # an error that is printed twice is better than one that is not
        return True


def is_distributed() -> bool:
    """Return whether torchrun started more than one process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def _is_communication_error(error: RuntimeError) -> bool:
    """Return whether the error comes from communication with another process."""
    return isinstance(error, dist.DistError) or "third_party/gloo" in str(error)


_Outcome = tuple[T | None, str | None]
"""The value that an action returned, and the message of its UserError; one of them is None."""


def _capture(action: Callable[[], T]) -> _Outcome[T]:
    try:
        return action(), None
    except UserError as error:
        return None, str(error)


def _unwrap(outcome: _Outcome[T]) -> T:
    value, error = outcome
    _raise_user_error(error)
    return cast(T, value)


def _raise_user_error(error: str | None) -> None:
    if error is not None:
        raise UserError(error)
