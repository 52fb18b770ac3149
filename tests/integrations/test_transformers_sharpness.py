"""The sharpness of fine-tunings, against matrices written out at the end of a training."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import eigenfilter as ef
from eigenfilter.certificate.linearized import preconditioner
from integrations.accelerate_state import fresh_state, launched
from run_distributed import RunDistributed

from integrations.transformers_problem import (  # isort: skip: skips the tests without it
    LENGTH,
    VOCABULARY,
    SAM,
    batch_of,
    samples,
    trainer_of,
)

import transformers

from eigenfilter.integrations.transformers import SharpnessAwareTrainer, SharpnessCallback

__all__ = ["fresh_state"]

# By PEFT.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

LR = 0.01
ADAMW = {"optim": "adamw_torch", "learning_rate": LR, "max_steps": 6}
PROBE = [batch_of(samples()[:8]), batch_of(samples()[8:11])]


def gpt2() -> Any:
    torch.manual_seed(8)
    shape = {"n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, **shape, **tokens)
    return transformers.GPT2LMHeadModel(config)


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(9)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    return peft.get_peft_model(gpt2(), config)


def trained(folder: Path, model: Any, callback: Any, **options: Any) -> Any:
    options = {"cls": transformers.Trainer, "weight_decay": 0.0} | ADAMW | options
    optimizer = options.pop("optimizer", None)
    trainer = trainer_of(folder, model, optimizer, callbacks=[callback], **options)
    trainer.train()
    return trainer


def inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def of_adamw(trainer: Any, probe: Any = PROBE) -> float:
    """The largest eigenvalue of P^-1/2 H P^-1/2."""
    op = ef.curvature.causal_lm(trainer.model, probe)
    scale = preconditioner(inner(trainer.optimizer), op.params)
    return float(torch.linalg.eigvalsh(scale[:, None] * op.to_dense() * scale).max())


def test_adapters_with_adamw(tmp_path: Path) -> None:
    callback = SharpnessCallback(PROBE, every=2, tol=1e-5, log=tmp_path / "sharpness.jsonl")
    trainer = trained(tmp_path, adapted(), callback)
    history = callback.monitor.history
    assert [check.step for check in history] == [2, 4, 6]
    assert history[-1].sharpness == pytest.approx(of_adamw(trainer), rel=1e-4)
    edge = ef.filters.AdamW(LR, 0.9).max_eigenvalue()
    assert [check.edge for check in history] == [edge] * 3
    shown = [entry for entry in trainer.state.log_history if "sharpness" in entry]
    assert [(entry["step"], entry["sharpness"], entry["edge"]) for entry in shown] == [
        (check.step, check.sharpness, check.edge) for check in history
    ]
    lines = (tmp_path / "sharpness.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_the_training_is_the_same(tmp_path: Path) -> None:
    """A check draws no random number, and leaves the model's mode and gradients."""
    watched = trained(tmp_path, adapted(), SharpnessCallback(PROBE, every=1))
    plain = trained(tmp_path, adapted(), transformers.TrainerCallback())
    for p, q in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_groups_of_weight_decay(tmp_path: Path) -> None:
    """The Trainer decays matrices alone: two groups, whose edge is 2."""
    callback = SharpnessCallback(PROBE, every=3)
    trained(tmp_path, gpt2(), callback, weight_decay=0.1)
    assert [check.edge for check in callback.monitor.history] == [2.0, 2.0]


def test_an_ascent(tmp_path: Path) -> None:
    """SAM's edge moves with the gradient norm, and there is none."""
    callback = SharpnessCallback(PROBE, every=6, tol=1e-5)
    trainer = trained(tmp_path, gpt2(), callback, cls=SharpnessAwareTrainer, optimizer=SAM)
    (check,) = callback.monitor.history
    op = ef.curvature.causal_lm(trainer.model, PROBE)
    expected = torch.linalg.eigvalsh(op.to_dense()).max()
    assert check.sharpness == pytest.approx(float(expected), rel=1e-4)
    assert check.edge is None


def test_a_training_that_resumes_goes_on_counting(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, gpt2(), SharpnessCallback(PROBE, every=2), **options)
    callback = SharpnessCallback(PROBE, every=2)
    options |= {"cls": transformers.Trainer, "weight_decay": 0.0, "callbacks": [callback]} | ADAMW
    trainer = trainer_of(tmp_path, gpt2(), None, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [check.step for check in callback.monitor.history] == [4, 6]


def test_another_operator(tmp_path: Path) -> None:
    """A schedule that ends at 0 has no edge there."""
    operator = functools.partial(ef.curvature.causal_lm, engine="finite_difference")
    callback = SharpnessCallback(PROBE, every=6, operator=operator)
    trainer = trained(tmp_path, adapted(), callback, lr_scheduler_type="linear")
    (check,) = callback.monitor.history
    assert check.sharpness == pytest.approx(of_adamw(trainer), rel=0.05)
    assert check.edge == float("inf")


def checks_of_a_rank(rank: int, folder: Path) -> tuple[list[float], float]:
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")  # by PEFT
    with launched(rank, 2):
        callback = SharpnessCallback(PROBE[rank], every=3, tol=1e-5)
        options = {"per_device_train_batch_size": 1, "ddp_find_unused_parameters": False}
        trainer = trained(folder, adapted(), callback, **options)
        return [check.sharpness for check in callback.monitor.history], of_adamw(trainer)


@pytest.mark.slow
@pytest.mark.distributed
def test_each_process_has_its_own_probe(tmp_path: Path, run_distributed: RunDistributed) -> None:
    (first, expected), (other, _) = run_distributed(checks_of_a_rank, 2, tmp_path)
    assert first == other
    assert first[-1] == pytest.approx(expected, rel=1e-4)
