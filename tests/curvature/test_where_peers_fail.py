"""Cases that other libraries get wrong, with the right results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature.dense import assert_eigenpairs, operator, wanted
from curvature.networks import Partial, columns, make
from eigenfilter.curvature import HessianOperator, eigsh, spectral_density, trace


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_an_eigenvalue_is_reported_once(which: str) -> None:
    """Lanczos without reorthogonalization returns the largest one nine times, all converged."""
    spectrum = torch.cat([torch.tensor([100.0, -80.0]), torch.linspace(0, 1, 298)])
    op = operator(spectrum, torch.float32)
    alpha, beta, q, v = [], [], [torch.zeros(300), torch.ones(300) / 300**0.5], torch.zeros(300)
    for _ in range(120):
        v = op.matrix @ q[-1] - (beta[-1] if beta else 0.0) * q[-2]
        alpha.append(v @ q[-1])
        v -= alpha[-1] * q[-1]
        beta.append(v.norm())
        q.append(v / beta[-1])
    t = torch.tensor(alpha).diag() + torch.tensor(beta[:-1]).diag(1)
    assert (torch.linalg.eigvalsh(t, UPLO="U") > 99.9).sum() >= 9
    op.count = 0
    result = eigsh(op, 9, which)
    assert_eigenpairs(op, result, wanted(spectrum, 9, which), 1e-4)
    assert (result.values > 99.9).sum() == 1


def test_twenty_steps_are_not_called_converged() -> None:
    spectrum = 10 * 0.97 ** torch.arange(400.0, dtype=torch.float64)
    op = operator(spectrum)
    with pytest.warns(RuntimeWarning, match="after 20 products"):
        early = eigsh(op, 10, max_matvecs=20, max_basis=40)
    expected = wanted(spectrum, 10, "LA")
    wrong = ((early.values - expected) / expected).abs()
    assert wrong.max() > 0.1
    assert not early.converged[1:].any()
    op.count = 0
    assert_eigenpairs(op, eigsh(op, 10, max_matvecs=1000), expected, 1e-4)


@pytest.mark.parametrize("pool", [True, False])
def test_finite_differences_say_when_they_are_nonsense(pool: bool) -> None:
    """The gradient jumps at a ReLU, and more so with max-pooling."""
    layers = [nn.Linear(5, 64), nn.ReLU(), *([nn.MaxPool1d(2)] if pool else [])]
    model = nn.Sequential(*layers, nn.Linear(32 if pool else 64, 3))
    x, target = torch.randn(300, 5), torch.randint(3, (300,))
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), engine="finite_difference")
    v = torch.randn(op.shape[0])
    with pytest.warns(RuntimeWarning, match=r"off by about \d+%.*ReLU, max-pooling") as records:
        result = op.matvec(v)
    exact = HessianOperator(model, nn.CrossEntropyLoss(), (x, target)).matvec(v)
    assert (result - exact).norm() > 0.3 * exact.norm()
    assert op.error is not None
    assert op.error > 0.1
    assert records[0].filename == __file__


def regression() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model, 2,000 samples of which the last 100 are larger, and its Hessian."""
    x = torch.randn(2000, 6, dtype=torch.float64)
    x[1900:] *= 3
    return nn.Linear(6, 1, bias=False).double(), x, x.sin().sum(1, keepdim=True), x.T @ x / 1000


def test_a_small_last_batch_counts_by_its_samples() -> None:
    """1,900 and 100 samples; the plain mean of the two batches is far off."""
    model, x, target, expected = regression()
    loader = DataLoader(TensorDataset(x, target), batch_size=1900)
    large, small = x[:1900], x[1900:]
    plain = (large.T @ large / 950 + small.T @ small / 50) / 2
    assert (plain - expected).norm() > 0.36 * expected.norm()
    op = HessianOperator(model, nn.MSELoss(), loader)
    torch.testing.assert_close(columns(op), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch_size", [2000, 1000, 150])
def test_a_loader_is_averaged_not_summed(batch_size: int) -> None:
    """Sharpness, trace and density do not grow with the number of batches."""
    model, x, target, expected = regression()
    op = HessianOperator(
        model, nn.MSELoss(), DataLoader(TensorDataset(x, target), batch_size=batch_size)
    )
    values = torch.linalg.eigvalsh(expected)
    assert eigsh(op, 1).values.item() == pytest.approx(values[-1].item(), rel=1e-4)
    assert trace(op, 18).value.item() == pytest.approx(values.sum().item(), rel=1e-12)
    nodes = spectral_density(op, 1, 6).nodes
    torch.testing.assert_close(nodes[0], values, rtol=1e-8, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_model_is_left_in_its_mode(mode: str, training: bool) -> None:
    """Each submodule keeps its own mode, such as a layer frozen in evaluation mode."""
    model, x, target = make("partial")
    assert isinstance(model, Partial)
    model.train(training)
    model.norm.train(not training)
    before = [module.training for module in model.modules()]
    op = HessianOperator(model, nn.CrossEntropyLoss(), (x, target), mode=mode)
    eigsh(op, 2)
    spectral_density(op, 2, 5)
    assert [module.training for module in model.modules()] == before
