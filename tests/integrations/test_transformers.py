"""Trainers against steps written out in plain tensors, or against one closure."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from integrations.by_hand import sam_steps
from pages import ROOT, run_page
from run_distributed import RunDistributed

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from eigenfilter.integrations.transformers import (  # noqa: E402
    RhoSchedulerCallback,
    SharpnessAwareMixin,
    SharpnessAwareTrainer,
)
from integrations.accelerate_state import fresh_state, launched, with_scaler  # noqa: E402

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
    assert base.calls == ["train"] * 8 + ["eval"]
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


# What a step must leave alone.


class Watching(TrainerCallback):  # type: ignore[misc]
    """Records what callbacks see."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.weights: list[Tensor] = []
        self.norms: list[float] = []

    def on_substep_end(self, *_: Any, **kwargs: Any) -> None:
        self.events.append("substep_end")

    def on_pre_optimizer_step(self, *_: Any, model: Any, **kwargs: Any) -> None:
        self.events.append("pre_optimizer_step")
        grads = [p.grad for p in model.parameters()]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())

    def on_optimizer_step(self, *_: Any, model: Any, **kwargs: Any) -> None:
        self.events.append("optimizer_step")
        self.weights.append(model.head.weight.detach().clone())

    def on_evaluate(self, *_: Any, model: Any, **kwargs: Any) -> None:
        assert torch.equal(model.head.weight, self.weights[-1])

    def on_save(self, *_: Any, model: Any, **kwargs: Any) -> None:
        assert torch.equal(model.head.weight, self.weights[-1])


def test_callbacks_evaluations_and_checkpoints_see_x(tmp_path: Path) -> None:
    model = NoNorm()
    twin = copy.deepcopy(model)
    watching = Watching()
    saving = {"save_strategy": "steps", "save_steps": 2}
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": SAMPLES}
    trainer = trainer_of(
        tmp_path,
        model,
        (ef.USAM, {"rho": RHO}),
        accumulation=4,
        weight_decay=0.0,
        max_grad_norm=0.1,
        callbacks=[watching],
        options={"eval_dataset": samples()},
        num_train_epochs=1,
        **saving,
        **evaluating,
    )
    trainer.train()
    window = ["substep_end"] * 3 + ["pre_optimizer_step", "optimizer_step"]
    assert watching.events == window * 2 + window[1:]
    assert watching.norms == pytest.approx([0.1] * 3, rel=1e-4)  # clipped
    everything = [batch_of(samples())]
    evaluations = []
    for step, losses in enumerate(windows(4)):
        loss = functools.partial(loss_of, twin, losses)
        sam_steps(params_of(twin), [loss], lr=LR, rho=RHO, max_norm=0.1)
        torch.testing.assert_close(watching.weights[step], twin.head.weight)
        evaluations.append(loss_of(twin, everything).item())
    assert logged(trainer, "eval_loss") == pytest.approx(evaluations, rel=1e-6)
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["rho"] == RHO
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(weights["head.weight"], watching.weights[1])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_checkpoint_resumes_exactly(tmp_path: Path, dropout: float) -> None:
    """In the middle of an epoch, with dropout, batch norm, momentum and a schedule of rho."""

    def run(**options: Any) -> Any:
        trainer = trainer_of(
            tmp_path,
            Language(dropout),
            accumulation=2,
            callbacks=[RhoSchedulerCallback("linear", end=0.1)],
            save_strategy="steps",
            save_steps=4,
            train_sampling_strategy="random",
            lr_scheduler_type="cosine",
        )
        trainer.train(**options)
        return trainer

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert whole.state.global_step == resumed.state.global_step == 12
    assert_same(resumed.model, whole.model, rtol=0, atol=0)
    groups = [t.optimizer.param_groups[0]["rho"] for t in (whole, resumed)]
    assert groups[0] == groups[1] == pytest.approx(0.1 * RHO)


def test_a_schedule_of_rho(tmp_path: Path) -> None:
    model = NoNorm()
    twin = copy.deepcopy(model)
    callbacks = [RhoSchedulerCallback("late", start=0.5)]
    trainer_of(tmp_path, model, callbacks=callbacks, accumulation=4, weight_decay=0.0).train()
    losses = [functools.partial(loss_of, twin, window) for window in windows(4) * 2]
    rho: Callable[[int], float] = lambda step: RHO * (step >= 3)  # noqa: E731
    sam_steps(params_of(twin), losses, lr=LR, rho=rho, momentum=MOMENTUM)
    assert_same(model, twin)


class Stateful(Trainer):  # type: ignore[misc]
    """A trainer that counts, logs, and changes its batches as it goes, like those of TRL."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._step = 0
        self._metrics: dict[str, list[float]] = {"loss": []}
        self.my_counts = {"tokens": 0}
        self.prepared: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        self.prepared.append(inputs["input_ids"].clone())
        return inputs

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop("unused")
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step += 1
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        inputs["input_ids"].add_(1).remainder_(VOCABULARY)  # in place
        inputs["labels"] = labels
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._metrics["loss"].append(loss.item())
        self.log({"mine": loss.item()})
        self.my_counts["tokens"] += inputs["input_ids"].numel()
        return loss


class AwareStateful(SharpnessAwareMixin, Stateful):
    kept_attributes = (*SharpnessAwareMixin.kept_attributes, "my_counts")


def test_a_trainer_that_counts_and_changes_its_batches(tmp_path: Path) -> None:
    model = NoNorm()
    twin = copy.deepcopy(model)
    data = [row | {"unused": torch.zeros(1)} for row in samples()]
    two = ef.TwoStepUSAM, {"rho": RHO, "momentum": MOMENTUM}
    options = {"accumulation": 4, "weight_decay": 0.0, "remove_unused_columns": False}
    trainer = trainer_of(tmp_path, model, two, cls=AwareStateful, data=data, **options)
    trainer.train()
    rows = [row | {"input_ids": (row["input_ids"] + 1) % VOCABULARY} for row in samples()]
    opt = ef.TwoStepUSAM(twin.parameters(), lr=LR, momentum=MOMENTUM, rho=RHO)
    losses = [functools.partial(loss_of, twin, window) for window in windows(4, rows) * 2]
    values = by_closure(twin, opt, losses)
    assert_same(model, twin)
    assert trainer._step == len(trainer.prepared) == 22
    assert len(trainer._metrics["loss"]) == 22
    assert logged(trainer, "mine") == trainer._metrics["loss"]
    assert sum(trainer._metrics["loss"]) == pytest.approx(sum(values))
    assert trainer.my_counts["tokens"] == 2 * SAMPLES * LENGTH


class Stream(torch.utils.data.IterableDataset[Any]):
    """Seven batches an epoch, of unknown number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(samples(14))


class Mean(NoNorm):
    """A model whose loss is the mean over a micro-batch, which the Trainer divides."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(input_ids, labels)


def mean_of(model: nn.Module, window: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([model(**batch)["loss"] for batch in window]).mean()


STREAMED: dict[str, tuple[type[nn.Module], Callable[..., Tensor]]] = {
    "items": (NoNorm, loss_of),
    "means": (Mean, mean_of),
}


@pytest.mark.parametrize("kind", STREAMED)
def test_micro_batches_left_over_by_a_stream_join_the_next_step(tmp_path: Path, kind: str) -> None:
    """As in the Trainer, which adds their gradients to those of the next epoch's first window."""
    make, loss = STREAMED[kind]
    model = make()
    twin = copy.deepcopy(model)
    trainer_of(tmp_path, model, data=Stream(), accumulation=4, max_steps=3, weight_decay=0).train()
    first, rest = windows(4, samples(14))
    step = functools.partial(loss, twin)
    losses = [
        functools.partial(step, first),
        lambda: step(rest) + step(first),
        lambda: step(rest) + step(first),
    ]
    sam_steps(params_of(twin), losses, lr=LR, rho=RHO, momentum=MOMENTUM)
    assert_same(model, twin)


def test_a_failed_step_leaves_x(tmp_path: Path) -> None:
    class Failing(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = NoNorm()
    before = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, callbacks=[Failing()], accumulation=4)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same(model, before, rtol=0, atol=0)
    trainer.remove_callback(Failing)
    trainer.train()  # begins again, without micro-batches of the step that failed
    twin = NoNorm()
    trainer_of(tmp_path, twin, accumulation=4).train()
    assert_same(model, twin, rtol=0, atol=0)


def test_a_smaller_batch_is_tried_from_x(tmp_path: Path) -> None:
    """auto_find_batch_size begins again after the memory ran out in the middle of a step."""

    class Exhausted(TrainerCallback):  # type: ignore[misc]
        failed = False

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            if not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")

    model, twin = NoNorm(), NoNorm()
    options = {"accumulation": 4, "max_steps": 3}
    callback = Exhausted()
    trainer = trainer_of(
        tmp_path, model, callbacks=[callback], auto_find_batch_size=True, **options
    )
    trainer.train()
    assert callback.failed
    assert trainer.state.train_batch_size == 1
    trainer_of(tmp_path, twin, per_device_train_batch_size=1, **options).train()
    assert_same(model, twin, rtol=0, atol=0)


def test_a_checkpoint_on_a_signal_holds_x(tmp_path: Path) -> None:
    class Signal(TrainerCallback):  # type: ignore[misc]
        """SIGTERM arrives while the third step is under way."""

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                manager.is_checkpoint_requested = True

    whole, model = NoNorm(), NoNorm()
    trainer_of(tmp_path / "whole", whole, accumulation=2).train()
    options = {"accumulation": 2, "enable_jit_checkpoint": True, "callbacks": [Signal()]}
    trainer = trainer_of(tmp_path / "cut", model, **options)
    callbacks = trainer.callback_handler.callbacks
    manager = next(c for c in callbacks if hasattr(c, "jit_manager")).jit_manager
    trainer.train()
    assert trainer.state.global_step == 3
    resumed = trainer_of(tmp_path / "cut", NoNorm(), accumulation=2)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed.model, whole, rtol=0, atol=0)


# Models of Transformers.


def gpt2(positions: int = LENGTH) -> Any:
    torch.manual_seed(8)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=positions,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config).double()


def gpt2_loss(model: Any, window: list[dict[str, Tensor]], smoothing: float = 0.0) -> Tensor:
    """The smoothed cross-entropy of each next token, over the number of the window's labels.

    The Trainer counts the first label too, for models without a `loss_type`.
    """
    items = sum((batch["labels"] != -100).sum() for batch in window)
    total = torch.zeros((), dtype=torch.float64)
    for batch in window:
        log_p = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        counts = batch["labels"][:, 1:] != -100
        target = batch["labels"][:, 1:].clamp(min=0)
        own = -log_p.gather(-1, target[..., None])[..., 0]
        total = total + ((1 - smoothing) * own - smoothing * log_p.mean(-1))[counts].sum()
    return total / items


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing(tmp_path: Path, smoothing: float) -> None:
    model = gpt2()
    twin = copy.deepcopy(model)
    options = {"accumulation": 4, "weight_decay": 0.0, "label_smoothing_factor": smoothing}
    trainer_of(tmp_path, model, SAM, **options).train()
    losses = [functools.partial(gpt2_loss, twin, window, smoothing) for window in windows(4) * 2]
    sam_steps(params_of(twin), losses, lr=LR, rho=RHO, momentum=MOMENTUM, normalized=True)
    assert_same(model, twin, rtol=1e-6, atol=1e-7)  # the model's own loss is a float32


SAME: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"activation_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "no prefetched tokens": {"average_tokens_across_devices": False},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_result(tmp_path: Path, name: str) -> None:
    plain, model = gpt2(), gpt2()
    for each, options in ((plain, {}), (model, SAME[name])):
        trainer_of(tmp_path, each, SAM, accumulation=4, **options).train()
    assert_same(model, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # by PEFT
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(tmp_path: Path, checkpointing: bool) -> None:
    """The ascents, the norms and the updates are those of the adapters alone."""
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(9)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(gpt2(), config).double()
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at the start: then the gradient of A is zero too
                nn.init.normal_(p, std=0.5)
        return model

    model, twin = adapted(), adapted()
    options = {"max_grad_norm": 0.05, "activation_checkpointing": checkpointing}
    trainer = trainer_of(tmp_path, model, SAM, accumulation=4, weight_decay=0.0, **options)
    trainer.train()
    losses = [functools.partial(gpt2_loss, twin, window) for window in windows(4) * 2]
    _, norms = sam_steps(
        params_of(twin),
        losses,
        lr=LR,
        rho=RHO,
        momentum=MOMENTUM,
        max_norm=0.05,
        normalized=True,
    )
    assert len(params_of(model)) == 4
    assert_same(model, twin, rtol=1e-6, atol=1e-7)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert not torch.equal(params_of(model)[0], params_of(adapted())[0])


def test_a_mixin_of_another_trainer(tmp_path: Path) -> None:
    class Seq2Seq(SharpnessAwareMixin, transformers.Seq2SeqTrainer):  # type: ignore[misc]
        pass

    model = NoNorm()
    twin = copy.deepcopy(model)
    options = arguments(tmp_path, 4, weight_decay=0.0).to_dict()
    args = transformers.Seq2SeqTrainingArguments(**options)
    opt = ef.USAM(model.parameters(), lr=LR, momentum=MOMENTUM, rho=RHO)
    Seq2Seq(model=model, args=args, train_dataset=samples(), optimizers=(opt, None)).train()
    losses = [functools.partial(loss_of, twin, window) for window in windows(4) * 2]
    sam_steps(params_of(twin), losses, lr=LR, rho=RHO, momentum=MOMENTUM)
    assert_same(model, twin)


def tokenizer() -> Any:
    """Words are numbers, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"{i}": i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="0", pad_token="1"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL and datasets
def test_the_trainer_of_trl(tmp_path: Path) -> None:
    """Its weights, and what it counts and logs in its own attributes, are those of one closure."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class SFT(SharpnessAwareMixin, trl.SFTTrainer):  # type: ignore[misc]
        pass

    rows = [row | {"labels": row["input_ids"]} for row in samples(16)]
    options = {"activation_checkpointing": False, "bf16": False, "max_length": LENGTH}
    options |= arguments(tmp_path, 4, weight_decay=0.0).to_dict()
    known = trl.SFTConfig.__dataclass_fields__
    model = gpt2()
    twin = copy.deepcopy(model)
    trainer = SFT(
        model=model,
        args=trl.SFTConfig(**{name: v for name, v in options.items() if name in known}),
        train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows]),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=USAM,
    )
    trainer.train()
    losses = [functools.partial(gpt2_loss, twin, window) for window in windows(4, rows) * 2]
    opt = ef.USAM(twin.parameters(), lr=LR, momentum=MOMENTUM, rho=RHO)
    values = by_closure(twin, opt, losses)
    assert_same(model, twin, rtol=1e-6, atol=1e-6)
    assert logged(trainer, "loss") == pytest.approx(values, rel=1e-6)
    assert logged(trainer, "num_tokens") == [8 * LENGTH * step for step in (1, 2, 3, 4)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL and datasets
def test_a_trainer_that_generates_its_batches(tmp_path: Path) -> None:
    """With a radius of almost 0, GRPO generates, counts, logs and learns as with plain SGD."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class Counting(trl.GRPOTrainer):  # type: ignore[misc]
        generations = 0

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            self.generations += 1
            return super()._generate_and_score_completions(*args, **kwargs)

    class Aware(SharpnessAwareMixin, Counting):
        pass

    def run(cls: Any, make: Any) -> Any:
        model = gpt2(positions=32)
        trainer = cls(
            model=model,
            args=trl.GRPOConfig(
                str(tmp_path),
                per_device_train_batch_size=4,
                num_generations=4,
                gradient_accumulation_steps=2,
                max_steps=3,
                max_completion_length=6,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": f"{2 + i} {3 + i}"} for i in range(8)]),
            processing_class=tokenizer(),
            reward_funcs=lambda completions, **_: [float(len({*c})) for c in completions],
            optimizers=(make(model.parameters()), None),
        )
        trainer.train()
        return trainer

    plain = run(Counting, functools.partial(torch.optim.SGD, lr=LR))
    aware = run(Aware, functools.partial(ef.USAM, lr=LR, rho=1e-12))
    assert aware.generations == plain.generations == 3
    assert aware._step == plain._step == 6
    for name in ("loss", "reward", "entropy", "num_tokens"):
        assert logged(aware, name) == pytest.approx(logged(plain, name), rel=1e-6)
    assert_same(aware.model, plain.model, rtol=1e-6, atol=1e-7)


# Several processes.


def train_on(folder: Path, model: nn.Module, batch_size: int, accumulation: int) -> Any:
    options = {"per_device_train_batch_size": batch_size, "max_grad_norm": MAX_NORM}
    data = samples(24)
    trainer = trainer_of(folder, model, SAM, data=data, accumulation=accumulation, **options)
    trainer.train()
    return trainer


def train_on_a_rank(rank: int, folder: Path, accumulation: int) -> dict[str, Tensor]:
    with launched(rank, 2):
        model = NoNorm()
        trainer = train_on(folder, model, 2, accumulation)
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        return dict(model.state_dict())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes_are_one(
    tmp_path: Path, run_distributed: RunDistributed, accumulation: int
) -> None:
    model = NoNorm()
    train_on(tmp_path, model, 4, accumulation)
    for state in run_distributed(train_on_a_rank, 2, tmp_path, accumulation):
        for name, t in model.state_dict().items():
            torch.testing.assert_close(state[name], t, rtol=1e-9, atol=1e-11)


# What is refused.


def test_the_stock_trainer_names_this_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"transformers\.SharpnessAwareTrainer"):
        trainer_of(tmp_path, NoNorm(), cls=Trainer).train()


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no ascents": (None, {}, "which takes no ascents"),
    "optim in backward": (None, {"optim": "adalomo", "optim_args": "rho=0.1"}, "while backward"),
    "no number": (None, {"optim_args": "rho=large"}, "is no number"),
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


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    assert "loss " in run_page(ROOT / "docs" / "integrations" / "transformers.md", tmp_path)
