"""Curvature of causal language models of Transformers, and of others with their interface."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eigenfilter import _distributed
from eigenfilter.curvature.loss.batch_trees import to_device
from eigenfilter.curvature.operators.base import CurvatureOperator
from eigenfilter.curvature.operators.fisher import EmpiricalFisherOperator
from eigenfilter.curvature.operators.ggn import GGNOperator
from eigenfilter.curvature.operators.hessian import HessianOperator

Batch = Mapping[str, Any]

_IGNORED = -100  # the label of a token that does not count, in Transformers and in torch
_HALF = (torch.bfloat16, torch.float16)
_MATRICES: dict[str, type[CurvatureOperator]] = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": EmpiricalFisherOperator,
}


def causal_lm(
    model: nn.Module,
    batches: Batch | list[Any] | DataLoader[Any],
    matrix: str = "hessian",
    *,
    params: str | Iterable[str | nn.Parameter] | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> CurvatureOperator:
    """Return the curvature matrix of a causal language model's loss, by products with vectors.

        f(x) = - 1/N sum_i log p(token i | the tokens before it)

    The sum runs over the N tokens of all batches that count: those with a token before them and a
    label other than -100. It is the loss of the model's own `forward(labels=...)`, of all batches
    as of one, so that batches weigh by their number of such tokens. Logits below float32 are
    converted to it first, as there. What a model adds to its cross-entropy is left out, such as a
    router's auxiliary loss.

    The tokens that count are the samples of the empirical Fisher matrix. The Gauss-Newton matrix is
    the Fisher matrix of the model's own distribution of each next token. Attention runs in a
    backend that can be differentiated twice, whatever `attn_implementation` chose of "sdpa" and
    "eager"; no cache of keys and values is built.

    Args:
        model: the model: one of Transformers' `AutoModelForCausalLM` or of PEFT, or any module
            called as model(**inputs, use_cache=False) whose result has `logits` [b, t, v].
        batches: a batch, a list of batches, or a DataLoader, as a tokenizer with
            return_tensors="pt" or a collator gives them: a dict with `input_ids` [b, t],
            `attention_mask` [b, t] and `labels` [b, t], not shifted. Without labels each token that
            is not masked is a label.
        matrix: "hessian", "ggn" (Gauss-Newton) or "fisher" (the empirical one).
        params: patterns for names of parameters, as "*.h.3.*" for one block or "*lora_*", or
            parameters; None for all. Frozen ones are left out, as those below PEFT's adapters.
        dtype: torch.float32 or torch.float64, in which a copy of the model computes. None is
            float32 for models with weights in bfloat16 or float16, and the model itself for others.
        options: engine, mode, autocast, process_group, memory_budget and seed of
            `CurvatureOperator`.

    Returns:
        A `HessianOperator`, `GGNOperator` or `EmpiricalFisherOperator`.

    Raises:
        ValueError: a batch is not as above, no token counts, or see `CurvatureOperator`.
        RuntimeError: see `CurvatureOperator`.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch, eigenfilter as ef
        >>> class Bigrams(torch.nn.Module):  # in place of AutoModelForCausalLM.from_pretrained(...)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = torch.nn.Parameter(torch.zeros(2, 2))
        ...     def forward(self, input_ids, attention_mask, use_cache):
        ...         return SimpleNamespace(logits=self.table[input_ids])
        >>> batch = {
        ...     "input_ids": torch.tensor([[0, 1, 1], [1, 0, 0]]),
        ...     "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        ... }
        >>> op = ef.curvature.causal_lm(Bigrams(), batch)
        >>> ef.curvature.eigsh(op, k=2).values  # two of three tokens follow a 1, one follows a 0
        tensor([0.3333, 0.1667])

    Source: the loss is `ForCausalLMLoss` of Transformers, with `num_items_in_batch` the number of
    tokens of all batches.
    """
    if matrix not in _MATRICES:
        raise ValueError(f"matrix must be one of {list(_MATRICES)}, not {matrix!r}")
    if dtype is None and isinstance(model, nn.Module):
        dtype = torch.float32 if any(p.dtype in _HALF for p in model.parameters()) else None
    op = _MATRICES[matrix](
        model,
        _losses if matrix == "fisher" else _mean_loss,
        batches,
        params=params,
        forward=_predictions,
        dtype=dtype,
        reduction="mean",
        **options,
    )
    alone = options.get("process_group") is None and not _distributed.is_fsdp(model)
    if alone and not isinstance(batches, DataLoader):
        _check_some_token_counts(batches if isinstance(batches, list) else [batches])
    return op


def _predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits [n, v] of the tokens that count, and the tokens [n]."""
    labels = _labels(batch)
    inputs = dict(to_device(batch, next(model.parameters()).device))
    inputs.pop("labels", None)
    logits = model(**inputs, use_cache=False).logits
    labels = labels.to(logits.device)
    # PEFT puts virtual tokens before the others.
    virtual = logits.shape[1] - labels.shape[1]
    following = F.pad(labels, (virtual, 1), value=_IGNORED)[:, 1:]
    counts = following != _IGNORED
    chosen = logits[counts]
    return chosen.float() if chosen.itemsize < 4 else chosen, following[counts]


def _labels(batch: Batch) -> Tensor:
    """Return the labels [b, t] of a batch, of each token itself and not of the next one.

    Raises:
        ValueError: it is no dict of tensors, or does not tell its labels.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            "a batch must be a dict with input_ids, attention_mask and labels, as a tokenizer with "
            f"return_tensors='pt' or a collator gives it, not {type(batch).__name__}"
        )
    labels, mask = batch.get("labels"), None
    if labels is None:
        labels, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        what = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            "a batch must have labels, or input_ids in their place, as a tensor [sequences, "
            f"tokens] (return_tensors='pt' of a tokenizer makes it); it has {what}, under the keys "
            f"{list(batch)}"
        )
    if mask is None:
        return labels
    if mask.shape != labels.shape:
        raise ValueError(
            f"an attention_mask of shape {list(mask.shape)} does not tell which of the tokens "
            f"{list(labels.shape)} are padding: pass labels, with -100 there"
        )
    return labels.masked_fill(mask == 0, _IGNORED)


def _check_some_token_counts(batches: list[Any]) -> None:
    if not any(bool((_labels(b)[:, 1:] != _IGNORED).any()) for b in batches):
        raise ValueError(
            "no token counts: every label is -100, but for first tokens, which nothing precedes. "
            "Check what the collator masks, or whether prompts fill the whole length"
        )


def _mean_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean over tokens, 0 if there are none: FSDP2 differentiates those batches too."""
    return F.cross_entropy(logits, tokens, reduction="sum") / max(len(tokens), 1)


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits, tokens, reduction="none")
