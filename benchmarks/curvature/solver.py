"""Contenders: solvers for the largest eigenvalues, with settings from loose to tight."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.curvature.problem_data import MissingRequirement
from benchmarks.curvature.problems import HessianProblem

K = 10  # eigenvalues


@dataclass(frozen=True)
class Solution:
    """Eigenvalues [K], and how many Hessian-vector products they took."""

    values: Tensor
    products: int


Solve = Callable[[HessianProblem], Solution]
"""Solves a problem from scratch: building operators and graphs is part of the work."""


@dataclass(frozen=True)
class Solver:
    """A contender.

    Attributes:
        name: the name in reports.
        settings: solves by the name of their setting, the cheapest first. The first setting that is
            accurate enough is timed.
        package: the package that it needs, or None.
        goal: the goal for its time over the library's, or None.
        goals_by_kind: other goals for some kinds of problem; see `ProblemRecipe.kind`.
        joins_vectors: whether it also takes part in problems of the kind "vectors".
    """

    name: str
    settings: Mapping[str, Solve]
    package: str | None = None
    goal: float | None = None
    goals_by_kind: Mapping[str, float] = field(default_factory=dict)
    joins_vectors: bool = False

    def check_installed(self) -> None:
        """Check that the package is there.

        Raises:
            MissingRequirement: the package is not installed.
        """
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise MissingRequirement(f"{self.package} is not installed: pip install --group bench")


def arpack(operator: Any, **options: Any) -> Solution:
    """SciPy's `eigsh` over a `LinearOperator`, with its products counted."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    products = 0

    def matvec(x: Any) -> Any:
        nonlocal products
        products += 1
        return operator.matvec(x)

    counter = LinearOperator(operator.shape, matvec=matvec, dtype=operator.dtype)
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
    values, _ = eigsh(counter, K, v0=start, **options)
    return Solution(torch.from_numpy(values), products)


@contextmanager
def count_calls(owner: Any, name: str) -> Iterator[list[int]]:
    """Count the calls of a function of a module, class or object, in a list of one number."""
    calls = [0]
    function = getattr(owner, name)

    def counter(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    setattr(owner, name, counter)
    try:
        yield calls
    finally:
        setattr(owner, name, function)
