"""The processes of one run that torchrun started: which of them this is, what they do together.

A run asks a `Processes` and never its rank. Alone (`ALONE`) everything is done here and at once;
under torchrun (`launched`) hosts talk by gloo, so that no device is waited for, and gradients go by
NCCL where there are GPUs.
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
    """The processes of a run, seen from one of them; these are the one that is alone.

    What is said to be collective is called by all processes, in the same order.

    Attributes:
        count: how many there are.
        leads: whether this one writes and prints for all.
        part: which samples of whatever is shared are this process's: every `count`-th, so that the
            first of a batch are the first of all parts.
        group: of an operator over the data of all, or None.
        command: what starts the command again.
    """

    count = 1
    leads = True
    part = slice(0, None, 1)
    group: dist.ProcessGroup | None = None
    command = "eigenfilter"

    def device(self, name: str) -> str:
        """The name of this process's device, from the one that was asked for."""
        return name

    def seed(self, seed: int) -> int:
        """A seed of this process's own: of dropout."""
        return seed

    def share(self, images: int, name: str) -> int:
        """How many of the images of a step each process takes.

        name: of the option that gives them.

        Raises:
            ValueError: they cannot be shared evenly.
        """
        if images % self.count:
            raise ValueError(
                f"{name} gives {images} images a step, which {self.count} processes cannot share "
                f"evenly: make it a multiple of {self.count}"
            )
        return images // self.count

    def averaging(self, model: nn.Module, example: Tensor) -> nn.Module:
        """The model, such that backward leaves the mean of all processes' gradients (collective).

        example: an input.
        """
        return model

    def led(self, action: Callable[[], T]) -> T:
        """What the leading process does, for all (collective); it must be possible to pickle it.

        Raises:
            UserError: what it raised there.
        """
        return action()

    def after_download(self, load: Callable[[], T]) -> T:
        """What each process loads, the first of each machine before the others (collective).

        Raises:
            UserError: what it raised in any.
        """
        return load()

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised in any process (collective)."""
        return flag

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, the leading one's first (collective)."""
        return [value]

    def own(self, values: Sequence[T]) -> T | None:
        """This process's value of what `gathered` returned; None if fewer processes did."""
        return values[0]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, to the same bits in all (collective)."""
        return value

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Make floating-point tensors their mean over all processes, in place (collective)."""


ALONE = Processes()


class _Launched(Processes):
    """One of several processes, in torch's default group."""

    def __init__(self) -> None:
        rank, self.count = dist.get_rank(), dist.get_world_size()
        self._rank, self._local_rank = rank, int(os.environ["LOCAL_RANK"])
        self.leads = rank == 0
        self.part = slice(rank, None, self.count)
        self.group = dist.group.WORLD
        self.command = "torchrun ... -m eigenfilter"

    def leave(self) -> None:
        """Destroy the group, and let go of it.

        Its threads end with the last reference to it. One that still holds a tensor when the
        interpreter shuts down aborts the process (pytorch/pytorch#190489).
        """
        self.group = None
        dist.destroy_process_group()
        gc.collect()  # networks in DistributedDataParallel refer to the group, and are cycles

    def device(self, name: str) -> str:
        if name == "cpu" or not torch.cuda.is_available():
            return name
        if name not in ("auto", "cuda"):
            raise UserError(
                f"each process takes a GPU of its own: --device cuda or cpu, not {name}"
            )
        return f"cuda:{self._local_rank}"

    def seed(self, seed: int) -> int:
        # Of the lower half: a CPU's generator takes in no more.
        return seed ^ (0x9E3779B1 * self._rank) % 2**32

    def averaging(self, model: nn.Module, example: Tensor) -> nn.Module:
        network = nn.parallel.DistributedDataParallel(model)
        # After its first pass it orders its buckets anew, and sums round by their order: with that
        # pass behind it, a resumed run sums as one that was never stopped.
        model.eval()
        network(example).sum().backward()
        model.train()
        model.zero_grad()
        return network

    def led(self, action: Callable[[], T]) -> T:
        outcome = _outcome(action) if self.leads else None
        return _result(cast("_Outcome[T]", self._broadcast(outcome)))

    def after_download(self, load: Callable[[], T]) -> T:
        outcome: _Outcome[T] = None, None
        for first in (True, False):
            if first == (self._local_rank == 0):
                outcome = _outcome(load)
            for error in self.gathered(outcome[1]):
                _raise(error)
        return _result(outcome)

    def any(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor(int(flag))))

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def own(self, values: Sequence[T]) -> T | None:
        return values[self._rank] if self._rank < len(values) else None

    def total(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def average(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        flat = self.total(torch.cat([t.reshape(-1) for t in tensors])) / self.count
        parts = flat.split([t.numel() for t in tensors])  # type: ignore[no-untyped-call]
        torch._foreach_copy_(
            list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)]
        )

    def _broadcast(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]


@contextmanager
def launched() -> Iterator[Processes]:
    """A context with the processes that torchrun started; without it, `ALONE`.

    Raises:
        UserError: another process ended, and this one cannot go on.
    """
    if not several():
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        processes = _Launched()
        yield processes
    except RuntimeError as error:
        if not _ended_elsewhere(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            "another process of the run ended, or cannot be reached: the last checkpoint, if there "
            f"was one, is kept ({reason})"
        ) from error
    processes.leave()  # not after an error, which others may not have seen yet


def first_to_fail() -> bool:
    """Whether this process is the one that says why its run failed; without torchrun it is.

    torchrun ends the other processes as soon as one has, so that one must not wait to say it.
    """
    if not several():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, until it is said
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        own, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
        first: bytes = store.compare_set(f"eigenfilter/failed/{attempt}", "", own)
        return first == own.encode()
    except dist.DistError:  # said twice is better than not at all
        return True


def several() -> bool:
    """Whether torchrun started more than this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def _ended_elsewhere(error: RuntimeError) -> bool:
    """Whether it is an error of communication with another process."""
    return isinstance(error, dist.DistError) or "third_party/gloo" in str(error)


_Outcome = tuple[T | None, str | None]
"""What an action returned, or what its UserError said."""


def _outcome(action: Callable[[], T]) -> _Outcome[T]:
    try:
        return action(), None
    except UserError as error:
        return None, str(error)


def _result(outcome: _Outcome[T]) -> T:
    value, error = outcome
    _raise(error)
    return cast(T, value)


def _raise(error: str | None) -> None:
    if error is not None:
        raise UserError(error)
