"""eigenfilter: optimizers as eigenvalue filters, for PyTorch.

An optimizer that converges has filtered the curvature of the point it converged to (Bolte, Le,
Pauwels, arXiv 2510.09034). Here are the optimizers, with fused updates (`SGD`, `USAM`), their
kernels (`kernels`), the theory as functions (`filters`), and Hessian spectra to check it with
(`curvature`).
"""

from importlib.metadata import version

import torch  # noqa: F401  (first: the core then shares torch's OpenMP pool)

from eigenfilter import curvature, filters, kernels
from eigenfilter.optimizers import SGD, USAM, freeze_batch_norm

__version__ = version("eigenfilter")
__all__ = ["SGD", "USAM", "curvature", "filters", "freeze_batch_norm", "kernels"]
