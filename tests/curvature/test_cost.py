"""The predictions of `eigsh_cost` against the counts of `eigsh`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvature.dense import Diagonal, OneSlice, decaying, operator
from eigenfilter import kernels
from eigenfilter.curvature import eigsh, eigsh_cost


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("k", "max_basis"), [(2, 10), (6, 24), (10, None)])
def test_passes_over_the_basis(
    k: int, max_basis: int | None, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flops of Gram-Schmidt, counted call by call; the rest are restarts and the result."""
    spent = 0
    orthogonalize = kernels.orthogonalize

    def counting(w: Tensor, basis: Tensor, *, passes: int = 2) -> tuple[Tensor, Tensor]:
        nonlocal spent
        spent += 4 * passes * basis.numel()
        return orthogonalize(w, basis, passes=passes)

    monkeypatch.setattr(kernels, "orthogonalize", counting)
    n = 2**19 if max_basis is None else 400
    d = torch.linspace(0, 1, n)
    d[:12] = decaying(n)[:12].abs()
    op = operator(decaying(n), torch.float32) if max_basis else Diagonal(d)
    result = eigsh(op, k, max_basis=max_basis, basis_dtype=torch.float16 if rounded else None)
    cost = eigsh_cost(
        n,
        k,
        products=result.matvecs,
        multiplicity_products=result.multiplicity_matvecs,
        max_basis=max_basis,
        basis_itemsize=2 if rounded else None,
    )
    assert cost.products == result.matvecs
    assert spent / n == pytest.approx(cost.flops / n, rel=0.35)
    assert spent < cost.flops


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "max_basis"), [(400, 2, 10), (400, 3, 9), (400, 10, None), (2000, 6, 11)]
)
def test_sums_over_processes(n: int, k: int, max_basis: int | None, copies: bool) -> None:
    """Exact; within a tenth in float16, where it depends on how often T is solved."""
    d = torch.linspace(0, 1, n)
    d[:12] = decaying(n)[:12].abs()
    for dtype, least in ((None, 1.0), (torch.float16, 0.9)):
        slices = OneSlice(n)
        op = Diagonal(d, slices)
        result = eigsh(op, k, max_basis=max_basis, check_multiplicity=copies, basis_dtype=dtype)
        cost = eigsh_cost(
            n,
            k,
            products=result.matvecs,
            multiplicity_products=result.multiplicity_matvecs,
            max_basis=max_basis,
            basis_itemsize=dtype and dtype.itemsize,
            processes=2,
        )
        assert result.converged.all()
        assert (result.multiplicity_matvecs > 0) == copies
        assert least * cost.reductions <= slices.sums <= cost.reductions


def test_slices_share_it() -> None:
    whole, shared = eigsh_cost(64_000_000), eigsh_cost(64_000_000, processes=64)
    assert shared.memory == whole.memory / 64
    assert shared.flops == whole.flops / 64
    assert shared.traffic == whole.traffic / 64
    assert (whole.reductions, shared.products) == (0, whole.products)
    assert shared.reductions > shared.products


def test_a_longer_basis_restarts_less() -> None:
    short = eigsh_cost(10**6, 5, products=60, max_basis=12)
    long = eigsh_cost(10**6, 5, products=60, max_basis=40)
    assert short.memory < long.memory
    assert short.flops < long.flops


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "must be >= 1"),
        ({"k": 0}, "must be >= 1"),
        ({"processes": 0}, "must be >= 1"),
        ({"basis_itemsize": 0}, "must be >= 1"),
        ({"products": 3}, "products >= multiplicity_products"),
        ({"max_basis": 7}, "max_basis must be at least"),
    ],
)
def test_sizes_out_of_range(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eigsh_cost(**({"n": 100, "k": 4} | wrong))
