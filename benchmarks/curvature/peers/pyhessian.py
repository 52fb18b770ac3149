"""The power iteration with deflation of the package PyHessian."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch

from benchmarks.curvature.problems import Problem
from benchmarks.curvature.solver import Found, K, Solver, counted

TIGHTER = (1e-5, 1e-6, 1e-7)


def solve(problem: Problem, **options: Any) -> Found:
    """`eigenvalues` of a new `hessian`, which keeps the graph of a single batch."""
    module = importlib.import_module("pyhessian.hessian")
    single = isinstance(problem.data, tuple)
    given = {"data" if single else "dataloader": problem.data}
    owner, name = (
        (module, "hessian_vector_product") if single else (module.hessian, "dataloader_hv_product")
    )
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        counted(owner, name) as products,
    ):
        torch.manual_seed(0)
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        hessian = module.hessian(problem.model, problem.loss_fn, **given, cuda=False)
        values, _ = hessian.eigenvalues(top_n=K, **options)
    problem.model.zero_grad()
    return Found(torch.tensor(values), products[0])


SOLVERS = (
    Solver("PyHessian", {"defaults": solve}, "pyhessian"),
    Solver(
        "PyHessian, tightened",
        {
            f"maxIter=2000, tol={tol:g}": functools.partial(solve, maxIter=2000, tol=tol)
            for tol in TIGHTER
        },
        "pyhessian",
        5.0,
        {"loader": 10.0},
    ),
)
