"""Curvature of a loss: products with its Hessian and kin, and the eigenpairs they give.

Operators see models; solvers see only operators.
"""

from __future__ import annotations

from eigenfilter.curvature.cost import Cost, eigsh_cost
from eigenfilter.curvature.density import SpectralDensity, log_determinant, spectral_density
from eigenfilter.curvature.estimates import Estimate
from eigenfilter.curvature.extremes import Extreme, Extremes, extremes
from eigenfilter.curvature.fisher import EmpiricalFisherOperator
from eigenfilter.curvature.ggn import GGNOperator
from eigenfilter.curvature.hessian import HessianOperator
from eigenfilter.curvature.lanczos import eigsh
from eigenfilter.curvature.operators import CurvatureOperator
from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.result import EigenResult
from eigenfilter.curvature.traces import diagonal, trace

__all__ = [
    "Cost",
    "CurvatureOperator",
    "EigenResult",
    "EmpiricalFisherOperator",
    "Estimate",
    "Extreme",
    "Extremes",
    "GGNOperator",
    "HessianOperator",
    "SpectralDensity",
    "SymmetricOperator",
    "diagonal",
    "eigsh",
    "eigsh_cost",
    "extremes",
    "log_determinant",
    "spectral_density",
    "trace",
]
