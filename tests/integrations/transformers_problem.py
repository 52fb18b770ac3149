"""A small language model, and the Trainers and plain loops that train it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from transformers import TrainingArguments

from eigenfilter.integrations.transformers import SharpnessAwareTrainer

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
