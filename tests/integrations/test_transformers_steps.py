"""What a Trainer's step must leave alone: weights at x, counts, logs, batches, other steps."""

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
from integrations.accelerate_state import fresh_state
from integrations.by_hand import sam_steps

from integrations.transformers_problem import (  # isort: skip: skips the tests without it
    LENGTH,
    LR,
    MOMENTUM,
    RHO,
    SAMPLES,
    VOCABULARY,
    Language,
    NoNorm,
    assert_same,
    batch_of,
    by_closure,
    logged,
    loss_of,
    params_of,
    samples,
    trainer_of,
    windows,
)

from transformers import Trainer, TrainerCallback

from eigenfilter.integrations.transformers import (
    RhoSchedulerCallback,
    SharpnessAwareMixin,
)

__all__ = ["fresh_state"]


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


@pytest.mark.parametrize(
    "optimizer",
    [
        (ef.SGD, {"momentum": MOMENTUM, "extrapolation": RHO}),
        (ef.MSAM, {"momentum": MOMENTUM, "rho": RHO}),
    ],
    ids=["SGD", "MSAM"],
)
def test_what_is_trained_and_saved_is_x(tmp_path: Path, optimizer: Any) -> None:
    options = {"weight_decay": 0.0, "save_strategy": "steps", "save_steps": 5}
    model, twin = Language(), Language()
    trainer = trainer_of(tmp_path, model, optimizer, num_train_epochs=1, **options)
    trainer.train()
    make, arguments = optimizer
    opt = make(twin.parameters(), lr=LR, **arguments)
    for step, [batch] in enumerate(windows(1), start=1):
        opt.train()
        opt.zero_grad()
        twin(**batch)["loss"].backward()
        opt.step()
        opt.eval()
        if step == 5:
            at_five = copy.deepcopy(twin.state_dict())
    assert_same(model, twin)
    resumed = trainer_of(tmp_path, Language(), optimizer, num_train_epochs=1, **options)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-5"))
    for name, t in resumed.model.state_dict().items():
        torch.testing.assert_close(t, at_five[name], rtol=0, atol=1e-6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(resumed.model, twin)
