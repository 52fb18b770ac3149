"""Models and trainers of Transformers, PEFT and TRL, and several processes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from integrations.accelerate_state import fresh_state, launched
from integrations.by_hand import sam_steps
from run_distributed import RunDistributed

from integrations.transformers_problem import (  # isort: skip: skips the tests without it
    LENGTH,
    LR,
    MAX_NORM,
    MOMENTUM,
    RHO,
    SAM,
    USAM,
    VOCABULARY,
    NoNorm,
    arguments,
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

from eigenfilter.integrations.transformers import (
    SharpnessAwareMixin,
)

__all__ = ["fresh_state"]


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
