"""Hyperparameters as numbers and as tensors, and the flags that a scaler sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import ALPHA, SCALE, UPDATES, Arena, KernelBackend, Update, same_bits
from eigenfilter import _core, kernels

SIZES = (5, 64, 1000)

every_update = pytest.mark.parametrize("update", UPDATES, ids=str)

# Every hyperparameter of every kernel.
HYPERPARAMETERS = {f"{u.kernel}-{name}": (u, name) for u in UPDATES for name in u.hyperparameters}


def updated(
    update: Update,
    backend: KernelBackend,
    dtype: torch.dtype,
    wrap: Callable[[float], Any] = float,
    divisor: float = 1.0,
    **flags: Any,
) -> Tensor:
    """What the update writes, hyperparameters being wrapped and gradients divided before."""
    torch.manual_seed(8)
    arena = update.arena(dtype, SIZES, backend.device)
    for i, role in enumerate(update.lists):
        if role in ("grads", "base_grads"):
            arena.memory[i] /= divisor
    options = {name: wrap(update.options[name]) for name in update.hyperparameters}
    update(arena.lists, **options, **flags, backend=backend.name)
    return torch.cat([arena.values(update.lists.index(role)) for role in update.writes])


def perturb(backend: KernelBackend, dtype: torch.dtype, alpha: Any, **flags: Any) -> Tensor:
    torch.manual_seed(9)
    arena = Arena(dtype, 3, SIZES, backend.device)
    arena.fill(0, 1)
    kernels.perturb(*arena.lists, alpha, **flags, backend=backend.name)
    return arena.values(0)


def rounded(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@every_update
def test_float64_tensors_equal_floats(
    backend: KernelBackend, dtype: torch.dtype, update: Update, shape: tuple[int, ...]
) -> None:
    def wrap(value: float) -> Tensor:
        return torch.full(shape, value, dtype=torch.float64, device=backend.device)

    assert same_bits(updated(update, backend, dtype, wrap), updated(update, backend, dtype))


@every_update
def test_float32_tensors_equal_floats_of_their_value(
    backend: KernelBackend, dtype: torch.dtype, update: Update
) -> None:
    def wrap(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=backend.device)

    assert same_bits(
        updated(update, backend, dtype, wrap), updated(update, backend, dtype, rounded)
    )


def test_whole_numbers_are_numbers(backend: KernelBackend, dtype: torch.dtype) -> None:
    assert same_bits(perturb(backend, dtype, 2), perturb(backend, dtype, 2.0))
    adamw = UPDATES[-1]
    assert type(adamw.options["step"]) is int
    assert same_bits(updated(adamw, backend, dtype, lambda n: n), updated(adamw, backend, dtype))


def test_parameters_that_require_grad_are_read_as_scalars(backend: KernelBackend) -> None:
    learned = torch.tensor(ALPHA, dtype=torch.float64, requires_grad=True, device=backend.device)
    with torch.no_grad():
        result = perturb(backend, torch.float32, learned)
    assert same_bits(result, perturb(backend, torch.float32, ALPHA))


@pytest.mark.gpu
@pytest.mark.parametrize("backend_name", ["native", "triton", "reference"])
@every_update
def test_scalars_on_the_host_serve_tensors_on_a_gpu(
    backend_name: str, dtype: torch.dtype, update: Update
) -> None:
    if backend_name == "native" and not _core.cuda_compiled:
        pytest.skip("built without CUDA kernels")
    backend = KernelBackend(backend_name, "cuda")
    on_host = updated(update, backend, dtype, lambda v: torch.tensor(v, dtype=torch.float64))
    assert same_bits(on_host, updated(update, backend, dtype))


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@every_update
def test_a_scale_divides_the_gradients(
    backend: KernelBackend, dtype: torch.dtype, update: Update, shape: tuple[int, ...]
) -> None:
    scale = torch.full(shape, 4.0, device=backend.device)
    divided = updated(update, backend, dtype, divisor=4.0)
    assert same_bits(updated(update, backend, dtype, grad_scale=scale), divided)
    assert not same_bits(updated(update, backend, dtype), divided)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@every_update
def test_a_flag_of_either_shape_stops_the_update(
    backend: KernelBackend, dtype: torch.dtype, update: Update, shape: tuple[int, ...]
) -> None:
    go, stop = (torch.full(shape, value, device=backend.device) for value in (0.0, 1.0))
    perturbed = updated(update, backend, dtype, found_inf=go)
    assert same_bits(perturbed, updated(update, backend, dtype))
    stopped = updated(update, backend, dtype, found_inf=stop)
    assert not same_bits(stopped, perturbed)


BAD = {
    "int tensor": torch.tensor(1),
    "bfloat16 tensor": torch.tensor(0.1, dtype=torch.bfloat16),
    "complex tensor": torch.tensor(0.1j),
    "two elements": torch.tensor([0.1, 0.2]),
    "no element": torch.zeros(0),
}


def assert_refused(update: Update, error: type[Exception], match: str, **options: Any) -> None:
    """Fail unless the update is refused and leaves everything."""
    lists = [[torch.ones(4)] for _ in update.lists]
    with pytest.raises(error, match=match):
        update(lists, **options)
    assert all(torch.equal(t, torch.ones(4)) for (t,) in lists)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", HYPERPARAMETERS)
def test_a_hyperparameter_of_another_kind_is_named(which: str, bad: str) -> None:
    update, name = HYPERPARAMETERS[which]
    message = rf"{name} must be a number or a one-element float32 or"
    assert_refused(update, TypeError, message, **{name: BAD[bad]})


@pytest.mark.parametrize("bad", ["0.1", None, [0.1]], ids=repr)
@pytest.mark.parametrize("which", HYPERPARAMETERS)
def test_a_hyperparameter_of_another_type_is_named(which: str, bad: object) -> None:
    update, name = HYPERPARAMETERS[which]
    if name == "rounding_seed" and bad is None:
        pytest.skip("None is a choice")
    kind = "None" if bad is None else f"a {type(bad).__name__}"
    message = rf"{name} must be a number or a one-element tensor, and is {kind}$"
    assert_refused(update, TypeError, message, **{name: bad})


@pytest.mark.parametrize(
    "flag",
    [
        torch.zeros((), dtype=torch.float64),
        torch.zeros((), dtype=torch.int32),
        torch.zeros(2),
        torch.zeros(0),
        torch.zeros((), dtype=torch.bool),
        torch.zeros((), device="meta"),
    ],
    ids=str,
)
def test_found_inf_of_another_kind(flag: Tensor) -> None:
    for update in UPDATES:
        assert_refused(update, (ValueError, TypeError), "found_inf", found_inf=flag)
    with pytest.raises((ValueError, TypeError), match="found_inf"):
        kernels.flag_nonfinite([torch.ones(4)], flag)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros((), dtype=torch.int64),
        torch.zeros(2),
        torch.zeros((), dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_out_of_another_kind(out: Tensor) -> None:
    size = 64 if out.dtype == torch.int64 else 32
    message = f"out must be a dense float{size} tensor of 1 element on cpu"
    with pytest.raises(ValueError, match=message):
        kernels.norm([torch.ones(3)], out=out)
    assert (out == 0).all()


def test_a_norm_of_float64_needs_as_much() -> None:
    for tensors in ([torch.ones(3).double()], [torch.ones(3), torch.ones(3).double()]):
        out = torch.zeros(())
        with pytest.raises(ValueError, match="out must be a dense float64 tensor of 1 element"):
            kernels.norm(tensors, out=out)
        assert out == 0


def test_scale_is_not_one_by_accident(backend: KernelBackend) -> None:
    scale = torch.tensor(SCALE, device=backend.device)
    t = torch.ones(16, device=backend.device)
    norm = kernels.norm([t], grad_scale=scale, backend=backend.name)
    assert norm.item() == pytest.approx(4 / SCALE, rel=1e-6)
