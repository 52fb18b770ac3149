"""The optimizers at the edges of their filters: they diverge just beyond and converge just inside.

A quadratic with one eigenvalue a parameter, trained by the optimizers themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import eigenfilter as ef
from eigenfilter import filters
from optimizers.problems import backward

OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "gradient descent": lambda p: ef.SGD(p, lr=0.2),
    "heavy ball": lambda p: ef.SGD(p, lr=0.2, momentum=0.7),
    "dampened": lambda p: ef.SGD(p, lr=0.3, momentum=0.7, dampening=0.4, weight_decay=0.2),
    "nesterov": lambda p: ef.SGD(p, lr=0.2, momentum=0.7, nesterov=True, weight_decay=0.2),
    "ascending": lambda p: ef.SGD(p, lr=0.2, momentum=0.5, maximize=True),
    "usam": lambda p: ef.USAM(p, lr=0.2, rho=0.1),
    "usam heavy ball": lambda p: ef.USAM(p, lr=0.2, momentum=0.7, dampening=0.3, rho=0.1),
    "usam nesterov": lambda p: ef.USAM(p, lr=0.2, momentum=0.7, nesterov=True, rho=0.1),
    "usam with decay": lambda p: ef.USAM(p, lr=0.2, momentum=0.5, weight_decay=0.4, rho=0.1),
    "usam ascending": lambda p: ef.USAM(p, lr=0.2, momentum=0.7, rho=0.1, maximize=True),
    "sequential": lambda p: ef.TwoStepUSAM(p, lr=0.2, momentum=0.7, rho=0.1),
    "sequential ascending": lambda p: ef.TwoStepUSAM(p, lr=0.2, rho=0.1, maximize=True),
    "anchored nesterov": lambda p: ef.TwoStepUSAM(
        p, lr=0.2, momentum=0.7, nesterov=True, rho=0.1, ascent="anchored"
    ),
    "hessian": lambda p: ef.HessianUSAM(p, lr=0.2, momentum=0.7, dampening=0.3, rho=0.1),
    "hessian exact": lambda p: ef.HessianUSAM(p, lr=0.2, rho=0.1, hvp="autograd"),
    "hessian ascending": lambda p: ef.HessianUSAM(p, lr=0.2, momentum=0.7, rho=0.1, maximize=True),
}
NARROW = 0.01  # distance from an edge, as a fraction of the narrowest interval or gap
STEPS = 1500


def astride(intervals: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues just inside and just outside of every edge."""
    gaps = [right[0] - left[1] for left, right in pairwise(intervals)]
    step = NARROW * min([high - low for low, high in intervals] + gaps)
    lows, highs = np.array(intervals).T
    return np.concatenate([lows + step, highs - step]), np.concatenate([lows - step, highs + step])


def final_sizes(make: Callable, eigenvalues: np.ndarray) -> Tensor:
    """Sizes, after all steps, of parameters that started at 1."""
    params = [torch.nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in eigenvalues]
    opt = make(params)
    lam = torch.from_numpy(eigenvalues)

    def closure() -> Tensor:
        opt.zero_grad()
        x = torch.stack(params)
        loss = 0.5 * (lam * x * x).sum()
        backward(opt, loss)
        return loss.detach()

    for _ in range(STEPS):
        opt.step(closure)
    return torch.stack([p.detach().abs() for p in params])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_convergence_inside_and_divergence_outside(name: str) -> None:
    make = OPTIMIZERS[name]
    (flt,) = filters.of(make([torch.nn.Parameter(torch.ones(()))]))
    intervals = [(low, high) for low, high in flt.intervals() if low < high]  # some are points
    assert len(intervals) == (2 if name.startswith("usam") else 1)
    inside, outside = astride(intervals)
    sizes = final_sizes(make, np.concatenate([inside, outside]))
    assert sizes[: len(inside)].max() < 1e-2
    assert sizes[len(inside) :].min() > 1e2


def test_usam_settles_at_saddles_that_gradient_descent_leaves() -> None:
    """The negative branch: eigenvalues just below -1 / rho."""
    rho = 0.1
    saddle = np.array([-1 / rho - 1.0, -1 / rho + 1.0])
    sizes = final_sizes(OPTIMIZERS["usam"], saddle)
    assert sizes[0] < 1e-9
    assert sizes[1] > 1e9
    assert (final_sizes(OPTIMIZERS["gradient descent"], saddle) > 1e9).all()
