"""The number of threads, and which Python thread calls, change nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from cases import ALPHA, DESCENTS, Arena, same_bits
from eigenfilter import kernels

pytestmark = pytest.mark.usefixtures("threads")

# Few and many tensors, with borders between threads inside of tensors and between them.
SHAPES = {
    "one": (200_003,),
    "uneven": (3, 150_001, 0, 17, 40_000, 40_000, 1),
    "many": tuple(range(1, 700)),
}


def updated(dtype: torch.dtype, sizes: tuple[int, ...], threads: int) -> list[Tensor]:
    torch.manual_seed(7)
    torch.set_num_threads(threads)
    arena = Arena(dtype, 4, sizes)
    arena.fill(0, 1, 2)
    x, g, m, b = arena.lists
    kernels.ascend(x, g, b, ALPHA)
    kernels.descend(x, g, m, b, **DESCENTS[-1].options())
    arena.check_margins()
    return [arena.values(i) for i in (0, 2, 3)]


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_updates_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    alone = updated(dtype, sizes, 1)
    assert not any(t.isnan().any() for t in alone)
    for count in (2, 3, 7):
        assert all(map(same_bits, updated(dtype, sizes, count), alone))


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_a_bad_element_is_found_by_any_number_of_threads(sizes: tuple[int, ...]) -> None:
    arena = Arena(torch.float32, 1, sizes)
    arena.fill(0)
    largest = max(arena.lists[0], key=torch.numel)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for place in (0, largest.numel() // 2, largest.numel() - 1):
            found, good = torch.zeros(2), largest[place].clone()
            kernels.flag_nonfinite(arena.lists[0], found[:1])
            largest[place] = torch.inf
            kernels.flag_nonfinite(arena.lists[0], found[1:])
            largest[place] = good
            assert found.tolist() == [0, 1]


def test_a_new_python_thread_gets_the_same_result() -> None:
    sizes = SHAPES["uneven"]
    expected = updated(torch.float32, sizes, 2)
    results: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: results.append(updated(torch.float32, sizes, 2)))
    thread.start()
    thread.join()
    assert all(map(same_bits, results[0], expected))


def test_python_threads_at_the_same_time() -> None:
    """Calls release the interpreter's lock and share nothing."""
    torch.set_num_threads(2)
    norms: dict[int, set[float]] = {i: set() for i in range(3)}

    def work(i: int) -> None:
        t = torch.full((100_000 + i,), 0.5 + i)
        for _ in range(20):
            norms[i].add(kernels.norm([t]).item())

    workers = [threading.Thread(target=work, args=(i,)) for i in norms]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, found in norms.items():
        assert len(found) == 1
        assert found.pop() == pytest.approx((0.5 + i) * (100_000 + i) ** 0.5, rel=1e-6)
