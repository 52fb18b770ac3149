"""The reported probability of a missed eigenvalue against the observed frequency."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from curvature.dense import DenseOperator, Diagonal, decaying, operator, wanted
from eigenfilter.curvature import eigsh
from eigenfilter.curvature.solvers.krylov_schur import KrylovSchur
from eigenfilter.curvature.solvers.missed_eigenvalues import MissProbability

RUNS = 200


def rand(n: int, seed: int) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_end() -> Tensor:
    return -(rand(97, 9017) + 0.01)


def uniform() -> Tensor:
    return torch.linspace(-1, 1.3, 80, dtype=torch.float64)


def repeated() -> Tensor:
    ends = torch.tensor([5.0] * 3 + [4.0] * 3 + [-4.5] * 3 + [-3.0] * 3, dtype=torch.float64)
    return torch.cat([ends, torch.linspace(-2, 2, 60, dtype=torch.float64)])


def clustered() -> Tensor:
    bulk = torch.linspace(-2, 2.5, 60, dtype=torch.float64)
    return torch.cat([3 - 1e-3 * rand(5, 1), -2.8 + 1e-3 * rand(5, 2), bulk])


def network() -> Tensor:
    """Like the Hessian of a network on digits: some large, a bulk about zero, both dense."""
    large = 20 * 0.7 ** torch.arange(8, dtype=torch.float64)
    return torch.cat([large, -large[2:5] / 5, 0.05 * (rand(90, 3) - 0.3)])


SPECTRA: list[Callable[[], Tensor]] = [dense_end, uniform, repeated, clustered, network]


def missed(values: Tensor, expected: Tensor, which: str) -> bool:
    """Return whether a value errs by more than the tolerance."""
    if which == "LM":  # of two with one magnitude either will do
        values, expected = values.abs(), expected.abs()
    off = (values.sort().values - expected.sort().values).abs()
    return bool((off > 1.5e-4 * expected.sort().values.abs()).any())


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("which", "most"), [("SA", None), ("LA", None), ("LM", None), ("BE", None), ("LA", 0.3)]
)
def test_values_are_missed_no_more_often_than_reported(
    spectrum: Callable[[], Tensor], which: str, most: float | None
) -> None:
    d = spectrum()
    expected = wanted(d, 6, which)
    misses, reported = 0, 0.0
    for seed in range(RUNS):
        result = eigsh(Diagonal(d), 6, which, seed=seed, max_miss_probability=most)
        misses += missed(result.values, expected, which)
        reported += result.miss_probability
        assert result.miss_probability <= (1.0 if most is None else most)
    mean = reported / RUNS
    assert misses <= RUNS * mean + 3 * math.sqrt(RUNS * mean * (1 - min(mean, 1.0)))


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_bound_holds_where_misses_are_frequent(n: int, steps: int) -> None:
    """Stop a sequence early; count how often its start has too small a part of the eigenvector.

    One eigenvalue alone beside many that are alike attains the bound in one step.
    """
    d = torch.zeros(n, dtype=torch.float64)
    d[1:] = torch.linspace(-0.1, 0.1, n - 1) if steps > 1 else 0.0
    d[0] = 1.0
    below, bounds = 0, []
    for seed in range(RUNS):
        run = KrylovSchur(Diagonal(d), n, 1, seed)
        run.start()
        start = abs(float(run.basis.rows[0, 0]))
        for _ in range(steps):
            run.step(1)
        ritz = run.solve()
        if ritz.values.max() < 0.9:
            result = MissProbability(n, (None, 0.9), 1).probability(
                ritz, run.starting_columns, run.rounding
            )
            # (1) for this very eigenvector, lambda = 1 being beyond the level.
            assert result >= min(1.0, math.sqrt(2 * n / math.pi) * start) * (1 - 1e-9)
            below += result <= 0.3
            bounds.append(result)
    assert bounds
    assert below <= RUNS * 0.3 + 3 * math.sqrt(RUNS * 0.3 * 0.7)


@pytest.mark.parametrize("width", [1, 2])
def test_the_bound_goes_on_through_restarts(width: int) -> None:
    """For each eigenvector beyond the level, C^T u lies in the ellipsoid of the bound."""
    spectrum = torch.cat([torch.tensor([1.5]), torch.linspace(-1, 1, 300)]).double()
    op = operator(spectrum)
    u = torch.linalg.eigh(op.matrix).eigenvectors[:, -1]
    run = KrylovSchur(op, 12, width, seed=2)
    run.start()
    rows = run.basis.rows[:width]
    # Almost none of u in the start: Lanczos' iteration takes long to see it.
    rows -= 0.999999999 * torch.outer(rows @ u, u)
    rows /= rows.norm(dim=1, keepdim=True)
    overlap = float((rows @ u).norm())
    unseen = MissProbability(300, (None, 1.4), 1)
    for _ in range(3):
        while not run.full:
            run.step(width)
        ritz = run.solve()
        assert ritz.values.max() < 1.3
        unseen.record_restart(ritz, run.starting_columns, run.rounding)
        run.restart(ritz, np.array([0, *range(len(ritz.values) - 4, len(ritz.values))]))
        volume = math.exp(unseen._logs[1])
        assert overlap**width <= volume * 1.001
    assert volume < 1e-3


@pytest.mark.parametrize("which", ["SA", "LA", "LM", "BE"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("most", [1e-2, 1e-4])
def test_a_smaller_probability_takes_more_products(
    spectrum: Callable[[], Tensor], which: str, most: float
) -> None:
    d = spectrum()
    result = eigsh(Diagonal(d), 6, which, max_miss_probability=most, max_matvecs=2000)
    less = eigsh(Diagonal(d), 6, which, max_miss_probability=0.5, max_matvecs=2000)
    assert 0 <= result.miss_probability <= most
    assert less.matvecs <= result.matvecs
    assert less.matvecs - less.multiplicity_matvecs == result.matvecs - result.multiplicity_matvecs
    assert not missed(result.values, wanted(d, 6, which), which)


@pytest.mark.parametrize("options", [{"block_size": 3}, {"max_basis": 14}, {"tol": 1e-8}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_short_bases_and_tolerances(options: dict[str, object], dtype: torch.dtype) -> None:
    if dtype == torch.float32 and "tol" in options:
        pytest.skip("beyond float32")
    op = operator(decaying(150), dtype)
    result = eigsh(op, 6, max_miss_probability=1e-3, **options)  # type: ignore[arg-type]
    assert result.miss_probability <= 1e-3
    assert result.converged.all()


def test_the_bound_without_a_check_is_one() -> None:
    op = operator(decaying(150))
    assert eigsh(op, 6, check_multiplicity=False).miss_probability == 1.0
    assert eigsh(operator(torch.tensor([3.0, 1.0, 2.0])), 3).miss_probability == 0.0
    alone = eigsh(op, 6, check_multiplicity=False).matvecs
    with pytest.warns(RuntimeWarning, match="cut the check for repeated eigenvalues short"):
        short = eigsh(op, 6, max_matvecs=alone + 1)
    assert 0.5 < short.miss_probability <= 1.0
    usual = eigsh(op, 6)
    assert 0 < usual.miss_probability < 1e-2


def test_a_probability_that_products_do_not_suffice_for_warns() -> None:
    d = torch.linspace(0, 1, 400, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="cut the check for repeated eigenvalues short"):
        result = eigsh(Diagonal(d), 4, max_miss_probability=1e-9, max_matvecs=150)
    assert result.converged.all()
    assert result.miss_probability > 1e-9


def test_what_rounding_may_hide_beside_an_invariant_subspace() -> None:
    """The worst value is zero up to rounding, and so are the values it is compared with."""
    op = Diagonal(torch.tensor([1.0] + [0.0] * 60, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="rounding may hide another one .* out"):
        result = eigsh(op, 4, max_miss_probability=1e-3)
    assert result.converged.all()
    assert result.miss_probability > 1e-3
    assert eigsh(op, 1, max_miss_probability=1e-9).miss_probability <= 1e-9


@pytest.mark.parametrize("n", [300, 30_000])
def test_small_probabilities_in_single_precision(n: int) -> None:
    large = 20 * 0.7 ** torch.arange(12)
    d = torch.cat([large, torch.linspace(-0.05, 0.05, n - 12)])
    result = eigsh(Diagonal(d), 8, max_miss_probability=1e-6)
    assert result.miss_probability <= 1e-6
    assert result.matvecs < 60


@pytest.mark.parametrize("most", [0.0, 1.0, -0.1, float("nan")])
def test_probabilities_out_of_range(most: float) -> None:
    op = DenseOperator(torch.eye(9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"max_miss_probability must be in \(0, 1\)"):
        eigsh(op, 2, max_miss_probability=most)
    assert op.count == 0


def test_a_probability_needs_the_check() -> None:
    op = DenseOperator(torch.eye(9, dtype=torch.float64))
    with pytest.raises(
        ValueError, match="max_miss_probability needs the check for repeated eigenvalues"
    ):
        eigsh(op, 2, max_miss_probability=0.1, check_multiplicity=False)
