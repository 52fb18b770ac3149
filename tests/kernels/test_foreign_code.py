"""Python code that runs while arguments are read may free what was read before: it is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from eigenfilter import _core, kernels

Free = Callable[[], None]


def lists(count: int) -> list[list[Tensor]]:
    return [[torch.ones(1000) for _ in range(3)] for _ in range(count)]


class Number:
    def __init__(self, free: Free) -> None:
        self.free = free

    def __float__(self) -> float:
        self.free()
        return 0.1


class Asked(Tensor):
    """Runs code when it is asked whether it is lazily negated."""

    free: Free

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if getattr(func, "__name__", "") == "is_neg":
            args[0].__dict__["free"]()
        return super().__torch_function__(func, types, args, kwargs or {})


def make_asked(like: Tensor, free: Free) -> Asked:
    t = like.clone().as_subclass(Asked)
    t.free = free
    return t


class Sharded:
    def __init__(self, free: Free) -> None:
        self.free = free

    @property
    def _local_tensor(self) -> Tensor:
        self.free()
        return torch.ones(1000)


def shrink(t: Tensor) -> Free:
    return lambda: t.untyped_storage().resize_(0)  # type: ignore[return-value]


def replace(t: Tensor) -> Free:
    def free() -> None:
        t.data = t.clone()

    return free


CHANGED = r"{} changed while the arguments were read"


@pytest.mark.parametrize("free", [shrink, replace])
@pytest.mark.parametrize("which", range(3), ids=["params", "grads", "backups"])
def test_by_a_number(which: int, free: Callable[[Tensor], Free]) -> None:
    inputs = lists(3)
    name = ("params", "grads", "backups")[which]
    with pytest.raises(RuntimeError, match=CHANGED.format(rf"{name}\[1\]")):
        kernels.perturb(*inputs, Number(free(inputs[which][1])), backend="native")  # type: ignore[arg-type]
    assert torch.equal(inputs[0][0], torch.ones(1000))


def test_by_a_number_after_a_flag_and_a_scalar() -> None:
    params, grads = lists(2)
    flag, scale = torch.zeros(1), torch.ones(())
    for victim, name in ((flag, "found_inf"), (scale, "lr")):
        options = {"lr": scale, "weight_decay": Number(shrink(victim)), "found_inf": flag}
        with pytest.raises(RuntimeError, match=CHANGED.format(name)):
            kernels.sgd_step(params, grads, backend="native", **options)  # type: ignore[arg-type]
        victim.untyped_storage().resize_(4)
        victim.fill_(0 if victim is flag else 1)
    assert torch.equal(params[0], torch.ones(1000))


@pytest.mark.parametrize(
    "make", [make_asked, lambda t, free: Sharded(free)], ids=["asked", "shard"]
)
def test_by_a_gradient(make: Callable[[Tensor, Free], object]) -> None:
    params, grads, backups = lists(3)
    grads[1] = make(grads[1], shrink(params[0]))  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match=CHANGED.format(r"params\[0\]")):
        _core.perturb(params, grads, backups, 0.1, None, None, True, False, None, None, 1)


def test_a_scalar_that_frees_itself() -> None:
    params, grads = lists(2)
    lr = torch.ones(())
    lr = make_asked(lr, lambda: None)
    lr.free = shrink(lr.as_subclass(Tensor))
    with pytest.raises(RuntimeError, match=CHANGED.format("lr")):
        kernels.sgd_step(params, grads, lr=lr, backend="native")
    assert torch.equal(params[0], torch.ones(1000))


def test_by_the_basis_of_a_projection() -> None:
    w, q = torch.ones(1000), torch.ones(2, 1000)
    sums, norms = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for victim, name, bad in ((w, "w", "basis"), (q, "basis", "norms")):
        basis = make_asked(q, shrink(victim)) if bad == "basis" else q
        result = make_asked(norms, shrink(victim)) if bad == "norms" else norms
        with pytest.raises(RuntimeError, match=CHANGED.format(name)):
            _core.orthogonalize(w, basis, sums, result, 1, 1)
        victim.untyped_storage().resize_(victim.numel() * 4)
        victim.fill_(1)


def test_what_changes_nothing_is_read() -> None:
    params, grads, backups = lists(3)
    grads[1] = make_asked(grads[1], lambda: None)
    kernels.perturb(params, grads, backups, Number(lambda: None), backend="native")  # type: ignore[arg-type]
    kernels.sgd_step(params, grads, lr=np.float32(0.5), backend="native")  # type: ignore[arg-type]
    expected = torch.tensor(1.0) + 0.1 - 0.5
    for p in params:
        torch.testing.assert_close(p, expected.expand(1000))
