"""Train GPT-2 on a text, in steps that a later call goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from text import batches
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import eigenfilter as ef
from eigenfilter.experiments.files import replace

SHAPES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50_257},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 300},
}
LR, BETAS, WEIGHT_DECAY, WARMUP = 6e-4, (0.9, 0.95), 0.1, 100
SAVE_EVERY = 300.0  # seconds


def build(shape: str) -> Any:
    """Return GPT-2 with the weights of its initialization, without dropout."""
    torch.manual_seed(0)
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    sizes = SHAPES[shape]
    last = sizes["vocab_size"] - 1
    config = GPT2Config(
        **sizes, **dropout, bos_token_id=last, eos_token_id=last, loss_type="ForCausalLM"
    )
    return GPT2LMHeadModel(config)


def train(model: Any, rows: Tensor, size: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train for `steps` steps of AdamW in bfloat16, from where an earlier call ended.

    The folder gets checkpoint.pt, every five minutes and at the end, and losses.jsonl.

    Returns:
        How it went: the number of steps, the minutes, and the mean loss of the last 50 steps.
    """
    opt = ef.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": []}
    file = folder / "checkpoint.pt"
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state.pop("model"))
        opt.load_state_dict(state.pop("optimizer"))

    def save() -> None:
        everything = state | {"model": model.state_dict(), "optimizer": opt.state_dict()}
        replace(file, lambda out: torch.save(everything, out))
        numbered = enumerate(state["losses"], 1)
        lines = "".join(json.dumps({"step": i, "loss": loss}) + "\n" for i, loss in numbered)
        (folder / "losses.jsonl").write_text(lines)

    if state["step"] < steps:
        _run(model, opt, batches(rows, size, state["step"]), steps, state, save)
        save()
    recent = state["losses"][-50:]
    return {
        "steps": state["step"],
        "minutes": state["seconds"] / 60,
        "loss": sum(recent) / len(recent),
    }


def _run(
    model: Any,
    opt: ef.AdamW,
    data: Iterator[Tensor],
    steps: int,
    state: dict[str, Any],
    save: Callable[[], None],
) -> None:
    model.train()
    saved = start = time.monotonic()
    first = state["step"]
    for step in range(first, steps):
        ids = next(data)
        for group in opt.param_groups:
            group["lr"] = LR * _schedule(step, steps)
        began = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        now = time.monotonic()
        state["step"] = step + 1
        state["seconds"] += now - began
        state["losses"].append(loss.item())
        if (step + 1) % 10 == 0:
            left = (now - start) / (step + 1 - first) * (steps - step - 1) / 60
            print(f"step {step + 1} of {steps}: loss {loss:.3f}, {left:.0f} min left", flush=True)
        if now - saved > SAVE_EVERY:
            save()
            saved = time.monotonic()


def _schedule(step: int, steps: int) -> float:
    """The part of LR: a linear start, then half a cosine to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    part = (step - WARMUP) / max(steps - WARMUP, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * part))


@torch.no_grad()
def loss(model: Any, rows: Tensor, size: int) -> float:
    """Return the mean loss of sequences, in float32."""
    model.eval()
    parts = (rows[i : i + size] for i in range(0, len(rows), size))
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids in parts]
    return sum(losses) / len(losses)
