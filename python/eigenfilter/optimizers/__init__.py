"""Drop-in optimizers whose updates are fused kernels over all tensors at once."""

from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers.batch_norm import freeze_batch_norm
from eigenfilter.optimizers.sgd import SGD
from eigenfilter.optimizers.usam import USAM

__all__ = ["SGD", "USAM", "EigenfilterOptimizer", "freeze_batch_norm"]
