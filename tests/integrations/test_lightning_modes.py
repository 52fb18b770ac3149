"""What Lightning evaluates and saves, of optimizers that train at other weights than those."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfilter as ef

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner

from eigenfilter.integrations.lightning import SharpnessAwareCallback
from integrations.lightning_problem import Problem, by_hand, distance, double, loader, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD: z descends, x is its average, and gradients are taken between them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "train_mode": False, "k": 0})

    def train(self) -> None:
        self._to(True)

    def eval(self) -> None:
        self._to(False)

    @torch.no_grad()
    def _to(self, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for p in group["params"]:
                    z = self.state[p]["z"] if self.state[p] else p.clone()
                    p.lerp_(z, 0.1 if train_mode else 1 - 1 / 0.9)
            group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("the optimizer was not in train mode")
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                z = state.setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / 0.9)
                z -= group["lr"] * p.grad
                p.copy_(x.lerp_(z, 1 / group["k"]).lerp_(z, 0.1))


def schedule_free(params: Any) -> Any:
    return ef.SharpnessAware(ScheduleFree(params), "usam", rho=0.1)


def extrapolating(params: Any) -> Any:
    return ef.SGD(params, lr=0.05, momentum=0.9, extrapolation=0.1)


def extrapolating_adamw(params: Any) -> Any:
    return ef.AdamW(params, lr=0.05, eps=0.1, extrapolation=0.1)


OPTIMIZERS = pytest.mark.parametrize("make", [schedule_free, extrapolating, extrapolating_adamw])


class Watched(Problem):
    """Keeps the weights that validation sees."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.seen: list[list[Tensor]] = []

    def on_validation_batch_start(self, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 0:
            self.seen.append([p.detach().clone() for p in self.parameters()])


def points(module: Problem, make: Any, epochs: int) -> list[list[Tensor]]:
    """Train `module` by hand; return x after each step. The last one is in the module."""
    opts = []

    def make_training(params: Any) -> Any:
        opts.append(make(params))
        opts[0].train()
        return opts[0]

    def look() -> None:
        opts[0].eval()
        xs.append([p.detach().clone() for p in module.parameters()])
        opts[0].train()

    xs: list[list[Tensor]] = []
    module.make_optimizer = make_training
    by_hand(module, [4] * epochs, after_step=look)
    opts[0].eval()
    return xs


@OPTIMIZERS
def test_validation_and_the_end_see_x(make: Any) -> None:
    module = Watched(make)
    other = double(module)
    options = {"val_check_interval": 2, "accumulate_grad_batches": 4}
    trainer_of(**options).fit(module, loader(), loader())
    xs = points(other, make, epochs=2)
    start = list(double(Watched(make)).parameters())
    at = [start, *xs]
    # of the sanity check, then after batches 2, 4, 6, 8 and 10 of each epoch
    steps = [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    for seen, step in zip(module.seen, steps, strict=True):
        torch.testing.assert_close(seen, at[step], rtol=0, atol=1e-12)
    assert distance(module, other) < 1e-12


@OPTIMIZERS
def test_checkpoints_hold_x_and_training_goes_on(make: Any, tmp_path: Path) -> None:
    whole, first, second = (Problem(make) for _ in range(3))
    names = [name for name, _ in whole.named_parameters()]
    options = {"enable_checkpointing": True, "accumulate_grad_batches": 4}
    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer_of(every, **options).fit(first, loader())
    for step, x in enumerate(points(double(Problem(make)), make, epochs=2), start=1):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)["state_dict"]
        torch.testing.assert_close([saved[name] for name in names], x, rtol=0, atol=1e-12)
    trainer_of(max_epochs=4, accumulate_grad_batches=4).fit(whole, loader())
    second.double()
    trainer_of(max_epochs=4, accumulate_grad_batches=4).fit(
        second, loader(), ckpt_path=tmp_path / "step=6.ckpt"
    )
    assert distance(second, whole) < 1e-12


@OPTIMIZERS
def test_an_exception_leaves_and_saves_x(make: Any, tmp_path: Path) -> None:
    class Fails(Problem):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 2:
                raise ZeroDivisionError("a hook that fails")
            super().on_train_batch_start(batch, batch_idx)

    class Saves(pl.Callback):
        def on_exception(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "saved")

    module = Fails(make)
    with pytest.raises(ZeroDivisionError):
        trainer_of(Saves(), accumulate_grad_batches=4).fit(module, loader())
    x = points(double(Problem(make)), make, epochs=1)[1]
    params = dict(module.named_parameters())
    torch.testing.assert_close([p.data for p in params.values()], x, rtol=0, atol=1e-12)
    saved = torch.load(tmp_path / "saved", weights_only=False)["state_dict"]
    assert all(torch.equal(saved[name], p) for name, p in params.items())


@OPTIMIZERS
def test_a_search_for_a_learning_rate(make: Any, tmp_path: Path) -> None:
    """Which Lightning does without the hooks of callbacks."""

    class Searched(Problem):
        lr = 0.1

    module, other = Searched(make), double(Problem(make))
    trainer = trainer_of(accumulate_grad_batches=4, default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(module, loader(), num_training=8, update_attr=False)
    assert len(found.results["loss"]) > 1
    trainer.fit(module, loader())
    points(other, make, epochs=2)
    assert distance(module, other) < 1e-12


def test_manual_optimization_keeps_its_modes() -> None:
    class Manual(Problem):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            modes.append(self.optimizers().param_groups[0]["train_mode"])

    modes: list[bool] = []
    trainer_of(max_epochs=1).fit(Manual(schedule_free), loader(), loader())
    assert modes == [False] * 10


@pytest.mark.parametrize("weights_only", [None, False, True])
@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_before_zero_grad"])
def test_a_checkpoint_in_the_middle_of_a_step(
    weights_only: bool | None, hook: str, tmp_path: Path
) -> None:
    """It is refused where the weights are perturbed, which they are not when gradients clear."""

    def save(trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(tmp_path / "saved", weights_only=weights_only)

    callback = pl.Callback()
    setattr(callback, hook, save)
    module = Problem(lambda params: ef.USAM(params, lr=0.1, rho=0.1))
    start = copy.deepcopy(module.state_dict())
    trainer = trainer_of(callback, max_steps=1)
    if hook == "on_before_zero_grad":
        trainer.fit(module, loader())
        saved = torch.load(tmp_path / "saved", weights_only=False)["state_dict"]
        params = dict(module.named_parameters())
        assert all(torch.equal(saved[name], start[name].double()) for name in params)
        return
    with pytest.raises(RuntimeError, match="a checkpoint in the middle of a step"):
        trainer.fit(module, loader())
    assert not (tmp_path / "saved").exists()


def test_a_checkpoint_after_the_fit(tmp_path: Path) -> None:
    module = Problem(schedule_free)
    trainer = trainer_of()
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "saved", weights_only=True)
    saved = torch.load(tmp_path / "saved", weights_only=False)["state_dict"]
    assert all(torch.equal(saved[name], p) for name, p in module.named_parameters())
    assert "save_checkpoint" not in vars(trainer)
    assert isinstance(trainer.callbacks[0], SharpnessAwareCallback)
