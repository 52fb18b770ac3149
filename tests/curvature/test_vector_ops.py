"""The precision of vector arithmetic in solvers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.dense import DTYPES, DenseOperator, Diagonal, OneSlice, operator
from eigenfilter import kernels
from eigenfilter.curvature import eigsh
from eigenfilter.curvature.solvers.vector_ops import VectorOps, full_precision

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(params=["tf32", "ieee", "none"])
def allowed(request: pytest.FixtureRequest) -> Iterator[str]:
    """Allow TF32, as training may."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = request.param
    yield request.param
    MATMUL.fp32_precision = before


def test_solvers_do_not_use_tf32_that_training_allows(allowed: str) -> None:
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
    result = eigsh(op, 6, max_basis=12, basis_dtype=basis_dtype)
    vectors = result.vectors.double()
    gram = vectors.T @ vectors
    assert (gram - torch.eye(6).to(gram)).abs().max() < 2e-6


def ops(length: int, dtype: torch.dtype) -> VectorOps:
    """Return the arithmetic of sliced vectors, with one slice."""
    return VectorOps(Diagonal(torch.ones(length, dtype=dtype), OneSlice(length)))


def vectors(count: int, length: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(count + length)
    return torch.rand(count, length, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 300_000])
@pytest.mark.parametrize("count", [1, 3])
def test_slices_orthogonalize_as_the_kernel_does(
    length: int, count: int, dtype: torch.dtype
) -> None:
    basis = torch.linalg.qr(vectors(5, length, torch.float64).T).Q.T.contiguous()
    for stored in {dtype, torch.float16}:
        q, w = basis.to(stored), vectors(count, length, dtype)
        expected = w.clone().double()
        coefficients, norms = kernels.orthogonalize(expected, q)
        c, norms_of_slices = ops(length, dtype).orthogonalize(w, q)
        # Sums in pieces err by a few roundings of a piece, whatever their number.
        unit = 4 * torch.finfo(dtype).eps * max(float(coefficients.norm()), 1.0)
        torch.testing.assert_close(c, coefficients, rtol=0, atol=unit)
        torch.testing.assert_close(w.double(), expected, rtol=0, atol=unit)
        torch.testing.assert_close(norms_of_slices, norms, rtol=0, atol=unit)


class Calls(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_slices_take_few_operations_whatever_their_length() -> None:
    spent = []
    for length in (20_000, 200_000):
        q, w = vectors(5, length, torch.float32), vectors(1, length, torch.float32)
        with Calls() as calls:
            ops(length, torch.float32).orthogonalize(w, q)
        spent.append(calls.count)
    assert spent[0] == spent[1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [0, 1, 2**16 + 1, 2**22, 10**7, 10**9])
def test_wider_copies_take_little_memory_beside_long_vectors(device: str, length: int) -> None:
    """A float64 copy of float16 rows takes 4 times their memory, a float32 copy 2 times."""
    whole = VectorOps(Diagonal(torch.ones(1), OneSlice(length)))
    parts = list(whole.parts(torch.device(device)))
    assert sum(len(range(length)[part]) for part in parts) == length
    assert all(a.stop == b.start for a, b in pairwise(parts))
    if length >= 2**22:
        assert (4 + 2) * parts[0].stop < 0.1 * length
        assert (2**13 if device == "cpu" else 2**16) <= parts[0].stop <= 2**20
