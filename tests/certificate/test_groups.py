"""Groups that differ: the composed matrix, and simulated steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from certificate.tasks import certify, spectrum
from quadratics import Quadratic

PIECES = [6, 5]
LONG = 1e13  # after so many steps AdamW's moments need no correction, even for beta2 = 1 - 1e-11


def coupled() -> Tensor:
    """A positive definite matrix that couples the groups."""
    n = sum(PIECES)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return q @ torch.linspace(0.2, 3.0, n, dtype=torch.float64).diag() @ q.T


@dataclass(frozen=True)
class Case:
    """An optimizer of two groups, and the Jacobian of the gradient that it uses."""

    build: Callable[..., Any]
    groups: list[dict[str, Any]]
    shared: dict[str, Any]
    jacobian: Callable[[Tensor, Tensor], Tensor] = lambda H, R: H + H @ R @ H

    def vector(self, of: Callable[[dict[str, Any]], float]) -> Tensor:
        """Return each group's value for each of its parameters."""
        values = [of(self.shared | group) for group in self.groups]
        each = zip(PIECES, values, strict=True)
        return torch.cat([torch.full((m,), float(v), dtype=torch.float64) for m, v in each])

    def optimizer(self, task: Quadratic) -> Any:
        groups = [{"params": [p], **g} for p, g in zip(task.x, self.groups, strict=True)]
        return self.build(groups, **self.shared)

    @property
    def rho(self) -> Tensor:
        return self.vector(lambda g: g.get("rho", 0.0)).diag()

    @property
    def decay(self) -> Tensor:
        return self.vector(lambda g: g.get("weight_decay", 0.0))


def sequential(H: Tensor, R: Tensor) -> Tensor:
    z = torch.eye(len(H), dtype=H.dtype) + R @ H
    return H @ z @ z


def anchored(H: Tensor, R: Tensor) -> Tensor:
    return H + H @ R @ H + H @ R @ H @ R @ H


def hessian(H: Tensor, R: Tensor) -> Tensor:
    ascends = (R != 0).to(H)  # groups without an ascent are left out of both products
    return H + H @ R @ H @ ascends @ H


def rate(group: dict[str, Any]) -> float:
    """Return the learning rate of gradient descent with the same edge."""
    lr, beta = group["lr"], group.get("momentum", 0.0)
    if group.get("nesterov"):
        return lr * (1 + 2 * beta) / (1 + beta)
    reach = lr + 2 * group.get("extrapolation", 0.0)
    return reach * (1 - (group.get("dampening", 0.0) if beta else 0.0)) / (1 + beta)


NESTEROV = {"momentum": 0.6, "nesterov": True}
SGD: dict[str, Case] = {
    "lr": Case(ef.SGD, [{"lr": 0.1}, {"lr": 0.5}], {"momentum": 0.6, "dampening": 0.3}),
    "torch": Case(torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.4}], NESTEROV),
    "momentum": Case(ef.SGD, [{"momentum": 0.2}, {"momentum": 0.9, "lr": 0.3}], {"lr": 0.2}),
    "Nesterov's momentum": Case(
        ef.SGD, [{"momentum": 0.2}, {"momentum": 0.8}], {"lr": 0.2, "nesterov": True}
    ),
    "one Nesterov": Case(ef.SGD, [{"momentum": 0.7, "dampening": 0.2}, NESTEROV], {"lr": 0.2}),
    "extrapolations": Case(
        ef.SGD,
        [{"lr": 0.1, "extrapolation": 0.3}, {"extrapolation": -0.01}],
        {"lr": 0.2, "momentum": 0.6, "dampening": 0.3, "weight_decay": 0.1},
    ),
    "decays": Case(ef.SGD, [{"weight_decay": 0.0}, {"weight_decay": 2.0}], {"lr": 0.2}),
    "radii": Case(ef.USAM, [{"rho": 0.0}, {"rho": 0.3}], {"lr": 0.2, "momentum": 0.5}),
    "all": Case(ef.USAM, [{"rho": 0.2, "lr": 0.1}, {"rho": 0.3, "momentum": 0.5}], {"lr": 0.3}),
    "two-step": Case(
        ef.TwoStepUSAM, [{"rho": 0.2, "lr": 0.1}, {"rho": 0.3}], {"lr": 0.3}, sequential
    ),
    "anchored": Case(
        ef.TwoStepUSAM, [{"rho": 0.2}, {"rho": 0.0}], {"lr": 0.3, "ascent": "anchored"}, anchored
    ),
    "Hessian": Case(ef.HessianUSAM, [{"lr": 0.1}, {"lr": 0.3}], {"rho": 0.1}, hessian),
    "Hessian, one at rest": Case(
        ef.HessianUSAM, [{"rho": 0.1}, {"rho": 0.0}], {"lr": 0.3, "momentum": 0.5}, hessian
    ),
}


def scaled_to(target: float, largest: Callable[[float], float]) -> float:
    """Return where an increasing function has this value."""
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if largest(middle) < target else (low, middle)
    return low


def place_at_equilibrium(task: Quadratic, J: Tensor, W: Tensor) -> None:
    """Set x to the equilibrium, (J + W) x = J 1."""
    rest = torch.linalg.solve(J + W, J.sum(1))
    with torch.no_grad():
        for p, piece in zip(task.x, rest.split(PIECES), strict=True):
            p.copy_(piece)


def growth(task: Quadratic, opt: Any, steps: int) -> float:
    """Return how much a small perturbation of x grows."""
    here = torch.cat([p.detach().clone() for p in task.x])
    task.move(1e-6)
    task.train_with(opt, steps)
    return float((torch.cat([p.detach() for p in task.x]) - here).norm()) / 1e-6


@pytest.mark.parametrize("ratio", [0.85, 1.15], ids=["inside", "outside"])
@pytest.mark.parametrize("name", SGD)
def test_several_groups_by_their_matrix_and_by_simulation(name: str, ratio: float) -> None:
    """Scale a Hessian so that the largest eigenvalue of the step is this part of the edge."""
    case, H = SGD[name], coupled()
    root = case.vector(rate).sqrt()

    def largest(scale: float) -> float:
        J = case.jacobian(scale * H, case.rho) + case.decay.diag()
        return torch.linalg.eigvalsh(root[:, None] * J * root)[-1].item()

    task = Quadratic(scaled_to(2 * ratio, largest) * H, PIECES)
    opt = case.optimizer(task)
    place_at_equilibrium(task, case.jacobian(task.H, case.rho), case.decay.diag())
    result = certify(task, opt)
    assert result.sharpness == pytest.approx(2 * ratio, rel=1e-6)
    assert result.edge == 2.0
    assert result.verdict == ("inside" if ratio < 1 else "outside")
    assert (growth(task, opt, 200) < 1.0) == (ratio < 1)


def test_msams_groups_are_those_of_sgd_at_the_present_norm() -> None:
    """Each with the extrapolation rho / |m|, and a decay of its own."""
    task, rest = Quadratic(coupled(), PIECES), {"lr": 0.2, "momentum": 0.6, "dampening": 0.3}
    groups = [{"rho": 0.3, "weight_decay": 0.7}, {"rho": 0.1, "lr": 0.1, "weight_decay": 0.2}]
    opt = ef.MSAM([{"params": [p], **g} for p, g in zip(task.x, groups, strict=True)], **rest)
    task.move(0.1)
    task.train_with(opt, 5)
    norm = float(opt.param_groups[0]["momentum_norm"])
    each = [{"extrapolation": g.pop("rho") / norm} | g for g in groups]
    opt.eval()
    result = certify(task, opt)
    case = Case(ef.SGD, each, rest)
    root = case.vector(rate).sqrt()
    matrix = root[:, None] * (task.H + case.decay.diag()) * root
    assert result.sharpness == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-6)
    assert result.edge == 2.0
    theirs = certify(task, case.optimizer(task))
    assert result.sharpness == pytest.approx(theirs.sharpness, rel=1e-9)


ADAMW: dict[str, Case] = {
    "lr": Case(ef.AdamW, [{"lr": 0.1}, {"lr": 0.5}], {"betas": (0.6, 0.9)}),
    "decay": Case(torch.optim.AdamW, [{"weight_decay": 0.0}, {"weight_decay": 1.5}], {"lr": 0.3}),
    "extrapolations": Case(
        ef.AdamW,
        [
            {"lr": 0.1, "extrapolation": 0.2, "weight_decay": 0.5},
            {"lr": 0.3, "extrapolation": -0.02, "betas": (0.3, 0.9)},
        ],
        {"betas": (0.6, 0.9)},
    ),
    "back": Case(  # where complex multipliers would decide without the decay
        ef.AdamW,
        [{"extrapolation": -0.03, "weight_decay": 1.7}, {"extrapolation": -0.02}],
        {"lr": 0.3, "betas": (0.9, 0.99), "weight_decay": 1.5},
    ),
    "betas": Case(ef.AdamW, [{"betas": (0.3, 0.9)}, {"betas": (0.9, 0.99)}], {"lr": 0.2}),
    "all": Case(
        ef.AdamW,
        [
            {"lr": 0.1, "betas": (0.3, 0.9), "weight_decay": 0.0, "rho": 0.2},
            {"lr": 0.3, "betas": (0.8, 0.99), "weight_decay": 2.0, "rho": 0.3},
        ],
        {},
    ),
    "two-step": Case(
        ef.AdamW,
        [{"lr": 0.1, "rho": 0.2}, {"lr": 0.3, "rho": 0.3}],
        {"method": "two_step_usam"},
        sequential,
    ),
    "Hessian": Case(
        ef.AdamW,
        [{"lr": 0.1}, {"lr": 0.3, "weight_decay": 0.5}],
        {"method": "hessian_usam", "rho": 0.1},
        hessian,
    ),
}


def preconditioner() -> Tensor:
    return 0.5 + torch.rand(sum(PIECES), dtype=torch.float64)


def at_equilibrium(case: Case, task: Quadratic, P: Tensor) -> Any:
    """Return AdamW at its equilibrium, with a P that further steps hardly change."""
    opt = case.optimizer(task)
    decay = case.vector(lambda g: g.get("weight_decay", 0.01))
    place_at_equilibrium(task, case.jacobian(task.H, case.rho), (P * decay).diag())
    m = -P * decay * torch.cat([p.detach() for p in task.x])  # the gradient at the equilibrium
    pieces = zip(opt.param_groups, m.split(PIECES), P.split(PIECES), strict=True)
    for group, gradient, part in pieces:
        group |= {"betas": (group["betas"][0], 1 - 1e-11), "eps": 0.0}
        opt.state[group["params"][0]] = {
            "step": torch.tensor(LONG),
            "exp_avg": gradient.clone(),
            "exp_avg_sq": part.square(),
        }
    return opt


def beta1(group: dict[str, Any]) -> float:
    return group.get("betas", (0.9, 0.999))[0]


@pytest.mark.parametrize("ratio", [0.85, 1.15], ids=["inside", "outside"])
@pytest.mark.parametrize("name", ADAMW)
def test_adamws_groups_at_the_upper_edge(name: str, ratio: float) -> None:
    case, H, P = ADAMW[name], coupled(), preconditioner()
    beta, lr = case.vector(beta1), case.vector(lambda g: g["lr"])
    reach = lr + 2 * case.vector(lambda g: g.get("extrapolation", 0.0))
    root = (reach * (1 - beta) / (1 + beta) / P).sqrt()
    decay = case.vector(lambda g: g.get("weight_decay", 0.01))

    def largest(scale: float) -> float:
        step = root[:, None] * case.jacobian(scale * H, case.rho) * root + (lr * decay).diag()
        return torch.linalg.eigvalsh(step)[-1].item()

    task = Quadratic(scaled_to(2 * ratio, largest) * H, PIECES)
    opt = at_equilibrium(case, task, P)
    result = certify(task, opt)
    assert result.sharpness == pytest.approx(2 * ratio, rel=1e-6)
    assert result.edge == 2.0
    assert result.verdict == ("inside" if ratio < 1 else "outside")
    # In more steps than these, v would grow with x and bring it back.
    assert (growth(task, opt, 80) < 1.0) == (ratio < 1)


@pytest.mark.parametrize("least", [-0.008, 0.008], ids=["outside", "inside"])
def test_adamws_groups_at_the_saddle_side(least: float) -> None:
    """Weight decay just outweighs a negative curvature, or just fails to, by J + P W."""
    first, second = {"betas": (0.3, 0.9), "lr": 0.1}, {"betas": (0.8, 0.99), "lr": 0.3}
    H, P = coupled() - 0.5 * torch.eye(sum(PIECES), dtype=torch.float64), preconditioner()
    rates = torch.tensor([0.1 * 0.7 / 1.3] * 6 + [0.3 * 0.2 / 1.8] * 5, dtype=torch.float64)
    root = (rates / P).sqrt()

    def smallest(scale: float) -> float:
        W = torch.tensor([scale] * 6 + [3 * scale] * 5, dtype=torch.float64)
        return torch.linalg.eigvalsh(root[:, None] * (H + (P * W).diag()) * root)[0].item()

    decay = scaled_to(least, smallest)
    groups = [first | {"weight_decay": decay}, second | {"weight_decay": 3 * decay}]
    task = Quadratic(H, PIECES)
    opt = at_equilibrium(Case(ef.AdamW, groups, {}), task, P)
    result = certify(task, opt, saddle_tol=0.0)
    assert result.bottom.value == pytest.approx(least, rel=1e-6)
    assert result.upper is not None
    assert result.upper.verdict == "inside"
    assert result.verdict == ("inside" if least > 0 else "outside")
    assert (growth(task, opt, 500) < 1.0) == (least > 0)


def test_groups_in_words() -> None:
    task = Quadratic(coupled(), PIECES)
    assert certify(task, SGD["lr"].optimizer(task)).matrix == ("A^1/2 H A^1/2, A the groups' rates")
    assert certify(task, SGD["two-step"].optimizer(task)).matrix == (
        "A^1/2 (H + 2 H R H + H R H R H) A^1/2, A the groups' rates"
    )


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda a, b: ef.SGD([{"params": a}, {"params": b, "maximize": True}], lr=0.1),
            "differ in maximize",
        ),
        (
            lambda a, b: ef.HessianUSAM([{"params": a, "rho": 0.1}, {"params": b, "rho": 0.2}]),
            "Hessian USAM differ in rho",
        ),
        (
            lambda a, b: ef.SGD(
                [{"params": a}, {"params": b, "extrapolation": -0.05}], lr=0.1, momentum=0.5
            ),
            "complex multipliers decide",
        ),
    ],
)
def test_groups_that_do_not_compose_are_undecided(build: Any, says: str) -> None:
    task = Quadratic(spectrum(0.1, 5), [20, 30])
    result = certify(task, build(*[[p] for p in task.x]))
    assert result.verdict == "undecided"
    assert result.upper is None
    assert says in result.needed[0]
    assert result.sharpness == pytest.approx(5.0, rel=1e-3)
