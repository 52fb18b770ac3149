"""Norms of vectors of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norms(v: Tensor) -> Tensor:
    """Return the norms [] or [b] of v [n] or of the columns of v [n, b].

    Squares of the elements may overflow or vanish: then v is scaled by a power of two first.
    """
    plain: Tensor = torch.linalg.vector_norm(v, dim=0)
    info = torch.finfo(v.dtype)
    most = math.sqrt(info.max) / 2
    least = math.sqrt(info.tiny) / info.eps  # so that squares of elements that count are normal
    if not v.numel() or bool(((plain >= least) & (plain <= most)).all()):
        return plain
    exponents = torch.linalg.vector_norm(v, torch.inf, dim=0).frexp().exponent
    half = exponents // 2
    first, second = (torch.ldexp(torch.ones_like(plain), e) for e in (half, exponents - half))
    scaled: Tensor = torch.linalg.vector_norm(v / first / second, dim=0)
    return scaled * first * second
