"""Drop-in optimizers whose updates are fused kernels over all tensors at once."""

import importlib
import pkgutil

from eigenfilter._running_stats import freeze_batch_norm, freeze_running_stats
from eigenfilter.optimizers.adamw import AdamW
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.hessian_usam import HessianUSAM
from eigenfilter.optimizers.hyperparameters import MethodOptions, Options
from eigenfilter.optimizers.local_ascents import ascent_sync
from eigenfilter.optimizers.msam import MSAM
from eigenfilter.optimizers.sam import SAM
from eigenfilter.optimizers.sgd import SGD
from eigenfilter.optimizers.two_step_usam import TwoStepUSAM
from eigenfilter.optimizers.usam import USAM
from eigenfilter.optimizers.wrapper import SharpnessAware

__all__ = [
    "MSAM",
    "SAM",
    "SGD",
    "USAM",
    "AdamW",
    "EigenfilterOptimizer",
    "HessianUSAM",
    "MethodOptions",
    "Options",
    "SharpnessAware",
    "TwoStepUSAM",
    "ascent_sync",
    "freeze_batch_norm",
    "freeze_running_stats",
]

for _module in pkgutil.iter_modules(__path__):  # a module registers its optimizer
    importlib.import_module(f"{__name__}.{_module.name}")
