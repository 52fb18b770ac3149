"""Curvature of a loss: products with its Hessian and kin, and the eigenpairs they give.

Operators see models; solvers see only operators.
"""

from __future__ import annotations

from eigenfilter.curvature.language_models import causal_lm
from eigenfilter.curvature.loss.linear_cross_entropy import LinearLogits, linear_cross_entropy
from eigenfilter.curvature.operators.base import CurvatureOperator
from eigenfilter.curvature.operators.fisher import EmpiricalFisherOperator
from eigenfilter.curvature.operators.ggn import GGNOperator
from eigenfilter.curvature.operators.hessian import HessianOperator
from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.cost import Cost, eigsh_cost
from eigenfilter.curvature.solvers.density import SpectralDensity, log_determinant, spectral_density
from eigenfilter.curvature.solvers.eigsh import eigsh
from eigenfilter.curvature.solvers.estimates import Estimate
from eigenfilter.curvature.solvers.result import EigenResult
from eigenfilter.curvature.solvers.spectrum_bounds import (
    SpectrumBound,
    SpectrumBounds,
    spectrum_bounds,
)
from eigenfilter.curvature.solvers.traces import diagonal, trace

__all__ = [
    "Cost",
    "CurvatureOperator",
    "EigenResult",
    "EmpiricalFisherOperator",
    "Estimate",
    "GGNOperator",
    "HessianOperator",
    "LinearLogits",
    "SpectralDensity",
    "SpectrumBound",
    "SpectrumBounds",
    "SymmetricOperator",
    "causal_lm",
    "diagonal",
    "eigsh",
    "eigsh_cost",
    "linear_cross_entropy",
    "log_determinant",
    "spectral_density",
    "spectrum_bounds",
    "trace",
]
