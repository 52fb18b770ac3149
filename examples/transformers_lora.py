"""A small language model, fine-tuned by LoRA with AdamW and with AdamW that takes SAM's ascents.

    python examples/transformers_lora.py
    python examples/transformers_lora.py --method usam --rho 2.0
    python examples/transformers_lora.py --steps 1000 --every 100 --figure sharpness.png

Nothing is downloaded. The text is Python's language reference, which comes with Python itself for
`help()` (pydoc_data.topics); the model is a GPT-2 of 2 layers that predicts characters. It is first
trained on the pages about the language, with Transformers' Trainer. Then adapters are fine-tuned on
the page about the debugger, twice from the same start. The end is the sharpness of both runs: the
largest eigenvalue of the Hessian of the fine-tuning loss, in the parameters of the adapters. With
--every it is also followed during the first run, for AdamW's preconditioner, beside its edge, and
--figure draws both.

Needs transformers, accelerate and peft, and matplotlib for a figure.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

import eigenfilter as ef
from eigenfilter import curvature
from eigenfilter.integrations.transformers import SharpnessAwareTrainer, SharpnessCallback

FINE_TUNED = "debugger"  # the page about pdb
LENGTH = 64  # characters in a sequence
VOCABULARY = 128  # ASCII


def sequences(text: str) -> list[dict[str, Tensor]]:
    """The sequences of a text, one after another; its labels are the text itself."""
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
    rows = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def make_model() -> Any:
    """A GPT-2 of two layers, with the weights of its initialization."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return transformers.GPT2LMHeadModel(config)


def add_adapters(model: Any, rank: int, seed: int) -> Any:
    """The model with adapters, which alone are trained."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    return peft.get_peft_model(copy.deepcopy(model), config)


def train(
    trainer_class: Any, model: Any, data: Any, options: argparse.Namespace, lr: float, **more: Any
) -> float:
    """Train; return the loss of the last tenth of the steps."""
    steps = more.pop("max_steps")
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        )
        trainer = trainer_class(model=model, args=arguments, train_dataset=data, **more)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[-1])


def sharpness(model: Any, data: list[dict[str, Tensor]], samples: int) -> float:
    """The largest eigenvalue of the Hessian in the adapters, over the first samples."""
    rows = torch.stack([row["input_ids"] for row in data[:samples]])
    operator = curvature.causal_lm(model, [{"input_ids": part} for part in rows.split(32)])
    return float(curvature.eigsh(operator, k=1, tol=1e-2).values[0])


def follow(data: list[dict[str, Tensor]], every: int) -> SharpnessCallback:
    """The callback that prints the sharpness at every so many steps, on a probe of one step."""

    def show(check: ef.monitor.SharpnessCheck) -> None:
        print(f"  step {check.step}: sharpness {check.sharpness:.4g}, edge {check.edge:.4g}")

    probe = {"input_ids": torch.stack([row["input_ids"] for row in data[:16]])}
    return SharpnessCallback(probe, every, tol=1e-2, callback=show)


def draw(callback: SharpnessCallback, file: Path) -> None:
    """Draw what the callback has measured."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    callback.monitor.plot(axes)
    axes.set(yscale="log", title="LoRA with AdamW: preconditioned sharpness, and the edge")
    figure.savefig(file, dpi=150)


def main() -> None:
    """Train, fine-tune twice, and print what both runs have come to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", default="sam", help="ascent of the second run: sam, usam, ... (%(default)s)")
    add("--rho", type=float, default=0.1, help="its radius (%(default)s)")
    add("--rank", type=int, default=4, help="rank of the adapters (%(default)s)")
    add("--steps", type=int, default=100, help="steps of each fine-tuning (%(default)s)")
    add("--first-steps", type=int, default=300, help="steps before it (%(default)s)")
    add("--samples", type=int, default=128, help="sequences for the sharpness (%(default)s)")
    add("--every", type=int, default=0, help="steps between checks in the first run; 0: none")
    add("--figure", type=Path, help="file for a figure of these checks, as sharpness.png")
    add("--seed", type=int, default=0, help="seed of everything (%(default)s)")
    options = parser.parse_args()
    if options.figure and not options.every:
        parser.error("--figure draws the checks: pass --every too")

    torch.manual_seed(options.seed)
    model = make_model()
    pages = [text for name, text in sorted(topics.items()) if name != FINE_TUNED]
    print(f"Training on {len(pages)} pages about Python", flush=True)
    first = sequences("".join(pages))
    train(transformers.Trainer, model, first, options, 3e-3, max_steps=options.first_steps)

    data = sequences(topics[FINE_TUNED])
    methods = {
        "AdamW": {"rho": 0.0},
        f"AdamW, {options.method}": {"method": options.method, "rho": options.rho},
    }
    results = []
    for name, arguments in methods.items():
        print(f"Fine-tuning on the page about pdb: {name}", flush=True)
        adapted = add_adapters(model, options.rank, options.seed)
        watch = [follow(data, options.every)] if options.every and not results else []
        start = time.perf_counter()
        loss = train(
            SharpnessAwareTrainer,
            adapted,
            data,
            options,
            3e-3,
            max_steps=options.steps,
            optimizer_cls_and_kwargs=(ef.AdamW, arguments),
            callbacks=watch,
        )
        for callback in watch:
            checks = sum(check.seconds for check in callback.monitor.history)
            print(f"  the checks took {checks / (time.perf_counter() - start):.1%} of the time")
            if options.figure:
                draw(callback, options.figure)
        results.append((name, loss, sharpness(adapted, data, options.samples)))
    for name, loss, value in results:
        print(f"{name}: loss {loss:.3f}, sharpness {value:.2f}")


if __name__ == "__main__":
    main()
