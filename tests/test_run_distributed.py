"""The fixture `run_distributed`: results of all processes, or a failure that says what happened."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import run_distributed as run_distributed_module
from run_distributed import ProcessPools, RunDistributed

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pools() -> Iterator[ProcessPools]:
    """Processes of this file alone, which fail."""
    pools = ProcessPools()
    yield pools
    pools.close()


def sum_of_ranks(rank: int, factor: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor([factor * (rank + 1)])
    dist.all_reduce(total)
    return rank, total


def test_all_processes_return_results(run_distributed: RunDistributed) -> None:
    for rank, result in enumerate(run_distributed(sum_of_ranks, 2, 0.5)):
        assert result == (rank, torch.tensor([1.5]))


def process_and_time(rank: int) -> tuple[int, int]:
    return os.getpid(), time.monotonic_ns()


def another_process_and_time(rank: int) -> tuple[int, int]:
    return process_and_time(rank)


def test_a_scenario_runs_once_and_processes_are_reused(run_distributed: RunDistributed) -> None:
    first = run_distributed(process_and_time, 2)
    first.pop()
    again = run_distributed(process_and_time, 2)
    assert again[:1] == first  # and what a test does to its copy is not seen
    assert len({pid for pid, _ in again}) == 2
    others = run_distributed(another_process_and_time, 2)
    assert [pid for pid, _ in others] == [pid for pid, _ in again]
    assert others != again


def change_state(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")


def state(rank: int) -> tuple[object, ...]:
    with pytest.raises(UserWarning, match="an error"):
        warnings.warn("an error", stacklevel=1)
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.rand([]).item(),
    )


def test_every_call_begins_with_the_same_state(run_distributed: RunDistributed) -> None:
    run_distributed(change_state, 2)
    number = torch.rand([]).item()  # the seed is that of this process
    assert run_distributed(state, 2) == [(torch.float32, True, 1, number)] * 2


def test_local_functions_are_refused(run_distributed: RunDistributed) -> None:
    with pytest.raises(ValueError, match="define it at the top level of its module"):
        run_distributed(lambda rank: rank, 2)


def failure(pools: ProcessPools, fn: object, *args: object) -> str:
    """Return the message with which a call fails; the same call fails again, without running."""
    with pytest.raises(pytest.fail.Exception) as error:
        pools.run(fn, 2, *args)
    with pytest.raises(pytest.fail.Exception) as again:
        pools.run(fn, 2, *args)
    assert not pools._pools  # the processes are gone, and no others were needed
    assert str(again.value) == str(error.value)
    return str(error.value)


def raise_in_one(rank: int, reason: str) -> None:
    if rank == 1:
        raise ArithmeticError(reason)


def end_in_one(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_in_one(rank: int) -> None:
    if rank == 1:
        threading.Event().wait()


@pytest.mark.slow
def test_an_error_in_one_process(pools: ProcessPools) -> None:
    """The other one waits for it in vain; new processes replace both."""
    before = pools.run(process_and_time, 2)
    message = failure(pools, raise_in_one, "the reason")
    assert "raise_in_one('the reason',) of " in message
    assert "in rank 1 of 2: Traceback" in message
    assert "ArithmeticError: the reason" in message
    assert "in rank 0 of 2: it was still running" in message
    after = pools.run(another_process_and_time, 2)
    assert not {pid for pid, _ in before} & {pid for pid, _ in after}


def test_a_process_that_ends(pools: ProcessPools) -> None:
    message = failure(pools, end_in_one)
    assert "in rank 0 of 2: the process ended with exit code -9" in message


def leave_with_an_error(rank: int) -> None:
    atexit_code = 3 if rank == 1 else 0
    run_distributed_module.leave = lambda: os._exit(atexit_code)


def test_a_process_that_does_not_end_cleanly_is_reported() -> None:
    pools = ProcessPools()
    pools.run(leave_with_an_error, 2)
    with pytest.raises(RuntimeError, match=r"exit codes \[0, 3\]"):
        pools.close()


def return_a_lock(rank: int) -> object:
    return threading.Lock()


def test_a_result_that_cannot_be_sent(pools: ProcessPools) -> None:
    assert "cannot pickle" in failure(pools, return_a_lock)


def test_equal_arguments_of_other_types_are_other_calls(run_distributed: RunDistributed) -> None:
    assert run_distributed(type_of, 2, 1) == ["int", "int"]
    assert run_distributed(type_of, 2, True) == ["bool", "bool"]


def type_of(rank: int, value: object) -> str:
    return type(value).__name__


@pytest.mark.slow
def test_a_process_that_hangs(pools: ProcessPools, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hang, those that are done in the barrier at the end; each says where."""
    monkeypatch.setattr(pools, "limit", 5.0)
    message = failure(pools, hang_in_one)
    assert "in rank 1 of 2: it had not ended after 5 s" in message
    assert "in hang_in_one" in message
    assert "in rank 0 of 2: it had not ended after 5 s" in message
    assert "in barrier" in message
