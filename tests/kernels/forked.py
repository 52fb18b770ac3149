"""Kernels and optimizers before and after a fork, in a process of `test_forks.py`.

Every call has work for several threads, which the parent uses. Were the child to wait for its
parent's threads it would never end: an alarm ends it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import eigenfilter as ef
from cases import UPDATES, same_bits
from eigenfilter import _core, kernels

LENGTH = 1_300_001
SECONDS = 100
METHODS = (ef.SGD, ef.SAM, ef.USAM, ef.TwoStepUSAM, ef.HessianUSAM, ef.AdamW)


def updates(backend: str) -> list[Tensor]:
    """What every update writes."""
    values = []
    for update in UPDATES:
        torch.manual_seed(3)
        arena = update.arena(torch.float32, (LENGTH,))
        update(arena.lists, backend=backend)
        values += [arena.values(update.lists.index(role)) for role in update.writes]
    return values


def sums(backend: str) -> list[Tensor]:
    """Reductions, and the kernels over vectors."""
    torch.manual_seed(4)
    t, u = torch.randn(2, 1, LENGTH)
    q, w, v = torch.randn(3, 4, LENGTH)
    factors, square = torch.randn(3, 4).double(), torch.randn(4, 4).double()
    result = torch.zeros(1)
    results = [kernels.norm([t, u], backend=backend)]
    results.append(kernels.norm([t, u], weights=[u, t], backend=backend))
    kernels.flag_nonfinite([t, u.log()], result, backend=backend)
    basis = q / LENGTH**0.5
    results += [result, *kernels.orthogonalize(w, basis, backend=backend)]
    results.append(kernels.row_dots(q, w, backend=backend))
    results.append(kernels.lanczos_step(v, q, w, factors, backend=backend))
    results.append(kernels.gram(v, backend=backend))
    kernels.mix_rows(v, square, backend=backend)
    results += kernels.cross_entropy_hvp(q, w, factors[0].abs(), backend=backend)
    results.append(kernels.cholesky_qr(v, backend=backend))
    return [*results, w, v]


def step(method: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
    """A step of an optimizer, backward pass and all."""
    torch.manual_seed(5)
    x = torch.nn.Parameter(torch.randn(LENGTH))
    target = torch.randn(LENGTH)
    opt = method([x], lr=0.1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (x - target).pow(4).mean()
        loss.backward()
        return loss

    opt.step(closure)
    return [x.detach()]


def everything() -> dict[str, list[Tensor]]:
    result = {f"{each.__name__}": step(each) for each in METHODS}
    for backend in ("native", "reference"):
        result[f"updates, {backend}"] = updates(backend)
        result[f"sums, {backend}"] = sums(backend)
    return result


def assert_parents_results(expected: dict[str, list[Tensor]]) -> None:
    """Fail unless all results equal the parent's, and those of compiled kernels bit for bit."""
    assert _core.is_serial()
    assert torch.get_num_threads() == 1
    for name, tensors in everything().items():
        for result, reference in zip(tensors, expected[name], strict=True):
            if name.endswith("native"):
                assert same_bits(result, reference), name
            else:
                torch.testing.assert_close(result, reference)


def assert_succeeds_in_fork(act: Callable[[], object]) -> None:
    """Call `act` in a forked child; fail if it raises or does not end."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"


class Norms(Dataset[Tensor]):
    """A data set whose items are computed by a kernel."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        signal.alarm(SECONDS)
        tensor = torch.full((2 * LENGTH,), 1.0 + index)
        torch.set_num_threads(2)  # torch itself would hang with them
        norm = kernels.norm([tensor])
        torch.set_num_threads(1)
        return norm


def norm_of(value: float) -> float:
    signal.alarm(SECONDS)
    return kernels.norm([torch.full((2 * LENGTH,), value)]).item()


def main() -> None:
    torch.set_num_threads(2)
    expected = everything()
    assert not _core.is_serial()
    assert_succeeds_in_fork(lambda: assert_parents_results(expected))
    assert_succeeds_in_fork(
        lambda: assert_succeeds_in_fork(lambda: assert_parents_results(expected))
    )
    norms = [kernels.norm([torch.full((2 * LENGTH,), value)]).item() for value in (1.0, 2.0)]
    loader = DataLoader(Norms(), num_workers=1, multiprocessing_context="fork")
    assert [t.item() for t in loader] == norms
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(norm_of, (1.0, 2.0)) == norms
    assert not _core.is_serial()  # the parent goes on with its threads
    assert torch.get_num_threads() == 2
    assert all(map(same_bits, updates("native"), expected["updates, native"]))


def alone() -> None:
    """A process without other threads forks: the child may use as many as it wants."""
    tasks = len(os.listdir("/proc/self/task"))
    assert_succeeds_in_fork(
        lambda: sys.exit("serial") if _core.is_serial() != (tasks > 1) else None
    )


if __name__ == "__main__":
    {"main": main, "alone": alone}[sys.argv[1]]()
