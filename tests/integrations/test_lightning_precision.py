"""The callback of Lightning in every precision, against loops written out in torch."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef

pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from integrations.lightning_problem import (
    Problem,
    batches,
    by_hand,
    dataset,
    distance,
    loader,
    trainer_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]

usam = functools.partial(ef.USAM, lr=0.1, momentum=0.9, rho=0.1)
adamw = functools.partial(ef.AdamW, lr=0.1, method="sam", rho=0.1)


def wrapped(params: Any) -> ef.SharpnessAware:
    return ef.SharpnessAware(torch.optim.SGD(params, lr=0.1), rho=0.1)


def clip(params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 0.1)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("make", [usam, adamw, wrapped], ids=["usam", "adamw", "wrapped"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_without_a_scaler(precision: str, make: Any, clips: bool) -> None:
    module = Problem(make)
    other = copy.deepcopy(module)
    options = {"gradient_clip_val": 0.1} if clips else {}
    trainer_of(precision=precision, accumulate_grad_batches=4, **options).fit(module, loader())
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    context = functools.partial(
        torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16-mixed"
    )
    by_hand(
        other.to(dtype),
        [4, 4],
        clip if clips else lambda params: None,
        epoch=batches(dtype),
        context=context,
    )
    assert module.net[0].weight.dtype == dtype
    assert distance(module, other) == 0.0


def fp16(scale: float = 2.0**10) -> MixedPrecision:
    """What precision="16-mixed" is on a GPU; on the CPU Lightning replaces that by bfloat16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return MixedPrecision("16-mixed", "cpu", scaler)


half = functools.partial(torch.autocast, "cpu", torch.float16)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("make", [usam, adamw, wrapped], ids=["usam", "adamw", "wrapped"])
def test_sixteen_bits_with_a_scaler(make: Any, accumulation: int, clips: bool) -> None:
    """A scale that is too large at first: some steps are skipped."""
    module = Problem(make)
    other = copy.deepcopy(module)
    options = {"gradient_clip_val": 0.1} if clips else {}
    plugin, scaler = fp16(2.0**18), fp16(2.0**18).scaler
    trainer = trainer_of(plugins=[plugin], accumulate_grad_batches=accumulation, **options)
    norms: list[float] = []
    module.on_before_optimizer_step = lambda optimizer: norms.append(norm_of(module))
    trainer.fit(module, loader())
    expected: list[float] = []

    def clipping(params: list[nn.Parameter]) -> None:
        expected.append(norm_of(other))
        if clips:
            clip(params)

    by_hand(
        other, [accumulation] * 2, clipping, batches(torch.float32), scaler=scaler, context=half
    )
    assert plugin.scaler.get_scale() == scaler.get_scale()
    assert 0 < trainer.optimizers[0].skipped < trainer.global_step
    assert torch.tensor(norms).isfinite().any()
    torch.testing.assert_close(norms, expected, rtol=0, atol=0, equal_nan=True)
    assert distance(module, other) == 0.0


def norm_of(module: nn.Module) -> float:
    """The norm of the gradient, which is unscaled."""
    return float(torch.stack([p.grad.square().sum() for p in module.parameters()]).sum().sqrt())


def test_a_batch_that_overflows_is_skipped() -> None:
    """Its step changes neither weights nor state, and leaves no perturbation."""
    data = dataset()
    data.tensors[0][18:24] = 1e30  # the fourth batch
    module = Problem(functools.partial(usam, rho=1e-3), dropout=0.0)
    states: list[list[torch.Tensor]] = []
    module.on_train_batch_end = lambda *_: states.append([p.clone() for p in module.parameters()])
    trainer = trainer_of(plugins=[fp16()], max_epochs=1, gradient_clip_val=0.1)
    trainer.fit(module, DataLoader(data, 6))
    assert trainer.optimizers[0].skipped == 1
    changed = [not all(map(torch.equal, *pair)) for pair in itertools.pairwise(states)]
    assert changed == [True, True, False] + [True] * 6
    assert trainer.global_step == 10


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_that_lightning_skips() -> None:
    """With a scaler, training_step that returns None at the last micro-batch."""

    class Skips(Problem):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            skips = batch_idx == 3 and self.current_epoch == 0
            return None if skips else super().training_step(batch, batch_idx)

    module, other = Skips(usam), Problem(usam)
    data = DataLoader(torch.utils.data.Subset(dataset(), range(24)), 6)
    trainer_of(plugins=[fp16()], accumulate_grad_batches=4).fit(module, data)
    for inputs, _ in batches(torch.float32)[:3]:  # which change running statistics
        with half():
            other.net(inputs)
    epoch = batches(torch.float32)[:4]
    by_hand(other, [4], epoch=epoch, scaler=fp16().scaler, context=half)
    assert distance(module, other) == 0.0


def test_a_hook_that_fails_restores_the_weights() -> None:
    """With a scaler the hooks are called before the optimizer's own step."""

    class Fails(Problem):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert optimizer.perturbed
            raise ZeroDivisionError("a hook that fails")

    module = Fails(usam)
    with pytest.raises(ZeroDivisionError, match="a hook that fails"):
        trainer_of(plugins=[fp16()]).fit(module, loader())
    assert all(map(torch.equal, module.parameters(), Problem(usam).parameters()))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_scale_is_saved(tmp_path: Path) -> None:
    """Under the plugin's own name, so that a run with or without the callback goes on."""
    whole, first, second = (Problem(usam) for _ in range(3))
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}
    trainer_of(plugins=[fp16()], max_epochs=4, **options).fit(whole, loader())
    trainer = trainer_of(plugins=[fp16()], **options)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    plugin = fp16(2.0)
    trainer = trainer_of(plugins=[plugin], max_epochs=4, **options)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert distance(second, whole) == 0.0
    assert plugin.scaler.get_scale() > 2.0**10
