"""Powers of two that bring numbers to where their squares are numbers too."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from eigenfilter.curvature.solvers.basis import Floats
from eigenfilter.curvature.solvers.vector_ops import VectorOps

# The squares of numbers within 2^-e and 2^e, of what a subtraction leaves of them and the sums of
# such squares are normal. A power of two would change no bit there, and is left out.
_ORDINARY = {torch.float32: 24, torch.float64: 128}
_MOST = 2.0**1000  # the sum of so many, one of each process, is finite

Numbers = TypeVar("Numbers", Tensor, Floats, float)


def times_power(t: Numbers, exponent: int) -> Numbers:
    """Return 2^exponent t, exactly unless it is subnormal.

    In two steps: 2^exponent itself may be out of range where t is at the other end of it.
    """
    if not exponent:
        return t
    half = exponent // 2
    return (t * 2.0**half) * 2.0 ** (exponent - half)


def exponent_of(ops: VectorOps, t: Tensor) -> int | None:
    """Return e with 2^e about the largest element of t, in magnitude, over all slices of its rows;
    None where all are zero."""
    largest = torch.zeros((), dtype=torch.float64, device=t.device)
    if t.numel():
        largest = torch.linalg.vector_norm(t, torch.inf).double().clamp_max(_MOST)
    size = float(ops.total(largest))  # of slices the sum, which does as well
    return None if size == 0 else int(torch.tensor(size, dtype=torch.float64).frexp().exponent)


class PowerOfTwoScale:
    """The power of two by which products of an operator are brought to ordinary size.

    It is that of the first product which is not zero. What a solver sees is 2^-e H, so that a power
    of two as a factor of H changes its results by that factor and in nothing else, as long as
    products are normal numbers.

    Attributes:
        exponent: e; 0 where products are of ordinary size.
    """

    def __init__(self, ops: VectorOps) -> None:
        self.exponent = 0
        self._ops = ops
        self._known = False

    def down(self, w: Tensor) -> Tensor:
        """Return 2^-e w, for products w of H; w itself where e is 0."""
        if not self._known:
            found = exponent_of(self._ops, w)
            self._known = found is not None
            if found is not None and abs(found) > _ORDINARY[w.dtype]:
                self.exponent = found
        return times_power(w, -self.exponent)

    def up(self, t: Numbers) -> Numbers:
        """Return 2^e t, for eigenvalues t of 2^-e H."""
        return times_power(t, self.exponent)
