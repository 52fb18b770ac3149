"""Checks of the arguments of `eigsh`, before any product."""

from __future__ import annotations

import torch

from eigenfilter.curvature.protocol import SymmetricOperator
from eigenfilter.curvature.solvers.convergence import CRITERIA, WHICH

_LEAST_TOL = 1e-6  # the relative error of values that a float16 basis allows


def check_arguments(
    op: SymmetricOperator,
    k: int,
    which: str,
    tol: float,
    criterion: str,
    limit: int,
    block_size: int,
    max_basis: int,
) -> None:
    """Raise ValueError if an argument is out of its range."""
    n = op.shape[0]
    if op.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the operator must be float32 or float64, not {op.dtype}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, n] = [1, {n}], not {k}")
    if which not in WHICH:
        raise ValueError(f"which must be one of {list(WHICH)}, not {which!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {list(CRITERIA)}, not {criterion!r}")
    if limit < k:
        raise ValueError(f"max_matvecs must be at least k = {k}, not {limit}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    least = min(n, k + 2 * block_size + 2)
    if max_basis < least:
        raise ValueError(
            f"max_basis must be at least min(n, k + 2 block_size + 2) = {least}, not {max_basis}"
        )


def check_probability(max_miss_probability: float | None, check_multiplicity: bool) -> None:
    """Raise ValueError if `max_miss_probability` is out of its range, or nothing bounds it."""
    if max_miss_probability is None:
        return
    if not 0 < max_miss_probability < 1:
        raise ValueError(
            f"max_miss_probability must be in (0, 1) or None, not {max_miss_probability}"
        )
    if not check_multiplicity:
        raise ValueError(
            "max_miss_probability needs the check for repeated eigenvalues, which finds what was "
            "missed: leave check_multiplicity=False out"
        )


def check_rounded(
    op: SymmetricOperator, basis_dtype: torch.dtype | None, tol: float, criterion: str
) -> None:
    """Raise ValueError if `basis_dtype` cannot be combined with the other arguments."""
    if basis_dtype != torch.float16 or op.dtype != torch.float32:
        raise ValueError(
            f"basis_dtype must be None, or torch.float16 for a float32 operator, not {basis_dtype} "
            f"for one of {op.dtype}"
        )
    if criterion != "value":
        raise ValueError(
            'a float16 basis holds vectors to about 5e-4 only: use criterion="value", or leave '
            "basis_dtype out"
        )
    if tol < _LEAST_TOL:
        raise ValueError(
            f"a float16 basis holds values to about {_LEAST_TOL}: raise tol to that, or leave "
            "basis_dtype out"
        )
