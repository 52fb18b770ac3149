"""The relative error of Hessian-vector products by finite differences.

Prints ||h - H g|| / ||H g||, where h is the difference that HessianUSAM uses, by network, precision
and relative step `fd_step` (eps ||g|| = fd_step (1 + ||x||)), at initialization and after some
training. H g is computed by double backward in float64. The data are scikit-learn's digits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import eigenfilter as ef
from benchmarks import environment, report

STEPS = (1e-5, 1e-4, 3.5e-4, 1e-3, 1e-2, 5e-2, 2e-1)
TRAINING = 200  # steps of SGD

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tanh MLP": lambda: nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    ),
    "ReLU MLP": lambda: nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
    "GELU conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3),
        nn.GELU(),
        nn.Conv2d(16, 16, 3),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    ),
}

PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[object]]]] = {
    "float64": (torch.float64, nullcontext),
    "float32": (torch.float32, nullcontext),
    "float32, bfloat16 autocast": (
        torch.float32,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ),
}


def data() -> tuple[Tensor, Tensor]:
    """512 digits, scaled to [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.as_tensor(digits.data[:512] / 16.0)
    return inputs, torch.as_tensor(digits.target[:512])


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy, in the parameters' precision even under autocast."""
    return nn.functional.cross_entropy(model(inputs).to(inputs.dtype), labels)


def exact_product(model: nn.Module) -> Tensor:
    """H g in float64."""
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model, *data()), params, create_graph=True)
    products = torch.autograd.grad(grads, params, [g.detach() for g in grads])
    return torch.cat([h.flatten() for h in products])


def difference(model: nn.Module, precision: str, fd_step: float) -> Tensor:
    """h, from the point x + rho h at which HessianUSAM takes its last gradient."""
    dtype, context = PRECISIONS[precision]
    model = copy.deepcopy(model).to(dtype)
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    inputs, labels = data()
    rho = 1.0  # large, so that x + rho h keeps the digits of h
    opt = ef.HessianUSAM(params, lr=0.0, rho=rho, fd_step=fd_step)
    for _ in range(2):
        opt.zero_grad()
        with context():
            loss = loss_of(model, inputs.to(dtype), labels)
        torch.autograd.backward(loss)
        opt.ascend()
    pairs = zip(params, start, strict=True)
    h = torch.cat([(p.detach() - x).double().flatten() / rho for p, x in pairs])
    opt.restore()
    return h


def run(folder: Path) -> None:
    """Measure every network, print the table, write the results."""
    where = environment.describe(torch.device("cpu"))
    steps = " | ".join(f"{c:g}" for c in STEPS)
    rows = [
        f"| network | point | precision | {steps} |",
        "| --- | --- | --- |" + " --- |" * len(STEPS),
    ]
    print("\n".join(rows))
    results = []
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model = make().double()
        for point in ("initial", f"after {TRAINING} steps"):
            product = exact_product(model)
            for precision in PRECISIONS:
                errors = [
                    float((difference(model, precision, c) - product).norm() / product.norm())
                    for c in STEPS
                ]
                results.append(
                    {"network": name, "point": point, "precision": precision, "errors": errors}
                )
                cells = " | ".join(f"{e:.1e}" for e in errors)
                rows.append(f"| {name} | {point} | {precision} | {cells} |")
                print(rows[-1], flush=True)
            train(model)
    title = "# Hessian-vector products by finite differences: relative error, by fd_step"
    data = {"fd_steps": STEPS, "finite_differences": results}
    report.write(folder, "cpu-finite-differences", where, [title, "", *rows], data)


def train(model: nn.Module) -> None:
    """Take TRAINING steps of SGD with momentum."""
    opt = ef.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(TRAINING):
        opt.zero_grad()
        torch.autograd.backward(loss_of(model, *data()))
        opt.step()
