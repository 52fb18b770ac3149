"""The optimizers of the library, and the peers that take the same steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

import eigenfilter
from benchmarks.comparison import Setting
from benchmarks.peers import pytorch_optimizer_sam, torch_adamw, torch_sgd
from benchmarks.peers.common_sam import CommonSAM
from benchmarks.peers.foreach_sam import ForeachSAM
from benchmarks.peers.pytorch_optimizer_sam import PytorchOptimizerSAM
from eigenfilter.optimizers import EigenfilterOptimizer

LR, MOMENTUM, RHO = 0.01, 0.9, 0.05

SGD_OPTIONS = {"lr": LR, "momentum": MOMENTUM}

OptimizerFactory = Callable[[list[Parameter]], Any]
"""Makes an optimizer from parameters; `Method.actions` says how it steps."""


@dataclass(frozen=True)
class Method:
    """An optimizer of the library and its peers.

    Attributes:
        make: makes the library's optimizer from parameters and a backend.
        ascents: how many gradients a step needs besides the last one.
        accesses: how often a step has to read or write every element.
        name: name of the method of ascent, as the peers take it; "" for none.
        base: the peers' module with the base optimizer: its settings and implementations.
    """

    make: Callable[[list[Parameter], str], EigenfilterOptimizer]
    ascents: int
    accesses: int
    name: str = ""
    base: Any = torch_sgd

    def contenders(self, setting: Setting) -> tuple[dict[str, OptimizerFactory], tuple[str, ...]]:
        """The contenders, the library first, and one line for each that is absent."""
        base, name = self.base, self.name
        factories: dict[str, OptimizerFactory] = {
            "eigenfilter": lambda p: self.make(p, setting.backend)
        }
        if not name:
            factories["torch fused"] = lambda p: base.fused(p, LR)
            factories["torch foreach"] = lambda p: base.foreach(p, LR)
            return factories, ()
        around = {"method": name, "rho": RHO, "base": base.CLASS, **base.settings(LR)}
        factories["common SAM"] = lambda p: CommonSAM(p, **around)
        factories["foreach SAM"] = lambda p: ForeachSAM(p, name, RHO, base.fused(p, LR))
        if name not in pytorch_optimizer_sam.METHODS:
            return factories, ()
        if not pytorch_optimizer_sam.is_installed():
            return factories, (pytorch_optimizer_sam.MISSING,)
        factories[pytorch_optimizer_sam.NAME] = lambda p: PytorchOptimizerSAM(p, **around)
        return factories, ()

    def actions(self, opt: Any) -> list[Callable[[], object]]:
        """The calls of an optimizer in one step, one for each gradient."""
        last = opt.restore_and_step if hasattr(opt, "base_optimizer") else opt.step
        return [*[opt.ascend] * self.ascents, last] if self.name else [last]


def _sgd_with(cls: Callable[..., EigenfilterOptimizer], **options: Any) -> Any:
    return lambda params, backend: cls(params, **SGD_OPTIONS, backend=backend, **options)


def _adamw(params: list[Parameter], backend: str, rho: float = 0.0) -> EigenfilterOptimizer:
    return eigenfilter.AdamW(params, lr=LR, rho=rho, backend=backend)


# Accesses. Descent: SGD with momentum reads x, g, m and writes x, m. AdamW reads x, g, m, v and
# writes x, m, v. After an ascent they read the backup b in place of x. Ascent: it reads x, g and
# writes x, b. SAM's norm reads g; ASAM's reads x too. A second ascent reads x, g and writes x. A
# finite difference takes the norms of x and g, copies g, perturbs x, and then reads b, g, g0 and
# writes x.
METHODS: Mapping[str, Method] = {
    "sgd": Method(_sgd_with(eigenfilter.SGD), 0, 5),
    "usam": Method(_sgd_with(eigenfilter.USAM, rho=RHO), 1, 9, "usam"),
    "sam": Method(_sgd_with(eigenfilter.SAM, rho=RHO), 1, 10, "sam"),
    "asam": Method(_sgd_with(eigenfilter.SAM, rho=RHO, adaptive=True), 1, 11, "asam"),
    "two-step-usam": Method(_sgd_with(eigenfilter.TwoStepUSAM, rho=RHO), 2, 12, "two_step_usam"),
    "hessian-usam": Method(_sgd_with(eigenfilter.HessianUSAM, rho=RHO), 2, 17, "hessian_usam"),
    "adamw": Method(_adamw, 0, 7, base=torch_adamw),
    "adamw-usam": Method(functools.partial(_adamw, rho=RHO), 1, 11, "usam", torch_adamw),
}
