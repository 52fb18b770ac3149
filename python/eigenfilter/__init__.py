"""eigenfilter: optimizers as eigenvalue filters, for PyTorch.

An optimizer that converges has filtered the curvature of the point it converged to (Bolte, Le,
Pauwels, arXiv 2510.09034). Here are the optimizers, with fused updates (`SGD`, `SAM`, `USAM`,
`TwoStepUSAM`, `HessianUSAM`, `AdamW`, and `SharpnessAware` around any other), schedules of rho
(`schedulers`), their kernels (`kernels`), the theory as functions (`filters`), Hessian spectra
to check it with (`curvature`), and a verdict on a trained model (`certify`).
"""

from importlib.metadata import version

import torch  # noqa: F401  (first: the core then shares torch's OpenMP pool)

from eigenfilter import curvature, filters, kernels, schedulers
from eigenfilter.certificate import Certificate, certify
from eigenfilter.monitor import SharpnessMonitor
from eigenfilter.optimizers import (
    SAM,
    SGD,
    USAM,
    AdamW,
    HessianUSAM,
    SharpnessAware,
    TwoStepUSAM,
    freeze_batch_norm,
    freeze_running_stats,
)

__version__ = version("eigenfilter")
__all__ = [
    "SAM",
    "SGD",
    "USAM",
    "AdamW",
    "Certificate",
    "HessianUSAM",
    "SharpnessAware",
    "SharpnessMonitor",
    "TwoStepUSAM",
    "certify",
    "curvature",
    "filters",
    "freeze_batch_norm",
    "freeze_running_stats",
    "kernels",
    "schedulers",
]
