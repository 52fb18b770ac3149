"""Certificates: right where the truth is known, and honest where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from eigenfilter import filters
from eigenfilter.certificate.equilibrium import direction
from eigenfilter.curvature import HessianOperator
from quadratics import Quadratic

Build = Callable[[Any], torch.optim.Optimizer]


def certify(task: Quadratic, opt: torch.optim.Optimizer, **options: Any) -> ef.Certificate:
    return ef.certify(task, task.loss, task.data, opt, seed=0, **options)


def spectrum(low: float, high: float, *more: float) -> Tensor:
    bulk = torch.linspace(low, high, 50, dtype=torch.float64)
    return torch.cat([bulk, torch.tensor(more, dtype=torch.float64)])


SGD: Build = lambda p: ef.SGD(p, lr=0.2)  # noqa: E731  (edge 10)
USAM: Build = lambda p: ef.USAM(p, lr=0.2, rho=0.05)  # noqa: E731  ([-27.3, -20] and [0, 7.32])


@pytest.mark.parametrize(
    ("eigenvalues", "build", "upper", "saddle", "verdict"),
    [
        (spectrum(0.1, 5), SGD, "inside", "inside", "inside"),
        (spectrum(0.1, 5, 9.4), SGD, "inside", "inside", "inside"),
        (spectrum(0.1, 5, 9.6), SGD, "at the edge", "inside", "at the edge"),
        (spectrum(0.1, 5, 10.4), SGD, "at the edge", "inside", "at the edge"),
        (spectrum(0.1, 5, 10.6), SGD, "outside", "inside", "outside"),
        (spectrum(-0.1, 5), SGD, "inside", "inside", "inside"),
        (spectrum(0.1, 5, -0.5), SGD, "inside", "outside", "outside"),
        (spectrum(0.1, 5, 10.6, -1), SGD, "outside", "outside", "outside"),
        (spectrum(0.1, 5), USAM, "inside", "inside", "inside"),
        (spectrum(0.1, 5, -22), USAM, "inside", "inside", "inside"),
        (spectrum(0.1, 5, -22, 7.3), USAM, "at the edge", "inside", "at the edge"),
        (spectrum(0.1, 5, -19), USAM, "inside", "outside", "outside"),
        (spectrum(0.1, 5, -22, -10), USAM, "inside", "outside", "outside"),
        (spectrum(0.1, 5, -29), USAM, "inside", "outside", "outside"),
        (
            spectrum(0.1, 5),
            lambda p: ef.SGD(p, lr=0.2, weight_decay=11.0),
            "outside",
            "inside",
            "outside",
        ),
        (
            spectrum(-5, -0.1, -9.6),
            lambda p: torch.optim.SGD(p, lr=0.2, maximize=True),
            "at the edge",
            "inside",
            "at the edge",
        ),
        (spectrum(-3, 500), lambda p: ef.SGD(p, lr=0.0), "inside", "inside", "inside"),
        (
            spectrum(0.1, 5),
            lambda p: ef.HessianUSAM(p, lr=0.2, momentum=0.5, rho=0.1),
            "outside",
            "inside",
            "outside",
        ),
        (spectrum(0.1, 5), lambda p: ef.TwoStepUSAM(p, lr=0.2, rho=0.01), *["inside"] * 3),
    ],
)
def test_verdicts_where_the_spectrum_is_known(
    eigenvalues: Tensor, build: Build, upper: str, saddle: str, verdict: str
) -> None:
    task = Quadratic(eigenvalues)
    opt = build(task.parameters())
    if opt.param_groups[0]["weight_decay"]:
        with torch.no_grad():  # (H + wd) x = H 1
            decayed = eigenvalues / (eigenvalues + opt.param_groups[0]["weight_decay"])
            task.x[0].copy_(decayed)
    found = certify(task, opt)
    assert found.upper is not None
    assert found.saddle is not None
    assert (found.upper.verdict, found.saddle.verdict) == (upper, saddle)
    assert found.verdict == verdict
    assert found.needed == ()
    sign = -1 if opt.param_groups[0].get("maximize") else 1
    exact = (sign * eigenvalues).max().item()
    assert found.sharpness - 1e-9 <= exact <= found.sharpness + found.sharpness_error
    assert found.sharpness_error < 0.02 * found.bottom.value + 0.02 * 30 + 6


def test_undecided_says_what_would_decide() -> None:
    task = Quadratic(torch.linspace(0, 9.4, 400, dtype=torch.float64))
    opt = ef.SGD(task.parameters(), lr=0.2)
    few = certify(task, opt, max_matvecs=4)
    assert few.verdict == "undecided"
    assert few.matvecs == 4
    for _ in range(3):  # the eigenvalue may turn out to lie nearer the edge than it seemed
        [upper] = [text for text in few.needed if text.startswith("upper edge")]
        most = int(upper.split("max_matvecs=")[1].split()[0])
        few = certify(task, opt, max_matvecs=most)
        if few.verdict == "inside":
            break
    assert few.verdict == "inside"
    assert few.matvecs < 400  # and not because nothing was left


def test_the_saddle_tolerance_is_the_callers() -> None:
    task = Quadratic(spectrum(0.1, 5, -0.1))
    opt = SGD(task.parameters())
    assert certify(task, opt).verdict == "inside"
    strict = certify(task, opt, saddle_tol=0.0)
    assert strict.verdict == "outside"
    assert strict.upper is not None
    assert strict.upper.verdict == "inside"


def test_a_point_that_is_no_equilibrium() -> None:
    task = Quadratic(spectrum(0.1, 5))
    task.move(0.1)
    found = certify(task, SGD(task.parameters()))
    assert found.verdict == "not an equilibrium"
    with torch.no_grad():
        away = task.H @ task(None)
        x = torch.cat(list(task.x))
    assert found.gradient_norm == pytest.approx(float(away.norm()))
    assert found.direction_norm == pytest.approx(float(away.norm()))
    assert found.distance == pytest.approx(float(away.norm() / (5 * x.norm())), rel=1e-2)
    assert found.distance <= float(task(None).detach().norm() / x.norm()) * 1.01
    loose = certify(task, SGD(task.parameters()), equilibrium_tol=1.0)
    assert loose.verdict == "inside"


METHODS: dict[str, Build] = {
    "sgd": lambda p: ef.SGD(p, lr=0.1, weight_decay=0.3),
    "maximised": lambda p: ef.USAM(p, lr=0.1, rho=0.07, weight_decay=0.3, maximize=True),
    "usam": lambda p: ef.USAM(p, lr=0.1, rho=0.07, weight_decay=0.3),
    "sam": lambda p: ef.SAM(p, lr=0.1, rho=0.07),
    "asam": lambda p: ef.SAM(p, lr=0.1, rho=0.07, adaptive=True),
    "sequential": lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=0.07),
    "anchored": lambda p: ef.TwoStepUSAM(p, lr=0.1, rho=0.07, ascent="anchored", maximize=True),
    "hessian": lambda p: ef.HessianUSAM(p, lr=0.1, rho=0.07, hvp="autograd"),
    "hessian, maximised": lambda p: ef.HessianUSAM(
        p, lr=0.1, rho=0.07, hvp="autograd", maximize=True
    ),
}


class Network:
    """A small tanh network on a fixed batch."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.x = torch.randn(30, 4, dtype=torch.float64)
        self.y = self.x[:, :2].sin()
        self.loss = nn.MSELoss()
        self.op = HessianOperator(self.model, self.loss, (self.x, self.y))

    def step(self, opt: Any, steps: int = 1) -> None:
        for _ in range(steps):
            if hasattr(opt, "evaluation"):
                opt.step(lambda: self.closure(opt))
            else:
                self.closure(opt)
                opt.step()

    def closure(self, opt: Any) -> Tensor:
        opt.zero_grad()
        value = self.loss(self.model(self.x), self.y)
        value.backward(create_graph=getattr(opt, "needs_graph", False))
        return value

    def certify(self, opt: torch.optim.Optimizer, **options: Any) -> ef.Certificate:
        return ef.certify(self.model, self.loss, (self.x, self.y), opt, seed=0, **options)

    def point(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def dense(self) -> Tensor:
        return self.op.matmat(torch.eye(self.op.shape[0], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", METHODS)
def test_the_direction_is_the_optimizers_own(name: str, groups: bool) -> None:
    task = Network()
    first, *rest = task.model.parameters()
    opt = METHODS[name]([{"params": [first]}, {"params": rest}] if groups else [first, *rest])
    if groups and "rho" in opt.param_groups[0]:
        opt.param_groups[0]["rho"] = 0.0
    found = direction(task.op, opt).vector
    before = task.point()
    task.step(opt)
    assert torch.allclose((before - task.point()) / 0.1, found, rtol=1e-6, atol=1e-9)


def test_adamws_direction_vanishes_where_it_stays() -> None:
    task = Network()
    opt = ef.AdamW(task.model.parameters(), lr=1e-2, betas=(0.0, 0.5), weight_decay=0.2, eps=0.1)
    task.step(opt, 3)
    before = task.point()
    found = direction(task.op, opt).vector
    opt.param_groups[0]["betas"] = (0.0, 1.0 - 1e-12)  # keeps v where it is
    scale = 1 - 0.5 ** float(opt.state[opt.param_groups[0]["params"][0]]["step"])
    v = torch.cat([opt.state[p]["exp_avg_sq"].reshape(-1) for p in task.model.parameters()])
    P = (v / scale).sqrt() + 0.1
    g = task.op.gradient()
    assert torch.allclose(found, g + 0.2 * P * before)


def coupled(pieces: list[int]) -> Tensor:
    """A positive definite matrix that couples the groups."""
    n = sum(pieces)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return q @ torch.linspace(0.2, 3.0, n, dtype=torch.float64).diag() @ q.T


GROUPS: dict[str, tuple[Any, list[dict[str, Any]], dict[str, Any]]] = {
    "heavy ball": (ef.SGD, [{"lr": 0.1}, {"lr": 0.5}], {"momentum": 0.6, "dampening": 0.3}),
    "torch": (torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.4}], {"momentum": 0.6, "nesterov": True}),
    "decays": (ef.SGD, [{"weight_decay": 0.0}, {"weight_decay": 2.0}], {"lr": 0.2}),
    "radii": (ef.USAM, [{"rho": 0.0}, {"rho": 0.3}], {"lr": 0.2, "momentum": 0.5}),
    "all": (ef.USAM, [{"rho": 0.2, "lr": 0.1}, {"rho": 0.3, "lr": 0.3}], {}),
}


@pytest.mark.parametrize("ratio", [0.85, 1.15], ids=["inside", "outside"])
@pytest.mark.parametrize("name", GROUPS)
def test_several_groups_by_their_matrix_and_by_what_they_do(name: str, ratio: float) -> None:
    """A H scaled so that the largest eigenvalue of the step is that part of the edge."""
    cls, each, shared = GROUPS[name]
    pieces = [6, 5]
    H = coupled(pieces)

    def vector(key: str, default: float = 0.0) -> Tensor:
        values = [{**shared, **group}.get(key, default) for group in each]
        return torch.cat(
            [torch.full((m,), v).double() for m, v in zip(pieces, values, strict=True)]
        )

    beta = shared.get("momentum", 0.0)
    edge = 2 * (1 + beta) / (1 + 2 * beta if shared.get("nesterov") else 1)
    root = (vector("lr") * (1 - shared.get("dampening", 0.0))).sqrt()

    def largest(scale: float) -> float:
        G = scale * H
        J = G + G @ vector("rho").diag() @ G + vector("weight_decay").diag()
        return torch.linalg.eigvalsh(root[:, None] * J * root)[-1].item()

    low, high = 0.0, 1e3
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if largest(middle) < ratio * edge else (low, middle)
    task = Quadratic(low * H, pieces)
    groups = [{"params": [p], **group} for p, group in zip(task.x, each, strict=True)]
    opt = cls(groups, **{"lr": 0.1, **shared})
    if name == "decays":
        with torch.no_grad():
            rest = torch.linalg.solve(task.H + vector("weight_decay").diag(), task.H.sum(1))
            for p, piece in zip(task.x, rest.split(pieces), strict=True):
                p.copy_(piece)
    found = certify(task, opt)
    assert found.sharpness == pytest.approx(ratio * edge, rel=1e-6)
    assert found.edge == pytest.approx(edge)
    assert found.verdict == ("inside" if ratio < 1 else "outside")
    here = torch.cat([p.detach().clone() for p in task.x])
    task.move(1e-3)
    task.train_with(opt, 400)
    away = float((torch.cat([p.detach() for p in task.x]) - here).norm())
    assert (away < 1e-3) == (ratio < 1)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda a, b: ef.SGD(
                [{"params": a, "momentum": 0.5}, {"params": b, "momentum": 0.9}], lr=0.1
            ),
            "differ in momentum",
        ),
        (
            lambda a, b: ef.TwoStepUSAM([{"params": a, "lr": 0.1}, {"params": b, "lr": 0.2}]),
            "only filters of SGD, USAM and SAM",
        ),
    ],
)
def test_groups_that_do_not_compose_are_undecided(build: Any, says: str) -> None:
    task = Quadratic(spectrum(0.1, 5), [20, 30])
    found = certify(task, build(*[[p] for p in task.x]))
    assert found.verdict == "undecided"
    assert found.upper is None
    assert says in found.needed[0]
    assert found.sharpness == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("cls", [ef.AdamW, torch.optim.AdamW])
def test_adamw_by_its_preconditioned_matrix(cls: Any) -> None:
    task = Network()
    opt = cls(task.model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.0)
    task.step(opt, 30)
    corrected = [
        opt.state[p]["exp_avg_sq"].flatten() / (1 - 0.95 ** float(opt.state[p]["step"]))
        for p in task.model.parameters()
    ]
    P = torch.cat(corrected).sqrt() + 1e-4
    exact = torch.linalg.eigvalsh(task.dense() / P.sqrt() / P.sqrt()[:, None])
    for lr, verdict in ((1.1, "outside"), (1.0, "at the edge"), (0.8, "inside")):
        opt.param_groups[0]["lr"] = lr * filters.AdamW(1.0, 0.8).max_eigenvalue() / exact[-1].item()
        found = task.certify(opt, equilibrium_tol=1e9)
        assert found.upper is not None
        assert found.upper.verdict == verdict
        assert found.sharpness == pytest.approx(exact[-1].item(), rel=1e-6)
        assert found.bottom.value - found.bottom.reach <= exact[0].item() + found.upper.tolerance


def test_adamw_after_an_ascent() -> None:
    task = Network()
    opt = ef.AdamW(task.model.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-4, rho=0.03)
    task.step(opt, 30)
    found = task.certify(opt, equilibrium_tol=1e9)
    assert "(H + H R H)" in found.matrix
    H = task.dense()
    state = [opt.state[p] for p in task.model.parameters()]
    corrected = [s["exp_avg_sq"].flatten() / (1 - 0.95 ** float(s["step"])) for s in state]
    P = torch.cat(corrected).sqrt() + 1e-4
    J = (H + 0.03 * H @ H) / P.sqrt() / P.sqrt()[:, None]
    assert found.sharpness == pytest.approx(torch.linalg.eigvalsh(J)[-1].item(), rel=1e-6)
    opt = ef.AdamW(task.model.parameters(), lr=1e-2, method="two_step_usam", rho=0.03)
    task.step(opt)
    other = task.certify(opt, equilibrium_tol=1e9)
    assert other.verdict == "undecided"
    assert "two_step_usam" in other.needed[0]


def test_adamw_without_its_state_is_refused() -> None:
    task = Network()
    with pytest.raises(ValueError, match="load its state"):
        task.certify(ef.AdamW(task.model.parameters()))


def test_sams_edge_is_that_of_the_gradient_there() -> None:
    task = Quadratic(spectrum(0.1, 5))
    task.move(0.1)
    opt = ef.SAM(task.parameters(), lr=0.2, rho=0.1)
    found = certify(task, opt, equilibrium_tol=1e9)
    flt = filters.SAM(0.2, rho=0.1, grad_norm=found.gradient_norm)
    assert found.edge == pytest.approx(flt.max_eigenvalue())
    assert any("moves with it" in note for note in found.notes)
    given = certify(task, opt, equilibrium_tol=1e9, grad_norm=3.0)
    assert given.edge == pytest.approx(filters.SAM(0.2, rho=0.1, grad_norm=3.0).max_eigenvalue())


def test_sam_at_a_gradient_of_zero_is_undecided() -> None:
    task = Quadratic(spectrum(0.1, 5))
    found = certify(task, ef.SAM(task.parameters(), lr=0.2, rho=0.1))
    assert found.verdict == "undecided"
    assert "grad_norm" in found.needed[0]


def test_the_model_is_left_as_it_is() -> None:
    task = Network()
    opt = ef.HessianUSAM(task.model.parameters(), lr=0.1, rho=0.01, momentum=0.5)
    task.step(opt, 3)
    task.closure(opt)
    params = list(task.model.parameters())
    before = [(p.detach().clone(), p._version, p.grad, p.grad.clone()) for p in params]  # type: ignore[union-attr]
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in params]
    state = torch.get_rng_state()
    task.certify(opt)
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model.training
    for p, (value, version, grad, copy) in zip(params, before, strict=True):
        assert torch.equal(p, value)
        assert p._version == version
        assert p.grad is grad
        assert torch.equal(grad, copy)
    for p, buffer in zip(params, buffers, strict=True):
        assert torch.equal(opt.state[p]["momentum_buffer"], buffer)


def test_parameters_outside_the_optimizer_do_not_count() -> None:
    task = Network()
    opt = ef.SGD(task.model[2].parameters(), lr=0.1)
    found = task.certify(opt, equilibrium_tol=1e9)
    assert found.parameters == 12
    H = task.dense()[-12:, -12:]
    assert found.sharpness == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-6)


def test_text_and_json() -> None:
    task = Quadratic(spectrum(0.1, 5, -22))
    found = certify(task, USAM(task.parameters()))
    text = str(found)
    assert text.splitlines()[0].split() == ["verdict", "inside"]
    assert "[-27.3205, -20] and [0, 7.32051]" in text
    read = json.loads(found.to_json())
    assert read == found.to_dict()
    assert read["saddle"]["verdict"] == "inside"
    assert read["matvecs"] == found.matvecs
    nothing = certify(task, ef.SGD(task.parameters(), lr=0.0))
    assert json.loads(nothing.to_json())["edge"] is None


def test_a_start_of_its_own() -> None:
    """Two certificates without a seed start differently; with the same seed alike."""
    task = Quadratic(torch.linspace(0, 9.4, 300, dtype=torch.float64))
    opt = SGD(task.parameters())
    runs = [ef.certify(task, task.loss, task.data, opt, max_matvecs=5) for _ in range(2)]
    assert runs[0].sharpness != runs[1].sharpness
    again = ef.certify(task, task.loss, task.data, opt, max_matvecs=5, seed=runs[0].seed)
    assert again.sharpness == runs[0].sharpness


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"edge_tol": 1.0}, "edge_tol"),
        ({"saddle_tol": -0.1}, "saddle_tol"),
        ({"tol": 0.0}, "tol"),
        ({"equilibrium_tol": -1.0}, "equilibrium_tol"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"max_matvecs": 0}, "max_matvecs"),
        ({"params": []}, "params"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    task = Quadratic(spectrum(0.1, 5))
    with pytest.raises(ValueError, match=match):
        certify(task, SGD(task.parameters()), **options)


def test_optimizers_without_a_filter() -> None:
    task = Quadratic(spectrum(0.1, 5))
    with pytest.raises(TypeError, match="no filter is known for RMSprop"):
        certify(task, torch.optim.RMSprop(task.parameters()))
    with pytest.raises(TypeError, match="ASAM"):
        certify(task, ef.SAM(task.parameters(), adaptive=True))
    with pytest.raises(ValueError, match="not a parameter of the model"):
        certify(task, SGD([nn.Parameter(torch.ones(3, dtype=torch.float64))]))


def test_a_perturbed_model_is_refused() -> None:
    task = Network()
    opt = ef.USAM(task.model.parameters(), lr=0.1, rho=0.05)
    task.closure(opt)
    assert opt.ascend()
    with pytest.raises(RuntimeError, match="restore"):
        task.certify(opt)
    opt.restore()
