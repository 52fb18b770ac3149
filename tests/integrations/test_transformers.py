"""Trainers against steps written out in plain tensors, or against one closure."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from integrations.by_hand import sam_steps
from run_distributed import RunDistributed

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from eigenfilter.integrations.transformers import (  # noqa: E402
    RhoScheduleCallback,
    SharpnessAwareMixin,
    SharpnessAwareTrainer,
)
from integrations.test_accelerate import fresh_state, launched, with_scaler  # noqa: E402

__all__ = ["fresh_state"]

VOCABULARY, LENGTH, SAMPLES = 11, 6, 22  # 11 batches of 2: 4 does not divide them
LR, MOMENTUM, RHO, DECAY = 0.2, 0.8, 0.3, 0.05
MAX_NORM = 0.6  # clips some of the steps
USAM = ef.USAM, {"momentum": MOMENTUM, "rho": RHO}
SAM = ef.SAM, {"momentum": MOMENTUM, "rho": RHO}


def samples(count: int = SAMPLES) -> list[dict[str, Tensor]]:
    """Token sequences, of whose labels a varying number counts."""
    gen = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=gen)
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[LENGTH - i % 5 :] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


class Language(nn.Module):
    """A language model whose loss takes num_items_in_batch, as those of Transformers do."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(VOCABULARY, 5)
        self.hidden = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(7, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        h = torch.tanh(self.hidden(self.embed(input_ids)))
        h = self.dropout(self.norm(h.transpose(1, 2)).transpose(1, 2))
        logits = self.head(h).flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        items = kwargs.get("num_items_in_batch")
        return {"loss": total / ((labels != -100).sum() if items is None else items)}


def arguments(folder: Path, accumulation: int = 1, **options: Any) -> Any:
    defaults = {
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "weight_decay": DECAY,
    }
    return TrainingArguments(str(folder), **defaults | options)


def trainer_of(
    folder: Path,
    model: Any,
    optimizer: Any = USAM,
    *,
    cls: Any = SharpnessAwareTrainer,
    data: Any = None,
    callbacks: Any = None,
    options: Any = None,
    **more: Any,
) -> Any:
    given = {} if optimizer is None else {"optimizer_cls_and_kwargs": optimizer}
    return cls(
        model=model,
        args=arguments(folder, **more),
        train_dataset=samples() if data is None else data,
        callbacks=callbacks,
        **given | (options or {}),
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def windows(accumulation: int, data: Any = None) -> list[list[dict[str, Tensor]]]:
    """The micro-batches of each step of an epoch."""
    rows = samples() if data is None else data
    batches = [batch_of(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]


def loss_of(model: nn.Module, window: list[dict[str, Tensor]]) -> Tensor:
    items = sum((batch["labels"] != -100).sum() for batch in window)
    losses = [model(**batch, num_items_in_batch=items)["loss"] for batch in window]
    return torch.stack(losses).sum()


def params_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    tolerance = {"rtol": 1e-9, "atol": 1e-12} | tolerance
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    for (name, t), expected in pairs:
        torch.testing.assert_close(t, expected, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def by_closure(model: nn.Module, opt: Any, losses: Any) -> list[float]:
    """Train by closures; running statistics stay those of x. Return the losses."""
    values = []
    for loss in losses:
        after: dict[str, Tensor] = {}

        def closure(loss: Any = loss, after: dict[str, Tensor] = after) -> Tensor:
            opt.zero_grad()
            value = loss()
            value.backward()
            if after:
                for name, t in model.named_buffers():
                    t.copy_(after[name])
            else:
                after |= {name: t.clone() for name, t in model.named_buffers()}
            return value.detach()

        values.append(float(opt.step(closure)))
    return values


class NoNorm(Language):
    """Without running statistics, which plain steps would update at every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()  # type: ignore[assignment]


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
