"""The callback of Lightning against loops written out in torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from pages import ROOT, run_page

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from eigenfilter.integrations.lightning import SharpnessAwareCallback
from integrations.lightning_problem import (
    Problem,
    batches,
    by_hand,
    distance,
    double,
    loader,
    trainer_of,
    windows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]

METHODS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": functools.partial(ef.SGD, lr=0.1, momentum=0.9),
    "usam": functools.partial(ef.USAM, lr=0.1, momentum=0.9, rho=0.1),
    "sam": functools.partial(ef.SAM, lr=0.1, rho=0.1),
    "two_step_usam": functools.partial(ef.TwoStepUSAM, lr=0.1, rho=0.1),
    "hessian_usam": functools.partial(ef.HessianUSAM, lr=0.1, rho=0.1, fd_step=1e-5),
    "hessian_usam, autograd": functools.partial(ef.HessianUSAM, lr=0.1, rho=0.1, hvp="autograd"),
    "adamw": functools.partial(ef.AdamW, lr=0.1, method="sam", rho=0.1),
    "torch's adamw": lambda params: ef.SharpnessAware(
        torch.optim.AdamW(params, lr=0.1), "sam", rho=0.1
    ),
}
usam = METHODS["usam"]

CLIPS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "not clipped": ({}, lambda params: None),
    "norm": (
        {"gradient_clip_val": 0.1},
        lambda params: nn.utils.clip_grad_norm_(params, 0.1),
    ),
    "value": (
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        lambda params: nn.utils.clip_grad_value_(params, 0.02),
    ),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_weights_and_running_statistics(method: str, accumulation: int, clip: str) -> None:
    module = Problem(METHODS[method])
    other = double(module)
    start = double(module)
    options, clip_ = CLIPS[clip]
    trainer = trainer_of(accumulate_grad_batches=accumulation, **options)
    trainer.fit(module, loader())
    by_hand(other, [accumulation] * 2, clip_)
    assert distance(other, start) > 0.01
    assert distance(module, other) < 1e-12
    assert trainer.global_step == 2 * len(windows(batches(), accumulation))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clips", [False, True])
def test_usam_by_its_formula(accumulation: int, clips: bool) -> None:
    """x <- x - lr m, m <- 0.9 m + clip(grad f(x + rho grad f(x))), of plain tensors."""
    module = Problem(usam, dropout=0.0)
    other = double(module)
    names = [name for name, _ in other.named_parameters()]

    def gradient(x: list[Tensor], window: Any) -> list[Tensor]:
        x = [t.detach().requires_grad_() for t in x]
        buffers = {k: b.clone() for k, b in other.named_buffers()}
        total = torch.zeros((), dtype=torch.float64)
        for _, (inputs, targets) in window:
            state = {k.removeprefix("net."): v for k, v in zip(names, x, strict=True)}
            state |= {k.removeprefix("net."): v for k, v in buffers.items()}
            outputs = torch.func.functional_call(other.net, state, (inputs,))
            total = total + nn.functional.mse_loss(outputs, targets) / accumulation
        return list(torch.autograd.grad(total, x))

    x = [p.detach().clone() for p in other.parameters()]
    m = [torch.zeros_like(t) for t in x]
    for _ in range(2):
        for window in windows(batches(), accumulation):
            g = gradient(x, window)
            d = gradient([t + 0.1 * s for t, s in zip(x, g, strict=True)], window)
            norm = torch.stack([t.square().sum() for t in d]).sum().sqrt()
            factor = float((0.1 / norm).clamp(max=1.0)) if clips else 1.0
            m = [0.9 * a + factor * t for a, t in zip(m, d, strict=True)]
            x = [t - 0.1 * a for t, a in zip(x, m, strict=True)]
    options = {"gradient_clip_val": 0.1} if clips else {}
    trainer_of(accumulate_grad_batches=accumulation, **options).fit(module, loader())
    for p, t in zip(module.parameters(), x, strict=True):
        # torch's clip_grad_norm_ adds 1e-6 to the norm
        torch.testing.assert_close(p.detach(), t, rtol=0, atol=1e-6 if clips else 1e-12)


def test_an_accumulation_that_changes_and_fewer_batches() -> None:
    module = Problem(usam)
    other = double(module)
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3, 2: 5})
    trainer = trainer_of(scheduler, max_epochs=3, limit_train_batches=7, gradient_clip_val=0.1)
    trainer.fit(module, loader())
    by_hand(other, [1, 3, 5], CLIPS["norm"][1], batches()[:7])
    assert distance(module, other) < 1e-12
    assert trainer.global_step == 7 + 3 + 2


def test_steps_without_an_ascent() -> None:
    """Where rho is 0 nothing is kept and a step costs one evaluation."""
    module = Problem(functools.partial(ef.USAM, lr=0.1, momentum=0.9, rho=0.0))
    other = double(module)
    calls = []
    module.net.register_forward_hook(lambda *_: calls.append(None))
    trainer_of(accumulate_grad_batches=4, **CLIPS["norm"][0]).fit(module, loader())
    assert len(calls) == 20
    by_hand(other, [4, 4], CLIPS["norm"][1])
    assert distance(module, other) < 1e-12


def test_validation_in_the_middle_of_a_window() -> None:
    modules = [Problem(usam) for _ in range(2)]
    trainer_of(accumulate_grad_batches=4).fit(modules[0], loader())
    seen = []

    class Sees(Problem):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert not self.optimizers().perturbed
            seen.append(self.trainer.fit_loop.epoch_loop.batch_idx)
            super().validation_step(batch, batch_idx)

    module = Sees(usam)
    trainer = trainer_of(accumulate_grad_batches=4, val_check_interval=3, num_sanity_val_steps=1)
    trainer.fit(module, loader(), loader())
    assert {2, 5} <= set(seen)  # in the first window, and in the second
    assert distance(module, modules[0]) == 0.0


@pytest.mark.slow
def test_the_page(tmp_path: Path) -> None:
    printed = run_page(ROOT / "docs" / "integrations" / "lightning.md", tmp_path)
    steps = re.findall(r"^steps (\d+)$", printed, re.MULTILINE)
    assert steps == ["12", "10"]


def test_without_the_callback() -> None:
    """Lightning's own loop is refused with accumulation, instead of training something else."""
    trainer = trainer_of(accumulate_grad_batches=4)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, SharpnessAwareCallback)]
    with pytest.raises(RuntimeError, match="as in gradient accumulation"):
        trainer.fit(Problem(usam), loader())
