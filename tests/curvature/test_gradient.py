"""The gradient of an operator: over all data, at x or elsewhere, without side effects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature.networks import make
from eigenfilter.curvature import HessianOperator


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("name", ["mlp", "conv_norm", "transformer"])
def test_the_gradient_is_that_of_all_data(name: str) -> None:
    model, x, y = make(name)
    model.eval()
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    op = HessianOperator(model, nn.functional.cross_entropy, batches)
    loss = nn.functional.cross_entropy(model(x), y)
    exact = flat(list(torch.autograd.grad(loss, op.params)))
    assert torch.allclose(op.gradient(), exact, rtol=1e-12, atol=1e-14)


def test_a_gradient_elsewhere_leaves_the_parameters_unchanged() -> None:
    model, x, y = make("mlp")
    op = HessianOperator(model, nn.functional.cross_entropy, (x, y))
    here = flat([p.detach() for p in op.params])
    versions = [p._version for p in op.params]
    there = here + 0.1 * torch.randn_like(here)
    result = op.gradient(there)
    assert torch.equal(flat([p.detach() for p in op.params]), here)
    assert [p._version for p in op.params] == versions
    assert all(p.grad is None and p.requires_grad for p in op.params)
    assert not there.requires_grad
    with torch.no_grad():
        for p, piece in zip(op.params, there.split([p.numel() for p in op.params]), strict=True):
            p.copy_(piece.view_as(p))
    assert torch.equal(result, op.gradient())
    assert torch.allclose(op.gradient(here) - result, -(op.gradient() - op.gradient(here)))


def test_a_point_of_another_shape_or_dtype_raises() -> None:
    model, x, y = make("mlp")
    op = HessianOperator(model, nn.functional.cross_entropy, (x, y))
    with pytest.raises(ValueError, match="at must be"):
        op.gradient(torch.zeros(3, dtype=torch.float64))
