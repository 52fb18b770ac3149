"""torch.optim.AdamW's implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter

CLASS = torch.optim.AdamW


def settings(lr: float) -> dict[str, Any]:
    """Those of the contests."""
    return {"lr": lr}


def fused(params: Sequence[Parameter], lr: float) -> torch.optim.AdamW:
    """One fused kernel over all tensors."""
    return torch.optim.AdamW(params, **settings(lr), fused=True)


def foreach(params: Sequence[Parameter], lr: float) -> torch.optim.AdamW:
    """One multi-tensor call an operation."""
    return torch.optim.AdamW(params, **settings(lr), foreach=True)
