"""The optimizers of the library, and the peers that take the same steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Parameter

from benchmarks.comparison import Setting
from benchmarks.peers import common_sam, pytorch_optimizer_sam, torch_adamw, torch_sgd
from benchmarks.peers.common_sam import CommonSAM
from benchmarks.peers.foreach_sam import ForeachSAM
from benchmarks.peers.pytorch_optimizer_sam import PytorchOptimizerSAM
from eigenfilter import filters
from eigenfilter.optimizers import EigenfilterOptimizer, registry
from eigenfilter.optimizers.hessian_usam import FiniteDifferencePerturbation
from eigenfilter.optimizers.perturbation import Perturbation

LR, MOMENTUM, RHO = 0.01, 0.9, 0.05

SGD_OPTIONS: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM}

OptimizerFactory = Callable[[list[Parameter]], Any]
"""Makes an optimizer from parameters; `Method.actions` says how it steps."""


@dataclass(frozen=True)
class Method:
    """An optimizer of the library and its peers.

    Attributes:
        make: makes the library's optimizer from parameters, a backend, and further options.
        base: the peers' module with the base optimizer: its settings and implementations.
        name: name of the method of ascent, as the peers take it; "" for none.
        perturbation: the ascents of the method.
    """

    make: Callable[..., EigenfilterOptimizer]
    base: Any
    name: str = ""
    perturbation: Perturbation = field(default_factory=Perturbation)

    @property
    def ascents(self) -> int:
        """How many gradients a step needs besides the last one."""
        return self.perturbation.count

    @property
    def accesses(self) -> int:
        """How often a step has to read or write every element.

        After an ascent, the descent reads the backup in place of x.
        """
        own: int = self.base.ACCESSES
        return own + self.perturbation.accesses

    @property
    def is_difference(self) -> bool:
        """Whether a step takes a finite difference of gradients, which are nearly equal."""
        return isinstance(self.perturbation, FiniteDifferencePerturbation)

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
        if name in common_sam.METHODS:
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


_BASES = {"adamw": torch_adamw}
"""The peers' base optimizer for each update of the library that is not SGD's."""


def _methods() -> Iterator[tuple[str, Method]]:
    """Every method with SGD's update, then every other update, alone and with the first method."""

    def with_method(name: str) -> Method:
        method, options = registry.method_and_options(name)
        make = functools.partial(_make, registry.OPTIMIZERS[method], **SGD_OPTIONS)
        if method not in registry.PERTURBATIONS:
            return Method(make, torch_sgd)
        make = functools.partial(make, rho=RHO, **options)
        return Method(make, torch_sgd, name, registry.perturbation_of(method, **options))

    ours = filters.METHODS.items()  # those with a rho and no ascent have no peer
    plain = [name for name, theory in ours if not theory.takes("rho")]
    ascending = registry.names()
    for name in (*plain, *ascending):
        yield name.replace("_", "-"), with_method(name)
    first = ascending[0]
    for name in registry.updates():
        make = functools.partial(_make, registry.OPTIMIZERS[name], lr=LR)
        yield name, Method(make, _BASES[name])
        ascends = functools.partial(make, method=first, rho=RHO)
        yield (
            f"{name}-{first}",
            Method(ascends, _BASES[name], first, registry.perturbation_of(first)),
        )


def _make(
    cls: Callable[..., EigenfilterOptimizer], params: list[Parameter], backend: str, **options: Any
) -> EigenfilterOptimizer:
    return cls(params, backend=backend, **options)


METHODS: Mapping[str, Method] = dict(_methods())
