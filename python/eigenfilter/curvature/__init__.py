"""Curvature of a loss: Hessian-vector products and the eigenpairs they give.

Operators see models; solvers see only operators.
"""

from __future__ import annotations

from eigenfilter.curvature.lanczos import SymmetricOperator, eigsh
from eigenfilter.curvature.operators import HessianOperator
from eigenfilter.curvature.result import EigenResult

__all__ = ["EigenResult", "HessianOperator", "SymmetricOperator", "eigsh"]
