"""The optimizers on a GPU: the definition's steps, on any stream, without waiting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.amp import GradScaler

import eigenfilter as ef
from cases import RHO, same_bits
from optimizers.problems import SETTINGS, Exact, distance, parameters, sign_of, snapshot
from tolerances import RUNS

pytestmark = pytest.mark.gpu

HEAVY = SETTINGS["heavy ball"]
BACKENDS = [None, "triton", "reference"]


def on_gpu(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().cuda()) for p in parameters(dtype)]


def evaluate(params: list, sign: float = 1.0, scale: float = 1.0) -> None:
    """Leave the gradient of a separable function; nothing here waits for the device."""
    for p in params:
        p.grad = (sign * scale) * (p.detach() * 1.3 - 0.7)


def take_step(opt: ef.USAM, params: list, sign: float = 1.0) -> None:
    evaluate(params, sign)
    while opt.ascend():
        evaluate(params, sign)
    opt.step()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Operations that wait for the device raise; torch warns that it does not know them all."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Separable(Exact):
    """The function of `evaluate`."""

    def gradient(self, points: list) -> list:
        return [1.3 * y - 0.7 for y in points]


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps_are_the_definitions(
    dtype: torch.dtype, settings: dict, backend_name: str | None
) -> None:
    params = on_gpu(dtype)
    opt = ef.USAM(params, **settings, rho=RHO, backend=backend_name)
    exact = Separable(params, settings)
    for _ in range(30):
        take_step(opt, params, sign_of(settings))
        exact.step()
    assert distance(params, exact.x) <= 4 * RUNS[dtype]


@pytest.mark.parametrize("backend_name", BACKENDS[:2])
def test_the_cpus_bits(dtype: torch.dtype, backend_name: str | None) -> None:
    params, twins = on_gpu(dtype), parameters(dtype)
    opt, other = (
        ef.USAM(params, **HEAVY, rho=RHO, backend=backend_name),
        ef.USAM(twins, **HEAVY, rho=RHO),
    )
    for step in (opt.ascend, opt.step):
        evaluate(twins)
        for p, q in zip(params, twins, strict=True):
            p.grad = q.grad.cuda()
        step()
        other.ascend() if other.phase == "ascent" else other.step()
    assert all(same_bits(p.cpu(), q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("backend_name", BACKENDS[:2])
def test_no_step_waits_for_the_device(backend_name: str | None) -> None:
    params = on_gpu(torch.float32)
    lr, rho = torch.full((), 0.1, device="cuda"), torch.full((), RHO, device="cuda")
    opt = ef.USAM(params, lr=lr, momentum=0.9, rho=rho, skip_nonfinite=True, backend=backend_name)
    take_step(opt, params)  # kernels are compiled and loaded
    with waiting_is_an_error():
        for _ in range(3):
            take_step(opt, params)
    assert opt.skipped == 0


def test_a_skipped_step_leaves_every_bit() -> None:
    params = on_gpu(torch.float32)
    opt = ef.USAM(params, **HEAVY, rho=RHO)
    scaler = GradScaler("cuda", init_scale=1024.0)
    before = snapshot(params)
    evaluate(params, scale=1024.0)
    params[-1].grad[5] = torch.inf
    assert scaler.scale(torch.ones((), device="cuda")).item() == 1024.0
    opt.ascend(grad_scaler=scaler)
    evaluate(params, scale=1024.0)
    scaler.step(opt)
    assert opt.skipped == 1
    assert all(map(same_bits, params, before))


def test_the_current_stream_is_used() -> None:
    """Gradients are written late on a side stream: a step elsewhere would read them too early."""
    params = on_gpu(torch.float32)
    opt, exact = ef.USAM(params, **HEAVY, rho=RHO), Separable(params, HEAVY)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            for step in (opt.ascend, opt.step):
                torch.cuda._sleep(20_000_000)
                evaluate(params)
                step()
            exact.step()
    torch.cuda.synchronize()
    assert distance(params, exact.x) <= 4 * RUNS[torch.float32]


def following_lr(params: list, backend: str | None) -> ef.USAM:
    """rho is proportional to an lr on the device, which changes between replays."""
    lr = torch.full((), 0.05, device="cuda")
    opt = ef.USAM(params, **HEAVY | {"lr": lr}, rho=RHO, backend=backend)
    ef.schedulers.RhoScheduler(opt, "lr")
    return opt


CAPTURED = {
    "sgd": lambda params, backend: ef.SGD(params, **HEAVY, backend=backend),
    "usam": lambda params, backend: ef.USAM(params, **HEAVY, rho=RHO, backend=backend),
    "sam": lambda params, backend: ef.SAM(params, **HEAVY, rho=RHO, backend=backend),
    "two-step": lambda params, backend: ef.TwoStepUSAM(params, **HEAVY, rho=RHO, backend=backend),
    "msam": lambda params, backend: ef.MSAM(params, **HEAVY, rho=RHO, backend=backend),
    "adamw": lambda params, backend: ef.AdamW(
        params, lr=torch.full((), 0.05, device="cuda"), rho=RHO, backend=backend
    ),
    "rho follows lr": following_lr,
}


@pytest.mark.parametrize("backend_name", BACKENDS[:2])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_step_is_the_step(name: str, backend_name: str | None) -> None:
    """Also after a scheduler has changed the lr, where that is a tensor on the device."""
    expected, params = on_gpu(torch.float32), on_gpu(torch.float32)
    other, opt = CAPTURED[name](expected, backend_name), CAPTURED[name](params, backend_name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # state and backups are allocated, kernels loaded
            take_step(opt, params)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take_step(opt, params)
    for _ in range(3):
        take_step(other, expected)
    for _ in range(4):  # the capture itself steps nowhere
        for group in (*opt.param_groups, *other.param_groups):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].mul_(0.9)
        graph.replay()
        take_step(other, expected)
    assert all(map(same_bits, params, expected))
