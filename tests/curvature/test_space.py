"""The vectors of solvers: their precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from curvature.dense import DenseOperator, operator
from eigenfilter.curvature import eigsh
from eigenfilter.curvature.space import full_precision

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(params=["tf32", "ieee", "none"])
def allowed(request: pytest.FixtureRequest) -> Iterator[str]:
    """What training allows."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = request.param
    yield request.param
    MATMUL.fp32_precision = before


def test_what_training_allows_is_not_for_solvers(allowed: str) -> None:
    with full_precision(torch.device("cpu")):
        assert MATMUL.fp32_precision == allowed
    with suppress(RuntimeError), full_precision(torch.device("cuda")):
        assert MATMUL.fp32_precision == "ieee"
        raise RuntimeError
    assert MATMUL.fp32_precision == allowed


@pytest.mark.gpu
@pytest.mark.parametrize("basis_dtype", [None, torch.float16])
def test_a_gpu_that_may_use_tf32(allowed: str, basis_dtype: torch.dtype | None) -> None:
    spectrum = 10 / torch.arange(1.0, 401.0, dtype=torch.float64)
    op = DenseOperator(operator(spectrum, torch.float32).matrix.cuda())
    found = eigsh(op, 6, max_basis=12, basis_dtype=basis_dtype)
    vectors = found.vectors.double()
    gram = vectors.T @ vectors
    assert (gram - torch.eye(6).to(gram)).abs().max() < 2e-6
