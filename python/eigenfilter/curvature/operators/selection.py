"""The parameters that a curvature matrix is of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN = 4  # names that a message shows


def select(
    params: str | Iterable[object], model: nn.Module, dtype: torch.dtype | None
) -> tuple[nn.Parameter, ...]:
    """Return those of `params` that require grad, checked to be of one real dtype and device.

    params: parameters, or patterns for their names in the model.
    """
    if isinstance(params, Tensor):
        raise ValueError("params must be parameters in a list or iterator: pass [p] for one")
    candidates: list[Any] = [params] if isinstance(params, str) else list(params)
    patterns = [item for item in candidates if isinstance(item, str)]
    if patterns and len(patterns) == len(candidates):
        candidates = _matching(patterns, model)
    if not all(isinstance(p, Tensor) for p in candidates):
        names = ", ".join(sorted({type(p).__name__ for p in candidates}))
        raise ValueError(f"params must be parameters, as model.parameters() gives, not {names}")
    selected = tuple(p for p in candidates if p.requires_grad)
    if not selected:
        raise ValueError(
            f"no parameter requires grad, of {len(candidates)}: call p.requires_grad_() on those "
            "that the matrix is of"
        )
    if len({id(p) for p in selected}) < len(selected):
        raise ValueError("params lists a parameter twice")
    kinds = {(p.dtype if dtype is None else dtype, p.device) for p in selected}
    if len(kinds) > 1 or not all(p.dtype.is_floating_point for p in selected):
        raise ValueError(
            "parameters must be real and floating, of one dtype and on one device; got "
            + ", ".join(sorted(f"{kind} on {device}" for kind, device in kinds))
            + ": pass dtype=torch.float32 for one dtype, params=... or model.to(device) for one "
            "device"
        )
    if selected[0].device.type == "meta":
        raise ValueError(
            "parameters on the meta device hold no numbers: load the weights first, as by "
            "model.to_empty(device=...) and load_state_dict"
        )
    if dtype is None and selected[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameters are {selected[0].dtype}, too coarse to multiply by their curvature: pass "
            "dtype=torch.float32, for that of a float32 copy of the model"
        )
    return selected


def _matching(patterns: Sequence[str], model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with a name that matches one of the patterns, each once."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            shown = ", ".join(list(named)[:_SHOWN])
            raise ValueError(
                f"no parameter's name matches {pattern!r}, of {len(named)} such as {shown}: see "
                "model.named_parameters()"
            )
    matching = [p for name, p in named.items() if any(fnmatchcase(name, x) for x in patterns)]
    return list({id(p): p for p in matching}.values())
