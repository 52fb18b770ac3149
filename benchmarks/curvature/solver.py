"""What a contender is: a way to the largest eigenvalues, in settings from loose to tight."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.curvature.datasets import Missing
from benchmarks.curvature.problems import Problem

K = 10


@dataclass(frozen=True)
class Found:
    """Eigenvalues [K], and the products they took."""

    values: Tensor
    products: int


Solve = Callable[[Problem], Found]
"""From nothing: what is built for the products is part of the work."""


@dataclass(frozen=True)
class Solver:
    """A contender.

    Attributes:
        name: as it is reported.
        settings: by their names, cheapest first; the first that is accurate enough is timed.
        package: that it needs.
        goal: how many times as long as ours it is to take, at least.
        special: other goals, by the kind of problem; see `Recipe.kind`.
        vectors: whether it takes part where the cost of vectors is the question.
    """

    name: str
    settings: Mapping[str, Solve]
    package: str | None = None
    goal: float | None = None
    special: Mapping[str, float] = field(default_factory=dict)
    vectors: bool = False

    def check(self) -> None:
        """Raise Missing unless the package is installed."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise Missing(f"{self.package} is not installed: pip install --group bench")


def arpack(operator: Any, **options: Any) -> Found:
    """SciPy's eigsh over a `LinearOperator`."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    products = 0

    def matvec(x: Any) -> Any:
        nonlocal products
        products += 1
        return operator.matvec(x)

    counting = LinearOperator(operator.shape, matvec=matvec, dtype=operator.dtype)
    start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
    values, _ = eigsh(counting, K, v0=start, **options)
    return Found(torch.from_numpy(values), products)


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[int]]:
    """Count the calls of an attribute of a module, class or object."""
    calls = [0]
    called = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return called(*args, **kwargs)

    setattr(owner, name, counting)
    try:
        yield calls
    finally:
        setattr(owner, name, called)
