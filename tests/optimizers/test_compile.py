"""Compiled models train as uncompiled ones, and a compiled step does what the step does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import eigenfilter as ef

# The compiler itself reads the grad of tensors that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01}

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Any]] = {
    "SGD": lambda p: ef.SGD(p, **SETTINGS),
    "USAM": lambda p: ef.USAM(p, **SETTINGS, rho=0.15),
    "ASAM": lambda p: ef.SAM(p, **SETTINGS, rho=0.15, adaptive=True),
    "TwoStepUSAM": lambda p: ef.TwoStepUSAM(p, **SETTINGS, rho=0.15),
    "TwoStepUSAM, released": lambda p: ef.TwoStepUSAM(
        p, **SETTINGS, rho=0.15, release_gradients=True
    ),
    "HessianUSAM": lambda p: ef.HessianUSAM(p, **SETTINGS, rho=0.02),
    "AdamW": lambda p: ef.AdamW(p, lr=0.03, method="sam", rho=0.15),
    "SharpnessAware": lambda p: ef.SharpnessAware(torch.optim.AdamW(p, lr=0.03), "sam", 0.15),
}


def train(
    make: Callable[[Iterable[nn.Parameter]], Any], compiled: str, backend: str
) -> list[Tensor]:
    """Parameters after some steps of a small network, in float64."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs = torch.randn(10, 6, dtype=torch.float64)
    targets = inputs.sin().sum(dim=1, keepdim=True)
    opt = make(model.parameters())
    function = torch.compile(model, backend=backend) if compiled == "model" else model

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (function(inputs) - targets).square().mean()
        loss.backward()
        return loss

    def step() -> None:
        opt.step(closure)

    if compiled == "step":
        step = torch.compile(step, backend=backend)
    for _ in range(4):
        step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*record_function.*")
@pytest.mark.parametrize("compiled", ["model", "step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_training_is_training(name: str, compiled: str) -> None:
    expected = train(OPTIMIZERS[name], "nothing", "eager")
    torch.compiler.reset()
    result = train(OPTIMIZERS[name], compiled, "aot_eager")
    bound = 1e-8 if name == "HessianUSAM" else 1e-14  # finite differences blow roundings up
    assert max(float((a - b).abs().max()) for a, b in zip(result, expected, strict=True)) <= bound


def test_with_the_default_compiler() -> None:
    expected = train(OPTIMIZERS["USAM"], "nothing", "eager")
    torch.compiler.reset()
    result = train(OPTIMIZERS["USAM"], "model", "inductor")
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def problem() -> tuple[nn.Sequential, Callable[[Any], Callable[[], Tensor]]]:
    """A network, and a function from its optimizer to a closure."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs = torch.randn(10, 6, dtype=torch.float64)
    targets = inputs.sin().sum(dim=1, keepdim=True)

    def closure_of(opt: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        return closure

    return model, closure_of


def after(make: Any, step_of: Callable[[Any, Callable[[], Tensor]], Callable[[], Any]]) -> Any:
    """Parameters after four steps."""
    model, closure_of = problem()
    opt = make(model.parameters())
    step = step_of(opt, closure_of(opt))
    for _ in range(4):
        step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_explicit_step(name: str) -> None:
    """`ascend` and `step` break the graph and run as they are; what is between is compiled."""

    def explicit(opt: Any, closure: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            with opt.evaluation():
                closure()
            while opt.ascend():
                with opt.evaluation():
                    closure()
            opt.step()

        return step

    expected = after(OPTIMIZERS[name], explicit)
    torch.compiler.reset()
    result = after(
        OPTIMIZERS[name],
        lambda opt, closure: torch.compile(explicit(opt, closure), backend="aot_eager"),
    )
    bound = 1e-8 if name == "HessianUSAM" else 1e-14
    assert max(float((a - b).abs().max()) for a, b in zip(result, expected, strict=True)) <= bound


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_compiled_method_is_the_method(name: str) -> None:
    """`torch.compile(opt.step)`, as for torch's own optimizers, has the same bits."""
    expected = after(OPTIMIZERS[name], lambda opt, closure: lambda: opt.step(closure))

    def compiled(opt: Any, closure: Callable[[], Tensor]) -> Callable[[], Any]:
        step = torch.compile(opt.step, backend="aot_eager")
        return lambda: step(closure)

    torch.compiler.reset()
    result = after(OPTIMIZERS[name], compiled)
    assert all(map(torch.equal, result, expected))


def test_a_step_is_no_full_graph() -> None:
    """What torch says of its own optimizers' hooks, too: they cannot be in a graph."""
    torch.compiler.reset()
    model, closure_of = problem()
    opt = ef.USAM(model.parameters(), **SETTINGS, rho=0.15)
    closure = closure_of(opt)
    step = torch.compile(lambda: opt.step(closure), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step()
    opt.step(closure)  # nothing has happened to the optimizer


def test_the_model_is_one_graph_for_all_phases() -> None:
    """Perturbing parameters in place recompiles nothing."""
    torch.compiler.reset()
    model, _ = problem()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    opt = ef.TwoStepUSAM(model.parameters(), **SETTINGS, rho=0.15)
    inputs = torch.ones(10, 6, dtype=torch.float64)

    def closure() -> Tensor:
        opt.zero_grad()
        loss: Tensor = compiled(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    assert counter.frame_count == 1


def with_compiled_autograd(opt: Any, closure: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            if not opt.release_gradients:
                closure()  # gradients that the closure of the step has to clear
            opt.step(closure)

    return step


@pytest.mark.parametrize("name", ["USAM", "ASAM", "AdamW"])
def test_compiled_autograd(name: str) -> None:
    """Backward itself is compiled, with the hooks that check a closure."""
    expected = after(OPTIMIZERS[name], lambda opt, closure: lambda: opt.step(closure))
    torch.compiler.reset()
    result = after(OPTIMIZERS[name], with_compiled_autograd)
    assert max(float((a - b).abs().max()) for a, b in zip(result, expected, strict=True)) <= 1e-14


def test_compiled_autograd_releases_no_gradient() -> None:
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="leave compiled autograd off"):
        after(lambda p: ef.SGD(p, **SETTINGS, release_gradients=True), with_compiled_autograd)


def test_every_row_of_the_table_has_its_test() -> None:
    page = Path(__file__).parents[2] / "docs" / "optimizers.md"
    rows = re.findall(r"\| `(test_\w+\.py)::(test_\w+)` \|", page.read_text())
    assert len(rows) == 30
    for file, name in rows:
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(), name
