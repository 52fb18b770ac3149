"""Drop-in optimizers whose updates are fused kernels over all tensors at once."""

from eigenfilter._running_stats import freeze_batch_norm, freeze_running_stats
from eigenfilter.optimizers.adamw import AdamW
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.hessian_usam import HessianUSAM
from eigenfilter.optimizers.sam import SAM
from eigenfilter.optimizers.sgd import SGD
from eigenfilter.optimizers.two_step_usam import TwoStepUSAM
from eigenfilter.optimizers.usam import USAM
from eigenfilter.optimizers.wrapper import SharpnessAware

__all__ = [
    "SAM",
    "SGD",
    "USAM",
    "AdamW",
    "EigenfilterOptimizer",
    "HessianUSAM",
    "SharpnessAware",
    "TwoStepUSAM",
    "freeze_batch_norm",
    "freeze_running_stats",
]
