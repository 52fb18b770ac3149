"""Norms of vectors of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norms(v: Tensor) -> Tensor:
    """Return the norms [] or [b] of v [n] or of the columns of v [n, b], whatever their size."""
    found: Tensor = torch.linalg.vector_norm(v, dim=0)
    info = torch.finfo(v.dtype)
    most = math.sqrt(info.max) / 2
    least = math.sqrt(info.tiny) / info.eps  # so that squares of what counts in it are normal
    if not v.numel() or bool(((found >= least) & (found <= most)).all()):
        return found
    exponents = torch.linalg.vector_norm(v, torch.inf, dim=0).frexp().exponent
    half = exponents // 2
    first, second = (torch.ldexp(torch.ones_like(found), e) for e in (half, exponents - half))
    near: Tensor = torch.linalg.vector_norm(v / first / second, dim=0)
    return near * first * second
