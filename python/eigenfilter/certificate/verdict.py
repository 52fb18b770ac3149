"""Probes of a spectrum until both sides of an optimizer's filter are decided."""

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


class SpectrumProbe:
    """Bounds of spectra by `spectrum_bounds`, each from a random start of its own.

    Attributes:
        products: number of products with the Hessian so far.
    """

    def __init__(
        self,
        failure_probability: float,
        max_matvecs: int,
        basis_device: torch.device | str | None,
        seed: int,
    ) -> None:
        self._failure_probability = failure_probability
        self._max_matvecs = max_matvecs
        self._basis_device = basis_device
        # Hashed, since the same generator with the same seed may have drawn the model's parameters.
        self._random = random.Random(f"eigenfilter.certify {seed}")
        self.products = 0

    def __call__(
        self,
        matrix: SymmetricOperator,
        enough: Callable[[SpectrumBounds], bool],
        *,
        products: int = 1,
        share: float = 1.0,
    ) -> SpectrumBounds:
        """Return the bounds of a spectrum.

        Args:
            matrix: the operator.
            enough: as in `spectrum_bounds`.
            products: number of products with the Hessian in one product with the matrix.
            share: part of the failure probability that these bounds may use.
        """
        bounds = spectrum_bounds(
            matrix,
            share * self._failure_probability,
            self._max_matvecs,
            enough=enough,
            basis_device=self._basis_device,
            seed=self._random.getrandbits(63),
        )
        self.products += products * bounds.matvecs
        return bounds


@dataclass(frozen=True)
class SideVerdict:
    """The verdicts on both sides of a filter, with the bounds of the spectrum.

    The sides are None if there is no filter.
    """

    bounds: SpectrumBounds
    upper: Side | None = None
    saddle: Side | None = None
    needed: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The verdict on the worse side."""
        verdicts = [
            UNDECIDED if side is None else side.verdict for side in (self.upper, self.saddle)
        ]
        return next(v for v in (OUTSIDE, UNDECIDED, AT_THE_EDGE, INSIDE) if v in verdicts)


def judge(linear: Linearized, tolerances: Tolerances, probe: SpectrumProbe) -> SideVerdict:
    """Probe the matrix until both sides are decided and the error bars are small."""
    intervals = linear.filter.intervals()
    if not intervals:
        bounds = probe(linear.operator, tolerances.sharp, products=linear.products)
        nothing = Side(OUTSIDE, -math.inf, 0.0, bounds.bottom.value, bounds.top.value)
        return SideVerdict(bounds, nothing, nothing)
    *below, (_, edge) = intervals
    if linear.lower is not None:
        return _judge_separately(linear, linear.lower, intervals, tolerances, probe)
    flt = linear.filter
    parabola = isinstance(flt, PolynomialFilter) and len(flt.coefficients) == 3 and bool(below)
    share = 0.5 if parabola else 1.0  # a second probe may follow

    def sides(bounds: SpectrumBounds) -> tuple[Side, Side]:
        return (
            upper_side(bounds, edge, tolerances),
            saddle_side(bounds, intervals, tolerances),
        )

    def enough(bounds: SpectrumBounds) -> bool:
        upper, saddle = sides(bounds)
        decided = saddle.verdict != UNDECIDED or in_second_interval(saddle, bounds)
        return decided and upper.verdict != UNDECIDED and tolerances.sharp(bounds)

    bounds = probe(linear.operator, enough, products=linear.products, share=share)
    upper, saddle = sides(bounds)
    if parabola and in_second_interval(saddle, bounds):
        assert isinstance(flt, PolynomialFilter)
        saddle = _decide_between(linear, flt, saddle, tolerances, probe, share)
    return SideVerdict(bounds, upper, saddle, _missing_evidence(upper, saddle))


def _judge_separately(
    linear: Linearized,
    lower: SymmetricOperator,
    intervals: Sequence[Interval],
    tolerances: Tolerances,
    probe: SpectrumProbe,
) -> SideVerdict:
    """Decide each side by its own matrix; the bounds are those of the lower one, except the top."""

    def upper_of(bounds: SpectrumBounds) -> Side:
        return upper_side(bounds, intervals[-1][1], tolerances)

    def saddle_of(bounds: SpectrumBounds) -> Side:
        return saddle_side(bounds, intervals, tolerances)

    def until(side: Callable[[SpectrumBounds], Side]) -> Callable[[SpectrumBounds], bool]:
        return lambda bounds: side(bounds).verdict != UNDECIDED and tolerances.sharp(bounds)

    above = probe(linear.operator, until(upper_of), products=linear.products, share=0.5)
    below = probe(lower, until(saddle_of), products=linear.products, share=0.5)
    upper, saddle = upper_of(above), saddle_of(below)
    return SideVerdict(
        replace(below, top=above.top), upper, saddle, _missing_evidence(upper, saddle)
    )


def _missing_evidence(upper: Side, saddle: Side) -> tuple[str, ...]:
    sides = (("upper edge", upper), ("saddle side", saddle))
    return tuple(f"{name}: {side.needed}" for name, side in sides if side.needed)


def _decide_between(
    linear: Linearized,
    flt: PolynomialFilter,
    saddle: Side,
    tolerances: Tolerances,
    probe: SpectrumProbe,
    share: float,
) -> Side:
    """Decide the saddle side by the spectrum of H + rho H^2."""
    op = linear.operator
    ones = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)
    image = PreconditionedOperator(op, ones, flt.coefficients[2])

    def decide(bounds: SpectrumBounds) -> Side:
        return saddle_by_image(saddle, flt, bounds, tolerances)

    bounds = probe(image, lambda f: decide(f).verdict != UNDECIDED, products=2, share=share)
    return decide(bounds)
