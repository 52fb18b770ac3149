"""The distance from an equilibrium, by the optimizer's own direction."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

import eigenfilter as ef
from certificate.tasks import SGD, Build, Network, certify, spectrum
from eigenfilter.certificate.equilibrium import direction
from quadratics import Quadratic


def test_a_point_that_is_no_equilibrium() -> None:
    task = Quadratic(spectrum(0.1, 5))
    task.move(0.1)
    result = certify(task, SGD(task.parameters()))
    assert result.verdict == "not an equilibrium"
    with torch.no_grad():
        gradient = task.H @ task(None)
        x = torch.cat(list(task.x))
    assert result.gradient_norm == pytest.approx(float(gradient.norm()))
    assert result.direction_norm == pytest.approx(float(gradient.norm()))
    assert result.distance == pytest.approx(float(gradient.norm() / (5 * x.norm())), rel=1e-2)
    assert result.distance <= float(task(None).detach().norm() / x.norm()) * 1.01
    loose = certify(task, SGD(task.parameters()), equilibrium_tol=1.0)
    assert loose.verdict == "inside"


METHODS: dict[str, Build] = {
    "sgd": lambda p: ef.SGD(p, lr=0.1, weight_decay=0.3),
    "maximized": lambda p: ef.USAM(p, lr=0.1, rho=0.07, weight_decay=0.3, maximize=True),
    "usam": lambda p: ef.USAM(p, lr=0.1, rho=0.07, weight_decay=0.3),
    "sam": lambda p: ef.SAM(p, lr=0.1, rho=0.07),
    "asam": lambda p: ef.SAM(p, lr=0.1, rho=0.07, adaptive=True),
    "sequential": lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=0.07),
    "anchored": lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=0.07, ascent="anchored", maximize=True),
    "hessian": lambda p: ef.HessianUSAM(p, lr=0.1, rho=0.07, hvp="autograd"),
    "hessian, maximized": lambda p: ef.HessianUSAM(
        p, lr=0.1, rho=0.07, hvp="autograd", maximize=True
    ),
}


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", METHODS)
def test_the_direction_is_the_optimizers_own(name: str, groups: bool) -> None:
    task = Network()
    first, *rest = task.model.parameters()
    opt = METHODS[name]([{"params": [first]}, {"params": rest}] if groups else [first, *rest])
    if groups and "rho" in opt.param_groups[0]:
        opt.param_groups[0]["rho"] = 0.0
    result = direction(task.op, opt).vector
    before = task.point()
    task.step(opt)
    assert torch.allclose((before - task.point()) / 0.1, result, rtol=1e-6, atol=1e-9)


def test_adamws_direction_vanishes_where_it_stays() -> None:
    task = Network()
    opt = ef.AdamW(task.model.parameters(), lr=1e-2, betas=(0.0, 0.5), weight_decay=0.2, eps=0.1)
    task.step(opt, 3)
    before = task.point()
    result = direction(task.op, opt).vector
    opt.param_groups[0]["betas"] = (0.0, 1.0 - 1e-12)  # keeps v where it is
    scale = 1 - 0.5 ** float(opt.state[opt.param_groups[0]["params"][0]]["step"])
    v = torch.cat([opt.state[p]["exp_avg_sq"].reshape(-1) for p in task.model.parameters()])
    P = (v / scale).sqrt() + 0.1
    g = task.op.gradient()
    assert torch.allclose(result, g + 0.2 * P * before)


class OwnSAM(torch.optim.SGD):
    """Ascents that nobody has described: its groups have a rho."""

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["rho"] = 0.05


def test_unknown_ascents_are_refused() -> None:
    task = Quadratic(spectrum(0.1, 5))
    with pytest.raises(TypeError, match="no direction is known for an ascent"):
        certify(task, OwnSAM(task.parameters()))
