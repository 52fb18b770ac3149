"""Filters: the Hessian eigenvalues that an optimizer admits at the points it converges to.

One class for each method, and `of` for a live optimizer, in plain float64 NumPy.

>>> HeavyBall(lr=0.2).intervals()
[(0.0, 10.0)]
>>> round(USAM(lr=0.2, rho=0.05).max_eigenvalue(), 3)
7.321

Source: Bolte, Le, Pauwels, *Convergence of optimizers implies eigenvalues filtering at
equilibrium*, arXiv 2510.09034.
"""

from __future__ import annotations

from eigenfilter.filters.adamw import AdamW
from eigenfilter.filters.designs import design
from eigenfilter.filters.linear import Linear
from eigenfilter.filters.live import of
from eigenfilter.filters.methods import (
    ASCENTS,
    METHODS,
    MSAM,
    SAM,
    USAM,
    AscentFilter,
    HeavyBall,
    HessianUSAM,
    Nesterov,
    TwoStepUSAM,
)
from eigenfilter.filters.stability import Filter, PolynomialFilter

__all__ = [
    "ASCENTS",
    "METHODS",
    "MSAM",
    "SAM",
    "USAM",
    "AdamW",
    "AscentFilter",
    "Filter",
    "HeavyBall",
    "HessianUSAM",
    "Linear",
    "Nesterov",
    "PolynomialFilter",
    "TwoStepUSAM",
    "design",
    "of",
]
