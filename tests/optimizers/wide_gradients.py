"""Parameters with gradients of a wider dtype, and the optimizers that step along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef
from cases import RHO
from optimizers.problems import parameters

# A parameter's dtype, that of its gradients, and a factor that takes them beyond the former.
PAIRS = {
    "float16-float32": (torch.float16, torch.float32, 2.0**18),
    "bfloat16-float32": (torch.bfloat16, torch.float32, 2.0**20),
    "float32-float64": (torch.float32, torch.float64, 2.0**140),
}

pairs = pytest.mark.parametrize(("dtype", "wide", "big"), PAIRS.values(), ids=PAIRS)
mixtures = pytest.mark.parametrize("mixed", [False, True], ids=["wide", "mixed"])
backends = pytest.mark.parametrize("backend_name", ["native", "reference"])

SHAPES = ((), (3,), (0,), (4, 5), (2, 3, 2, 2), (70,))

SETTINGS = {
    "heavy ball": (ef.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.03}),
    "nesterov": (ef.USAM, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "rho": RHO}),
    "maximize": (ef.TwoStepUSAM, {"lr": 0.1, "momentum": 0.8, "maximize": True, "rho": RHO}),
    "sam": (ef.SAM, {"lr": 0.1, "momentum": 0.8, "rho": 0.5}),
    "asam": (ef.SAM, {"lr": 0.1, "momentum": 0.8, "rho": 0.5, "adaptive": True}),
    "hessian": (ef.HessianUSAM, {"lr": 0.1, "momentum": 0.8, "rho": RHO}),
    "adamw": (ef.AdamW, {"lr": 0.1, "eps": 1e-3, "method": "usam", "rho": RHO}),
    "stochastic": (ef.USAM, {"lr": 0.1, "rho": RHO, "stochastic_rounding": True}),
}


def widened(dtype: torch.dtype, wide: torch.dtype, mixed: bool) -> list[nn.Parameter]:
    """Parameters with wide gradients, or every second one of them with their own."""
    params = parameters(dtype, SHAPES)
    for i, p in enumerate(params):
        if not (mixed and i % 2):
            p.grad_dtype = wide
    return params


def fill_gradients(params: Sequence[Tensor], big: float = 1.0) -> None:
    """Set the gradients of a convex function, times `big` where they are wide."""
    with torch.no_grad():
        for i, p in enumerate(params):
            z = p.double()
            slope = 1 + i / 8 + 2.0**-11  # a product with it is no number of float16 or bfloat16
            g = slope * z - 0.7
            grad_dtype = p.grad_dtype
            p.grad = (g * (big if grad_dtype != p.dtype else 1.0)).to(grad_dtype)


def run(opt: Any, params: Sequence[Tensor], steps: int, big: float = 1.0) -> None:
    for _ in range(steps):
        fill_gradients(params, big)
        while opt.ascend():
            assert all(p.grad is None for p in params)
            fill_gradients(params, big)
        opt.step()
        opt.zero_grad()
