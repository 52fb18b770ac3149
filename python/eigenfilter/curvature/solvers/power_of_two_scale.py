"""Powers of two that scale numbers so that their squares neither overflow nor vanish."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from eigenfilter.curvature.solvers.basis import Floats
from eigenfilter.curvature.solvers.vector_ops import VectorOps

# Numbers between 2^-e and 2^e, and what a subtraction leaves of them, have normal squares with
# normal sums. A power of two would change no bit there, so none is applied.
_ORDINARY = {torch.float32: 24, torch.float64: 128}
_MOST = 2.0**1000  # so that the sum over processes is finite

Numbers = TypeVar("Numbers", Tensor, Floats, float)


def times_power(t: Numbers, exponent: int) -> Numbers:
    """Return 2^exponent t, exactly unless it is subnormal.

    It takes two steps, because 2^exponent itself may be out of range where the result is not.
    """
    if not exponent:
        return t
    half = exponent // 2
    return (t * 2.0**half) * 2.0 ** (exponent - half)


def exponent_of(ops: VectorOps, t: Tensor) -> int | None:
    """Return e such that 2^e is near the largest magnitude in t, over all slices of its rows.

    None if all elements are zero.
    """
    largest = torch.zeros((), dtype=torch.float64, device=t.device)
    if t.numel():
        largest = torch.linalg.vector_norm(t, torch.inf).double().clamp_max(_MOST)
    size = float(ops.total(largest))  # the sum over slices, which is near enough
    return None if size == 0 else int(torch.tensor(size, dtype=torch.float64).frexp().exponent)


class PowerOfTwoScale:
    """The power of two that scales the products of an operator to ordinary size.

    The first product that is not zero determines it. A solver works on 2^-e H, so that multiplying
    H by a power of two multiplies the results by it and changes nothing else, as long as products
    are normal numbers.

    Attributes:
        exponent: e; 0 if products are of ordinary size.
    """

    def __init__(self, ops: VectorOps) -> None:
        self.exponent = 0
        self._ops = ops
        self._is_set = False

    def down(self, w: Tensor) -> Tensor:
        """Return 2^-e w for products w of H; w itself if e is 0."""
        if not self._is_set:
            exponent = exponent_of(self._ops, w)
            self._is_set = exponent is not None
            if exponent is not None and abs(exponent) > _ORDINARY[w.dtype]:
                self.exponent = exponent
        return times_power(w, -self.exponent)

    def up(self, t: Numbers) -> Numbers:
        """Return 2^e t for eigenvalues t of 2^-e H."""
        return times_power(t, self.exponent)
