"""Lightning's manual optimization and Fabric: the explicit form through their wrappers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef

pytest.importorskip("lightning.pytorch")

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision

from integrations.lightning_problem import (
    Batch,
    Problem,
    batches,
    by_hand,
    distance,
    double,
    loader,
    trainer_of,
    windows,
)
from integrations.test_lightning_precision import fp16, half

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]

usam = functools.partial(ef.USAM, lr=0.1, momentum=0.9, rho=0.1)
METHODS: dict[str, Any] = {
    "usam": usam,
    "hessian_usam": functools.partial(ef.HessianUSAM, lr=0.1, rho=0.1, fd_step=1e-5),
    "torch's adamw": lambda params: ef.SharpnessAware(torch.optim.AdamW(params, lr=0.1), "sam"),
}


def clip(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 0.1)


# Manual optimization.


class Manual(Problem):
    """The explicit form in training_step, with the window collected by the module."""

    accumulation = 4

    def __init__(self, make_optimizer: Any, clips: bool = False, scaled: bool = False) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False
        self.clips = clips
        self.scaled = scaled
        self.window: list[tuple[int, Batch]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.window.append((batch_idx, batch))
        if len(self.window) < self.accumulation and batch_idx + 1 < len(batches()):
            return
        opt: Any = self.optimizers()
        scaler = self.trainer.precision_plugin.scaler if self.scaled else None
        opt.zero_grad()
        self.evaluate(opt, first=True)
        while opt.ascend(scaler):
            with ef.freeze_running_stats(self):
                self.evaluate(opt, first=False)
        if self.clips:
            opt.clip_grad_norm_(0.1, scaler)
        opt.step()
        self.window.clear()

    def evaluate(self, opt: Any, first: bool) -> None:
        with opt.evaluation():
            for i, batch in self.window:
                if first:
                    torch.manual_seed(i)
                self.manual_backward(self.loss(batch) / self.accumulation)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", ["usam", "torch's adamw"])
def test_manual_optimization(method: str, accumulation: int, clips: bool) -> None:
    """The wrapper that self.optimizers() returns has ascend(), and a step counts once."""
    module, other = Manual(METHODS[method], clips), double(Problem(METHODS[method]))
    module.accumulation = accumulation
    trainer = trainer_of()
    trainer.fit(module, loader())
    by_hand(other, [accumulation] * 2, clip if clips else lambda params: None)
    assert distance(module, other) < (1e-6 if clips else 1e-12)  # torch adds 1e-6 to the norm
    assert trainer.global_step == 2 * len(windows(batches(), accumulation))


@pytest.mark.parametrize("clips", [False, True])
def test_manual_optimization_with_a_scaler(clips: bool) -> None:
    module, other = Manual(usam, clips, scaled=True), Problem(usam)
    trainer_of(plugins=[fp16()]).fit(module, loader())
    options = {"epoch": batches(torch.float32), "scaler": fp16().scaler, "context": half}
    by_hand(other, [4, 4], clip if clips else lambda params: None, **options)
    assert distance(module, other) < 1e-6


def test_a_manual_step_that_forgets_the_ascents() -> None:
    class Forgets(Manual):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            opt: Any = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            opt.step()

    with pytest.raises(RuntimeError, match=r"while opt.ascend\(\): closure\(\)"):
        trainer_of().fit(Forgets(usam), loader())


def test_two_optimizers() -> None:
    """One of this library and one of torch, in manual optimization, as a GAN has them."""

    class Two(Problem):
        def __init__(self) -> None:
            super().__init__(usam, dropout=0.0)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            first, second = self.net[0].parameters(), self.net[4].parameters()
            return usam(first), torch.optim.SGD(second, lr=0.1)

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            ours, torchs = self.optimizers()
            ours.zero_grad()
            torchs.zero_grad()
            self.manual_backward(self.loss(batch))
            torchs.step()
            ours.zero_grad()
            self.manual_backward(self.loss(batch))
            while ours.ascend():
                with ef.freeze_running_stats(self):
                    self.manual_backward(self.loss(batch))
            ours.step()

    module = Two()
    other = double(module)
    trainer = trainer_of(max_epochs=1)
    trainer.fit(module, loader())
    ours, torchs = other.configure_optimizers()
    for batch in batches():
        for opt in (torchs, ours):
            ours.zero_grad()
            torchs.zero_grad()
            other.loss(batch).backward()
            if opt is ours:
                g = [p.grad.clone() for p in other.net[0].parameters()]
                for p, d in zip(other.net[0].parameters(), g, strict=True):
                    p.data.add_(d, alpha=0.1)
                ours.zero_grad()
                with ef.freeze_running_stats(other):
                    other.loss(batch).backward()
                for p, d in zip(other.net[0].parameters(), g, strict=True):
                    p.data.sub_(d, alpha=0.1)
                for p in other.net[0].parameters():
                    state = ours.state[p]
                    m = state.get("m", torch.zeros_like(p))
                    state["m"] = 0.9 * m + p.grad
                    p.data.sub_(state["m"], alpha=0.1)
            else:
                torchs.step()
    assert distance(module, other) < 1e-12
    assert trainer.global_step == 20


# Fabric.


@pytest.fixture
def doubles() -> Iterator[None]:
    """Fabric converts what a model returns to the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fabric_loop(
    fabric: Fabric, model: Any, opt: Any, accumulation: int, clips: bool, scaler: Any = None
) -> None:
    """Two epochs in the explicit form; gradients are reduced once in every pass."""
    dtype = torch.get_default_dtype()
    for _ in range(2):
        for window in windows(batches(dtype), accumulation):

            def evaluate(passes: int, window: Any = window) -> None:
                with opt.evaluation():
                    for n, (i, (inputs, targets)) in enumerate(window, 1):
                        if passes == 0 or (passes == 1 and opt.perturbation.repeats_random_numbers):
                            torch.manual_seed(i)
                        with fabric.no_backward_sync(model, enabled=n < len(window)):
                            loss = nn.functional.mse_loss(model(inputs), targets)
                            fabric.backward(loss / accumulation)

            opt.zero_grad()
            evaluate(0)
            passes = 0
            while opt.ascend(scaler):
                passes += 1
                with ef.freeze_running_stats(model):
                    evaluate(passes)
            if clips and scaler is None:
                fabric.clip_gradients(model, opt, max_norm=0.1)
            elif clips:
                opt.clip_grad_norm_(0.1, scaler)
            opt.step()


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_fabric(method: str, accumulation: int, clips: bool) -> None:
    module, other = (double(Problem(METHODS[method])) for _ in range(2))
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, opt = fabric.setup(module.net, METHODS[method](module.net.parameters()))
    fabric_loop(fabric, model, opt, accumulation, clips)
    by_hand(other, [accumulation] * 2, clip if clips else lambda params: None)
    assert distance(module, other) < 1e-12


@pytest.mark.usefixtures("doubles")
def test_fabric_with_a_closure() -> None:
    module, other = (double(Problem(usam, dropout=0.0)) for _ in range(2))
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, opt = fabric.setup(module.net, usam(module.net.parameters()))
    for _ in range(2):
        for inputs, targets in batches():

            def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                opt.zero_grad()
                with ef.freeze_running_stats(model) if opt.perturbed else nullcontext():
                    loss = nn.functional.mse_loss(model(inputs), targets)
                    fabric.backward(loss)
                return loss

            opt.step(closure)
    by_hand(other, [1, 1])
    assert distance(module, other) < 1e-12


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_fabric_in_half_precision(precision: Any, clips: bool) -> None:
    module, other = Problem(usam), Problem(usam)
    options: dict[str, Any] = {"precision": precision}
    scaler, expected = None, None
    if precision == "16-mixed":  # which Fabric replaces by bfloat16 on the CPU
        scaler, expected = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    model, opt = fabric.setup(module.net, usam(module.net.parameters()))
    fabric_loop(fabric, model, opt, 4, clips, scaler)

    dtype = {"16-mixed": torch.float16}.get(precision, torch.bfloat16)
    if precision == "bf16-true":
        other.to(dtype)

    def loss(batch: Batch) -> Tensor:
        """Fabric converts what goes in and what comes out, and the loss is outside of autocast."""
        with torch.autocast("cpu", dtype, enabled="mixed" in precision):
            outputs = other.net(batch[0].to(dtype))
        return nn.functional.mse_loss(outputs.float(), batch[1])

    other.loss = loss  # type: ignore[method-assign]
    by_hand(
        other,
        [4, 4],
        clip if clips else lambda params: None,
        epoch=batches(torch.float32),
        scaler=expected,
    )
    assert distance(module, other) < 1e-6


def test_a_checkpoint_of_fabric(tmp_path: Any) -> None:
    def train(epochs: int, path: Any = None) -> nn.Module:
        module = double(Problem(usam, dropout=0.0))
        fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
        model, opt = fabric.setup(module.net, usam(module.net.parameters()))
        if path is not None:
            fabric.load(path, {"model": model, "opt": opt})
        for _ in range(epochs):
            fabric_loop(fabric, model, opt, 4, True)
        fabric.save(tmp_path / "fabric.ckpt", {"model": model, "opt": opt})
        return copy.deepcopy(module)

    whole = train(2)
    train(1)
    assert distance(train(1, tmp_path / "fabric.ckpt"), whole) == 0.0
