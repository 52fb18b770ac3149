"""The methods that the study compares, each an optimizer of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from problems import Problem
from torch import Tensor

import eigenfilter as ef

BETA = 0.9
LATE = 0.6  # the part of training after which late ascents begin
EVERY = 2  # steps from one ascent to the next, of USAM in every k-th step

Params = Iterable[Tensor]
Build = Callable[[Params, float, Problem], ef.optimizers.base.EigenfilterOptimizer]


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Attributes:
        title: its name in figures and tables.
        build: makes the optimizer of parameters, for a learning rate of heavy ball and a problem.
        rho_schedule: kind of its RhoScheduler.
    """

    title: str
    build: Build
    rho_schedule: str = "constant"


def _extrapolated(e: Callable[[Problem], float]) -> Build:
    return lambda params, lr, p: ef.SGD(params, lr=lr, momentum=BETA, extrapolation=e(p))


def _usam(params: Params, lr: float, p: Problem) -> ef.USAM:
    return ef.USAM(params, lr=lr, momentum=BETA, rho=p.rho)


METHODS = {
    "sgd": Method("SGD", _extrapolated(lambda p: 0.0)),
    "effective": Method(
        "SGD, lr / (1 - β), no momentum", lambda params, lr, p: ef.SGD(params, lr=lr / (1 - BETA))
    ),
    "plus": Method(
        "SGD, lr + e, no momentum", lambda params, lr, p: ef.SGD(params, lr=lr + p.ahead[1])
    ),
    "nesterov": Method(
        "Nesterov", lambda params, lr, p: ef.SGD(params, lr=lr, momentum=BETA, nesterov=True)
    ),
    "ahead0": Method("extrapolation, small e", _extrapolated(lambda p: p.ahead[0])),
    "ahead1": Method("extrapolation, middle e", _extrapolated(lambda p: p.ahead[1])),
    "ahead2": Method("extrapolation, large e", _extrapolated(lambda p: p.ahead[2])),
    "msam": Method(
        "MSAM", lambda params, lr, p: ef.MSAM(params, lr=lr, momentum=BETA, rho=p.msam_rho)
    ),
    "back": Method("look-back", _extrapolated(lambda p: -p.back)),
    "usam": Method("USAM", _usam),
    "late": Method("USAM, the last 40%", _usam, "late"),
    "every": Method("USAM, every second step", _usam, "every"),
    "sam": Method("SAM", lambda params, lr, p: ef.SAM(params, lr=lr, momentum=BETA, rho=p.sam_rho)),
}
