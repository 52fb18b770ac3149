"""Looks at the spectrum of what an optimizer does, until both sides of its filter are decided."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from eigenfilter.certificate.linearized import Linearized
from eigenfilter.certificate.sides import (
    AT_THE_EDGE,
    INSIDE,
    OUTSIDE,
    UNDECIDED,
    Interval,
    Side,
    Tolerances,
    in_second_interval,
    saddle_by_image,
    saddle_side,
    upper_side,
)
from eigenfilter.curvature import SpectrumBounds, spectrum_bounds
from eigenfilter.curvature.operators.preconditioned import PreconditionedOperator
from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.filters import PolynomialFilter


class Look:
    """Runs of Lanczos' iteration, each from a start of its own."""

    def __init__(
        self,
        failure_probability: float,
        max_matvecs: int,
        basis_device: torch.device | str | None,
        seed: int,
    ) -> None:
        self._given = failure_probability, max_matvecs, basis_device
        # Mixed: the same generator with the same seed may have drawn the model's parameters.
        self._random = random.Random(f"eigenfilter.certify {seed}")
        self.products = 0  # of H

    def __call__(
        self,
        matrix: SymmetricOperator,
        enough: Callable[[SpectrumBounds], bool],
        *,
        products: int = 1,
        share: float = 1.0,
    ) -> SpectrumBounds:
        """`spectrum_bounds` with a share of the failure probability."""
        failure_probability, max_matvecs, basis_device = self._given
        found = spectrum_bounds(
            matrix,
            share * failure_probability,
            max_matvecs,
            enough=enough,
            basis_device=basis_device,
            seed=self._random.getrandbits(63),
        )
        self.products += products * found.matvecs
        return found


@dataclass(frozen=True)
class SideVerdict:
    """Both sides, and the spectrum's ends; no sides where there is no filter."""

    found: SpectrumBounds
    upper: Side | None = None
    saddle: Side | None = None
    needed: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The worse side's."""
        verdicts = [
            UNDECIDED if side is None else side.verdict for side in (self.upper, self.saddle)
        ]
        return next(v for v in (OUTSIDE, UNDECIDED, AT_THE_EDGE, INSIDE) if v in verdicts)


def judge(seen: Linearized, tolerances: Tolerances, look: Look) -> SideVerdict:
    """Look at the matrix until both sides are decided and the error bars small."""
    intervals = seen.filter.intervals()
    if not intervals:
        found = look(seen.operator, tolerances.sharp, products=seen.products)
        nothing = Side(OUTSIDE, -math.inf, 0.0, found.bottom.value, found.top.value)
        return SideVerdict(found, nothing, nothing)
    *below, (_, edge) = intervals
    if seen.lower is not None:
        return _judge_apart(seen, seen.lower, intervals, tolerances, look)
    flt = seen.filter
    parabola = isinstance(flt, PolynomialFilter) and len(flt.coefficients) == 3 and bool(below)
    share = 0.5 if parabola else 1.0  # a second look may follow

    def sides(found: SpectrumBounds) -> tuple[Side, Side]:
        return (
            upper_side(found, edge, tolerances),
            saddle_side(found, intervals, tolerances),
        )

    def enough(found: SpectrumBounds) -> bool:
        upper, saddle = sides(found)
        decided = saddle.verdict != UNDECIDED or in_second_interval(saddle, found)
        return decided and upper.verdict != UNDECIDED and tolerances.sharp(found)

    found = look(seen.operator, enough, products=seen.products, share=share)
    upper, saddle = sides(found)
    if parabola and in_second_interval(saddle, found):
        assert isinstance(flt, PolynomialFilter)
        saddle = _look_between(seen, flt, saddle, tolerances, look, share)
    return SideVerdict(found, upper, saddle, _needed(upper, saddle))


def _judge_apart(
    seen: Linearized,
    lower: SymmetricOperator,
    intervals: Sequence[Interval],
    tolerances: Tolerances,
    look: Look,
) -> SideVerdict:
    """Decide each side by its own matrix; what is found is the lower one's, but for the top."""

    def upper_of(found: SpectrumBounds) -> Side:
        return upper_side(found, intervals[-1][1], tolerances)

    def saddle_of(found: SpectrumBounds) -> Side:
        return saddle_side(found, intervals, tolerances)

    def until(side: Callable[[SpectrumBounds], Side]) -> Callable[[SpectrumBounds], bool]:
        return lambda found: side(found).verdict != UNDECIDED and tolerances.sharp(found)

    above = look(seen.operator, until(upper_of), products=seen.products, share=0.5)
    below = look(lower, until(saddle_of), products=seen.products, share=0.5)
    upper, saddle = upper_of(above), saddle_of(below)
    return SideVerdict(replace(below, top=above.top), upper, saddle, _needed(upper, saddle))


def _needed(upper: Side, saddle: Side) -> tuple[str, ...]:
    sides = (("upper edge", upper), ("saddle side", saddle))
    return tuple(f"{name}: {side.needed}" for name, side in sides if side.needed)


def _look_between(
    seen: Linearized,
    flt: PolynomialFilter,
    saddle: Side,
    tolerances: Tolerances,
    look: Look,
    share: float,
) -> Side:
    """Decide the saddle side by the spectrum of H + rho H^2."""
    op = seen.operator
    ones = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)
    image = PreconditionedOperator(op, ones, flt.coefficients[2])

    def judged(found: SpectrumBounds) -> Side:
        return saddle_by_image(saddle, flt, found, tolerances)

    found = look(image, lambda f: judged(f).verdict != UNDECIDED, products=2, share=share)
    return judged(found)
