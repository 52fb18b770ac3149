"""The number of threads, and which Python thread calls, change nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from cases import DTYPES, UPDATES, Arena, same_bits
from eigenfilter import kernels

pytestmark = pytest.mark.usefixtures("threads")

# Of work for several threads, in all lists of an update.
WORK_BYTES = 20 * 2**20

# Few and many tensors, with borders between threads inside of tensors and between them: shares of
# the work.
SHAPES = {
    "one": (1.0,),
    "uneven": (0.0, 0.61, 0.0, 0.0001, 0.15, 0.15, 0.0),
    "many": tuple(i / 45_000 for i in range(300)),
}


def sizes_of(shape: str, dtype: torch.dtype, lists: int) -> list[int]:
    total = WORK_BYTES // (dtype.itemsize * lists)
    return [int(share * total) + i % 3 for i, share in enumerate(SHAPES[shape])]


ROLES = ("params", "grads", "base_grads", "momenta", "exp_avgs", "exp_avg_sqs", "backups")


def arena_of(shape: str, dtype: torch.dtype) -> Arena:
    """All lists that any update has, with values."""
    arena = Arena(dtype, len(ROLES), sizes_of(shape, dtype, 3))
    arena.fill(*range(len(ROLES)))
    arena.memory[ROLES.index("exp_avg_sqs")].abs_()
    return arena


def results(arena: Arena, threads: int) -> list[Tensor]:
    """What every update writes, each from the arena's values, which stay."""
    torch.set_num_threads(threads)
    outputs = []
    for update in UPDATES:
        before = {role: arena.memory[ROLES.index(role)].clone() for role in update.writes}
        update([arena.lists[ROLES.index(role)] for role in update.lists])
        for role, old in before.items():
            memory = arena.memory[ROLES.index(role)]
            outputs.append(memory.clone())
            memory.copy_(old)
            assert not same_bits(outputs[-1], old)
    return outputs


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES]
    + [("uneven", dtype) for dtype in DTYPES if dtype != torch.float32],
    ids=str,
)
def test_updates_do_not_depend_on_the_number_of_threads(shape: str, dtype: torch.dtype) -> None:
    arena = arena_of(shape, dtype)
    alone = results(arena, 1)
    for count in (2, 3, 7):
        assert all(map(same_bits, results(arena, count), alone))


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_searches_do_not_depend_on_it(shape: str) -> None:
    arena = Arena(torch.float32, 1, sizes_of(shape, torch.float32, 1))
    arena.fill(0)
    tensors = arena.lists[0]
    largest = max(tensors, key=torch.numel)
    norms = set()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        norms.add(kernels.norm(tensors).item())
        for place in (0, largest.numel() // 2, largest.numel() - 1):
            result, good = torch.zeros(2), largest[place].clone()
            kernels.flag_nonfinite(tensors, result[:1])
            largest[place] = torch.inf
            kernels.flag_nonfinite(tensors, result[1:])
            largest[place] = good
            assert result.tolist() == [0, 1]
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(torch.cat(tensors).double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_sums_do_not_depend_on_it(shape: str) -> None:
    arena = Arena(torch.float32, 2, sizes_of(shape, torch.float32, 1))
    arena.fill(0, 1)
    norms = set()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        norms.add(kernels.norm(arena.lists[0], weights=arena.lists[1]).item())
    assert len(norms) == 1
    products = arena.values(0).double() * arena.values(1).double()
    assert norms.pop() == pytest.approx(products.norm().item(), rel=1e-7)


def test_a_new_python_thread_gets_the_same_result() -> None:
    arena = arena_of("uneven", torch.float32)
    expected = results(arena, 2)
    result: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: result.append(results(arena, 2)))
    thread.start()
    thread.join()
    assert all(map(same_bits, result[0], expected))


def test_python_threads_at_the_same_time() -> None:
    """Calls release the interpreter's lock and share nothing."""
    torch.set_num_threads(2)
    norms: dict[int, set[float]] = {i: set() for i in range(3)}

    def work(i: int) -> None:
        t = torch.full((3_000_000 + i,), 0.5 + i)
        for _ in range(10):
            norms[i].add(kernels.norm([t]).item())

    workers = [threading.Thread(target=work, args=(i,)) for i in norms]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, result in norms.items():
        assert len(result) == 1
        assert result.pop() == pytest.approx((0.5 + i) * (3_000_000 + i) ** 0.5, rel=1e-6)
