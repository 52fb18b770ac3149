"""Curvature of a loss: products with its Hessian and kin, and the eigenpairs they give.

Operators see models; solvers see only operators.
"""

from __future__ import annotations

from eigenfilter.curvature.fisher import EmpiricalFisherOperator
from eigenfilter.curvature.ggn import GGNOperator
from eigenfilter.curvature.lanczos import SymmetricOperator, eigsh
from eigenfilter.curvature.operators import CurvatureOperator, HessianOperator
from eigenfilter.curvature.result import EigenResult

__all__ = [
    "CurvatureOperator",
    "EigenResult",
    "EmpiricalFisherOperator",
    "GGNOperator",
    "HessianOperator",
    "SymmetricOperator",
    "eigsh",
]
