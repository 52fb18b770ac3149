"""Trainers against steps written out in plain tensors, or against one closure."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef
from integrations.accelerate_state import fresh_state, with_scaler
from integrations.by_hand import sam_steps
from pages import ROOT, run_page

from integrations.transformers_problem import (  # isort: skip: skips the tests without it
    DECAY,
    LR,
    MAX_NORM,
    MOMENTUM,
    RHO,
    SAM,
    USAM,
    Language,
    NoNorm,
    assert_same,
    by_closure,
    logged,
    loss_of,
    params_of,
    samples,
    trainer_of,
    windows,
)

import transformers
from transformers import Trainer, TrainerCallback

from eigenfilter.integrations.transformers import (
    SharpnessAwareTrainer,
)

__all__ = ["fresh_state"]


@pytest.mark.parametrize("normalized", [False, True], ids=["usam", "sam"])
@pytest.mark.parametrize("max_norm", [0.0, MAX_NORM])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_trainer_is_the_method(
    tmp_path: Path, accumulation: int, max_norm: float, normalized: bool
) -> None:
    """Weights, logged losses and norms, with a linear schedule of lr and no weight decay."""
    model = NoNorm()
    twin = copy.deepcopy(model)
    options = {"max_grad_norm": max_norm, "weight_decay": 0.0, "lr_scheduler_type": "linear"}
    trainer = trainer_of(
        tmp_path, model, SAM if normalized else USAM, accumulation=accumulation, **options
    )
    trainer.train()
    epoch = windows(accumulation)
    losses, norms = sam_steps(
        params_of(twin),
        [functools.partial(loss_of, twin, window) for window in epoch * 2],
        lr=lambda step: LR * (1 - step / (2 * len(epoch))),
        rho=RHO,
        momentum=MOMENTUM,
        max_norm=max_norm,
        normalized=normalized,
    )
    assert_same(model, twin)
    assert trainer.state.global_step == 2 * len(epoch)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)  # a float32 sum
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-9)
    if max_norm:
        assert min(norms) < max_norm < max(norms)


def test_the_groups_of_weight_decay_are_those_of_the_trainer(tmp_path: Path) -> None:
    """Biases do not decay; lr comes from the training's arguments."""
    model = NoNorm()
    twin = copy.deepcopy(model)
    trainer_of(tmp_path, model, accumulation=4).train()
    decays = [p for name, p in twin.named_parameters() if "bias" not in name]
    others = [p for name, p in twin.named_parameters() if "bias" in name]
    groups = [{"params": decays, "weight_decay": DECAY}, {"params": others}]
    opt = ef.USAM(groups, lr=LR, momentum=MOMENTUM, rho=RHO)
    by_closure(twin, opt, [functools.partial(loss_of, twin, w) for w in windows(4) * 2])
    assert_same(model, twin)


OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Any], Any]]] = {
    "adamw by optim_args": (
        {"optim": "adamw_torch", "optim_args": "method=sam, rho=0.3, adaptive=true"},
        {},
        lambda params: ef.SharpnessAware(
            torch.optim.AdamW(params, lr=LR, weight_decay=0.0), "sam", RHO, adaptive=True
        ),
    ),
    "sgd by optim_args": (
        {"optim": "sgd", "optim_args": "momentum=0.8,rho=0.3"},
        {},
        lambda params: ef.USAM(params, lr=LR, momentum=MOMENTUM, rho=RHO),
    ),
    "adafactor by optim_args": (
        {"optim": "adafactor", "optim_args": "method=two_step_usam,rho=0.3,ascent=anchored"},
        {},
        lambda params: ef.SharpnessAware(
            transformers.Adafactor(params, lr=LR, scale_parameter=False, relative_step=False),
            "two_step_usam",
            RHO,
            ascent="anchored",
        ),
    ),
    "a class and its arguments": (
        {},
        {"optimizer_cls_and_kwargs": (ef.AdamW, {"method": "sam", "rho": RHO, "lr": 0.01})},
        lambda params: ef.AdamW(params, lr=0.01, method="sam", rho=RHO, weight_decay=0.0),
    ),
    "hessian_usam": (
        {},
        {"optimizer_cls_and_kwargs": (ef.HessianUSAM, {"rho": 0.1, "fd_step": 1e-5})},
        lambda params: ef.HessianUSAM(params, lr=LR, rho=0.1, fd_step=1e-5),
    ),
    "rho 0": (
        {},
        {"optimizer_cls_and_kwargs": (ef.USAM, {"rho": 0.0})},
        lambda params: ef.SGD(params, lr=LR),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_where_they_come_from(tmp_path: Path, name: str) -> None:
    """With batch norm and dropout, whose masks differ between the evaluations."""
    arguments_, options, make = OPTIMIZERS[name]
    model = Language(dropout=0.4)
    twin = copy.deepcopy(model)
    settings = {"accumulation": 4, "weight_decay": 0.0, "seed": 6}
    trainer = trainer_of(tmp_path, model, None, options=options, **settings, **arguments_)
    trainer.train()
    # The random numbers that the loader of an epoch draws: of a sampler, and for its workers.
    torch.manual_seed(6)

    def losses() -> Iterator[Any]:
        for _ in range(2):
            torch.empty((), dtype=torch.int64).random_()
            for window in windows(4):
                yield functools.partial(loss_of, twin, window)

    values = by_closure(twin, make(params_of(twin)), losses())
    assert_same(model, twin)
    assert logged(trainer, "loss") == pytest.approx(values, rel=1e-6)


def test_an_optimizer_of_your_own(tmp_path: Path) -> None:
    model, twin = NoNorm(), NoNorm()
    opt = ef.USAM(model.parameters(), lr=LR, momentum=MOMENTUM, rho=RHO)
    trainer_of(tmp_path, model, None, options={"optimizers": (opt, None)}).train()
    losses = [functools.partial(loss_of, twin, window) for window in windows(1) * 2]
    sam_steps(params_of(twin), losses, lr=LR, rho=RHO, momentum=MOMENTUM)
    assert_same(model, twin)


class Modes(torch.optim.SGD):
    """As schedule-free optimizers, which the Trainer switches before every evaluation."""

    calls: list[str]

    def train(self) -> None:
        self.calls.append("train")

    def eval(self) -> None:
        self.calls.append("eval")


def test_a_base_with_modes(tmp_path: Path) -> None:
    model = NoNorm()
    twin = copy.deepcopy(model)
    base = Modes(model.parameters(), lr=LR)
    base.calls = []
    opt = ef.SharpnessAware(base, "two_step_usam", rho=RHO)
    options = {"optimizers": (opt, None), "eval_dataset": samples(2)}
    trainer = trainer_of(tmp_path, model, None, options=options, accumulation=4, max_steps=2)
    trainer.train()
    trainer.evaluate()
    assert base.calls == ["train"] * 8 + ["eval"] * 2  # at the end, and to evaluate
    other = ef.TwoStepUSAM(twin.parameters(), lr=LR, rho=RHO)
    by_closure(twin, other, [functools.partial(loss_of, twin, w) for w in windows(4)[:2]])
    assert_same(model, twin)


# Precision.


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_norm", [0.0, MAX_NORM])
def test_a_loss_scale_changes_nothing(tmp_path: Path, accumulation: int, max_norm: float) -> None:
    model = NoNorm()
    twin = copy.deepcopy(model)
    options = {"max_grad_norm": max_norm, "accumulation": accumulation, "weight_decay": 0.0}
    trainer = trainer_of(tmp_path, model, SAM, **options)
    with_scaler(trainer.accelerator, 2.0**12)
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() > 2.0**12
    losses, norms = sam_steps(
        params_of(twin),
        [functools.partial(loss_of, twin, window) for window in windows(accumulation) * 2],
        lr=LR,
        rho=RHO,
        momentum=MOMENTUM,
        max_norm=max_norm,
        normalized=True,
    )
    assert_same(model, twin)
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-9)


class Overflowing(SharpnessAwareTrainer):
    """A trainer in whose third step the gradients of the descent overflow."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 2 and self.optimizer.optimizer.perturbed:
            return loss * float("inf")
        return loss


def test_a_step_that_overflows_is_skipped(tmp_path: Path) -> None:
    model = NoNorm()
    twin = copy.deepcopy(model)
    options = {"lr_scheduler_type": "linear", "weight_decay": 0.0, "max_steps": 6}
    trainer = trainer_of(tmp_path, model, cls=Overflowing, **options)
    with_scaler(trainer.accelerator, 2.0**12)
    trainer.train()
    kept = [window for i, window in enumerate(windows(1)[:6]) if i != 2]
    sam_steps(
        params_of(twin),
        [functools.partial(loss_of, twin, window) for window in kept],
        lr=lambda step: LR * (1 - step / 6),  # the schedule does not advance in a skipped step
        rho=RHO,
        momentum=MOMENTUM,
    )
    assert_same(model, twin)


def test_bf16(tmp_path: Path) -> None:
    model = NoNorm().float()
    twin = copy.deepcopy(model)
    options = {"bf16": True, "accumulation": 4, "weight_decay": 0.0}
    trainer = trainer_of(tmp_path, model, SAM, **options)
    trainer.train()

    class Cast(nn.Module):
        """As Accelerate does it: each forward pass in a context of its own."""

        def forward(self, **inputs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return twin(**inputs)

    loss = functools.partial(loss_of, Cast())

    opt = ef.SAM(twin.parameters(), lr=LR, momentum=MOMENTUM, rho=RHO)
    values = by_closure(twin, opt, [functools.partial(loss, window) for window in windows(4) * 2])
    assert_same(model, twin, rtol=1e-5, atol=1e-6)
    assert logged(trainer, "loss") == pytest.approx(values, rel=1e-5)


# What is refused.


def test_the_stock_trainer_names_this_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"transformers\.SharpnessAwareTrainer"):
        trainer_of(tmp_path, NoNorm(), cls=Trainer).train()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no ascents": (None, {}, "which takes no ascents"),
    "optim in backward": (None, {"optim": "adalomo", "optim_args": "rho=0.1"}, "while backward"),
    "rho": (None, {"optim_args": "rho=large,method=sam"}, "has rho=large, which must be a number"),
    "fd_step": (None, {"optim_args": "fd_step="}, "has fd_step=, which must be a number"),
    "adaptive": (
        None,
        {"optim_args": "adaptive=maybe"},
        "adaptive=maybe, which must be true or false",
    ),
    "no flag": (None, {"optim_args": "adaptive=2"}, "adaptive=2, which must be true or false"),
    "method": (None, {"optim_args": "method=asam"}, "unknown method"),
    "autograd": ((ef.HessianUSAM, {"hvp": "autograd"}), {}, "create_graph=True"),
    "release": ((ef.USAM, {"release_gradients": True}), {}, "release_gradients=True applies"),
    "two ascents": (USAM, {"optim_args": "rho=0.1"}, "takes ascents itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path: Path, name: str) -> None:
    optimizer, options, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        trainer_of(tmp_path, NoNorm(), optimizer, **options).train()


def test_an_evaluation_in_mid_step_is_refused(tmp_path: Path) -> None:
    class Early(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            trainer.evaluate(samples())

    trainer = trainer_of(tmp_path, NoNorm(), callbacks=[Early()])
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        trainer.train()


@pytest.mark.parametrize("hook", ["on_pre_optimizer_step", "on_optimizer_step"])
@pytest.mark.parametrize("options", [{}, {"_internal_call": True}])
def test_a_model_is_saved_at_x_alone(tmp_path: Path, hook: str, options: dict[str, bool]) -> None:
    callback = TrainerCallback()
    setattr(callback, hook, lambda *_, **__: trainer.save_model(str(tmp_path / "x"), **options))
    trainer = trainer_of(tmp_path, NoNorm(), callbacks=[callback], max_steps=1)
    if hook == "on_optimizer_step":
        trainer.train()
        assert list((tmp_path / "x").glob("*.safetensors"))
        return
    with pytest.raises(RuntimeError, match="a model saved in the middle of a step"):
        trainer.train()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "adaptive"),
    [("true", True), ("Yes", True), ("1", True), ("False", False), ("no", False), ("0", False)],
)
def test_flags_in_optim_args(tmp_path: Path, text: str, adaptive: bool) -> None:
    args = f"method=sam,rho=0.1,adaptive={text}"
    trainer = trainer_of(tmp_path, NoNorm(), None, optim="sgd", optim_args=args)
    assert trainer.create_optimizer().adaptive is adaptive


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    assert "loss " in run_page(ROOT / "docs" / "integrations" / "transformers.md", tmp_path)
