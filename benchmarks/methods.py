"""The optimizers of the library, and who takes the same steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

import eigenfilter
from benchmarks.contest import Setting
from benchmarks.peers import pytorch_optimizer_sam, torch_adamw, torch_sgd
from benchmarks.peers.common_sam import CommonSAM
from benchmarks.peers.foreach_sam import ForeachSAM
from benchmarks.peers.pytorch_optimizer_sam import PytorchOptimizerSAM
from eigenfilter.optimizers import EigenfilterOptimizer

LR, MOMENTUM, RHO = 0.01, 0.9, 0.05

HEAVY_BALL = {"lr": LR, "momentum": MOMENTUM}

Make = Callable[[list[Parameter]], Any]
"""An optimizer of parameters; `moves` says how it steps."""


@dataclass(frozen=True)
class Method:
    """An optimizer of the library and what it is compared with.

    Attributes:
        make: the library's, from parameters and a backend.
        ascents: gradients it takes beside the last.
        accesses: reads and writes of every element that a step has to do.
        name: of its ascents; "" for none.
        base: settings of the peers' base, and its implementations.
    """

    make: Callable[[list[Parameter], str], EigenfilterOptimizer]
    ascents: int
    accesses: int
    name: str = ""
    base: Any = torch_sgd

    def contenders(self, setting: Setting) -> tuple[dict[str, Make], tuple[str, ...]]:
        """Who takes these steps, the library first; and a line for each who is missing."""
        base, name = self.base, self.name
        makes: dict[str, Make] = {"eigenfilter": lambda p: self.make(p, setting.backend)}
        if not name:
            makes["torch fused"] = lambda p: base.fused(p, LR)
            makes["torch foreach"] = lambda p: base.foreach(p, LR)
            return makes, ()
        around = {"method": name, "rho": RHO, "base": base.CLASS, **base.settings(LR)}
        makes["common SAM"] = lambda p: CommonSAM(p, **around)
        makes["foreach SAM"] = lambda p: ForeachSAM(p, name, RHO, base.fused(p, LR))
        if name not in pytorch_optimizer_sam.METHODS:
            return makes, ()
        if not pytorch_optimizer_sam.installed():
            return makes, (pytorch_optimizer_sam.MISSING,)
        makes[pytorch_optimizer_sam.NAME] = lambda p: PytorchOptimizerSAM(p, **around)
        return makes, ()

    def moves(self, opt: Any) -> list[Callable[[], object]]:
        """What an optimizer does with each gradient of a step."""
        descend = opt.descend if hasattr(opt, "base_optimizer") else opt.step
        return [*[opt.ascend] * self.ascents, descend] if self.name else [descend]


def _sgd_with(cls: Callable[..., EigenfilterOptimizer], **options: Any) -> Any:
    return lambda params, backend: cls(params, **HEAVY_BALL, backend=backend, **options)


def _adamw(params: list[Parameter], backend: str, rho: float = 0.0) -> EigenfilterOptimizer:
    return eigenfilter.AdamW(params, lr=LR, rho=rho, backend=backend)


# Accesses. Descent: heavy ball reads x, g, m and writes x, m; AdamW reads x, g, m, v and writes x,
# m, v; from a backup they read that in place of x. Ascent: reads x, g and writes x, b. SAM's norm
# reads g, ASAM's x too; a second ascent reads x, g and writes x; a finite difference has norms of x
# and g, copies g, moves, and then reads b, g, g0 and writes x.
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
