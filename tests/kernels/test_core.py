"""`_core` trusts no caller: for any argument it succeeds or raises one clear error."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eigenfilter import _core, kernels

FUZZED = Path(__file__).with_name("fuzzed.py")


def test_no_argument_ends_the_process() -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(FUZZED)],
        env={"PYTHONPATH": str(FUZZED.parent.parent), "OMP_NUM_THREADS": "2"},
        text=True,
        capture_output=True,
    )
    last = process.stdout.strip().splitlines()[-1:]
    assert process.returncode == 0, f"{process.returncode}: {last}\n{process.stderr}"
    assert last == ["all ended 1"]


def test_a_list_that_was_never_made_is_refused() -> None:
    tensor_list = _core.TensorList.__new__(_core.TensorList)  # type: ignore[call-arg]
    for act in (
        lambda: len(tensor_list),
        lambda: tensor_list[0],
        lambda: tensor_list.filled,
        lambda: kernels.norm(tensor_list),
        lambda: _core.check(("params",), (tensor_list,), (True,)),
    ):
        with pytest.raises(TypeError, match="was never initialized"):
            act()


def test_a_getter_may_shrink_the_list_it_is_in() -> None:
    class Shrinking(torch.nn.Parameter):
        @property
        def grad(self) -> Tensor:  # type: ignore[override]
            del params[1:]
            return torch.ones(2)

    params = [Shrinking(torch.zeros(2)) for _ in range(100)]
    before = list(params)
    grads, missing = _core.gradients(params)
    assert len(grads) == len(before)
    assert missing == 0


def test_another_thread_may_empty_a_list_that_is_read() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often, where this one asks torch
    ended = threading.Event()
    lists: list[list[Tensor]] = [[]]
    result: list[float] = []
    messages: set[str] = set()

    def empty() -> None:
        while not ended.is_set():
            lists[0].clear()

    thread = threading.Thread(target=empty)
    thread.start()
    try:
        for _ in range(300):
            lists[0] = [torch.ones(8) for _ in range(200)]
            try:
                result.append(kernels.norm(lists[0]).item())
            except ValueError as error:  # it was empty before it was read
                messages.add(str(error))
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(0 < norm <= 40.1 for norm in result)
    assert messages <= {"no tensors: pass at least one", "tensors is empty"}


@pytest.mark.parametrize("hold", [False, True])
def test_a_tensor_negated_where_it_is_is_noticed(hold: bool) -> None:
    x, g = torch.ones(4), torch.ones(4)
    tensor_list = _core.TensorList([g], hold=hold)
    kernels.sgd_step([x], tensor_list, lr=0.25)
    g.data = torch._neg_view(g.data)
    assert g.tolist() == [-1.0] * 4
    with pytest.raises(TypeError, match=r"^grads\[0\] is lazily negated: pass \.resolve_neg\(\)"):
        kernels.sgd_step([x], tensor_list, lr=0.25)
    assert x.tolist() == [0.75] * 4


def test_inference_tensors_are_changed_in_inference_mode_alone() -> None:
    with torch.inference_mode():
        x, g = torch.ones(4), torch.ones(4)
        kernels.sgd_step([x], [g], lr=0.25)
    assert x.tolist() == [0.75] * 4
    y = torch.ones(4)
    kernels.sgd_step([y], [g], lr=0.25)  # what is only read may be one
    for lists in (([x], [torch.ones(4), x]),):
        with pytest.raises(RuntimeError, match=r"params\[\d\] was made in inference mode"):
            kernels.sgd_step(lists[-1], [g] * len(lists[-1]), lr=0.25)
    assert x.tolist() == [0.75] * 4


def test_what_inference_mode_allowed_is_not_trusted_outside_of_it() -> None:
    with torch.inference_mode():
        x, g = torch.ones(4), torch.ones(4)
        tensor_list = _core.TensorList([x], hold=True, trust=True)
        kernels.norm(tensor_list)
        kernels.sgd_step(tensor_list, [g], lr=0.25)
    with pytest.raises(RuntimeError, match=r"params\[0\] was made in inference mode"):
        kernels.sgd_step(tensor_list, [g], lr=0.25)
    assert x.tolist() == [0.75] * 4


def test_lazy_clones_are_written_apart() -> None:
    x = torch.ones(4)
    clone = torch._lazy_clone(x)
    kernels.sgd_step([clone], [torch.ones(4)], lr=0.25)
    assert clone.tolist() == [0.75] * 4
    assert x.tolist() == [1.0] * 4


def test_empty_vectors_and_tensors() -> None:
    empty = torch.zeros(3, 0)
    assert kernels.gram(empty).tolist() == [[0.0] * 3] * 3
    assert kernels.cholesky_qr(empty.clone()).shape == (3, 3)
    assert kernels.norm([empty]).item() == 0
    kernels.sgd_step([empty], [empty], lr=0.1)


@pytest.mark.parametrize("count", [0, -1, 2**62, 10**30])
def test_counts_that_divide_nothing(count: int) -> None:
    w, q = torch.ones(4, 6), torch.ones(4, 6)
    c, n = torch.zeros(4, 4).double(), torch.zeros(4).double()
    with pytest.raises(ValueError, match=r"must be|times"):
        _core.orthogonalize([w], [q], count, 4, c, n, None, 1, 1)
    with pytest.raises(ValueError, match="rows must be a whole number"):
        _core.gram([w], count, c, None, 1)
    assert (w == 1).all()
