"""A text as tokens: a vocabulary by byte-pair encoding, and stretches of equal length."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.files import replace

HELD_OUT = 0.05  # the end of the text, which nothing is trained on


def encode(text: Path, vocabulary: int, file: Path) -> Tensor:
    """Return the tokens [n] of a text, from the file where an earlier call put them.

    The tokenizer learns its vocabulary from the text itself.
    """
    if file.exists():
        kept: Tensor = torch.load(file)
        return kept.long()
    print(f"learning {vocabulary:,} tokens from {text}", flush=True)
    content = read(text)
    tokenizer = ByteLevelBPETokenizer()
    pieces = (content[i : i + 1_000_000] for i in range(0, len(content), 1_000_000))
    tokenizer.train_from_iterator(pieces, vocabulary, show_progress=False)
    if tokenizer.get_vocab_size() < vocabulary:
        raise UserError(
            f"{text} has only {tokenizer.get_vocab_size():,} different tokens of "
            f"{vocabulary:,}: pass a longer text"
        )
    lines = content.splitlines(keepends=True)
    ids = [i for encoding in tokenizer.encode_batch(lines) for i in encoding.ids]
    tokens = torch.tensor(ids, dtype=torch.int32)
    replace(file, lambda out: torch.save(tokens, out))
    return tokens.long()


def read(path: Path) -> str:
    """Return the content of a text file, which gzip (or dictzip) may have compressed."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode(
            "utf-8", "replace"
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def split(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return stretches [m, length] to train on, and stretches that are held out."""
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    held_out = max(round(HELD_OUT * len(rows)), 1)
    return rows[:-held_out], rows[-held_out:]


def batches(rows: Tensor, size: int, first: int) -> Iterator[Tensor]:
    """Yield batches [size, length] from number `first` on: each epoch in an order of its own."""
    per_epoch = len(rows) // size
    number = first
    while True:
        epoch, place = divmod(number, per_epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        yield rows[order[place * size : (place + 1) * size]]
        number += 1
