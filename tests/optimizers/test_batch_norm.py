"""freeze_batch_norm: running statistics are those of x, outputs are those of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import eigenfilter as ef


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def statistics(model: nn.Sequential) -> list[torch.Tensor]:
    bn = model[1]
    return [t.clone() for t in (bn.running_mean, bn.running_var, bn.num_batches_tracked)]


def test_statistics_stay_and_outputs_do_not_change() -> None:
    model, data = network(), torch.randn(16, 4)
    before = statistics(model)
    with ef.freeze_batch_norm(model):
        frozen = model(data)
    assert all(map(torch.equal, statistics(model), before))
    assert torch.equal(model(data), frozen)
    assert not any(map(torch.equal, statistics(model), before))


def test_in_evaluation_mode_nothing_changes() -> None:
    model, data = network(), torch.randn(16, 4)
    model(data)
    model.eval()
    expected = model(data)
    with ef.freeze_batch_norm(model):
        assert torch.equal(model(data), expected)
        assert not model.training
    assert torch.equal(model(data), expected)


def test_it_ends_with_an_error_and_nests() -> None:
    model, data = network(), torch.randn(16, 4)
    before = statistics(model)
    with pytest.raises(KeyError), ef.freeze_batch_norm(model):
        raise KeyError
    with ef.freeze_batch_norm(model):
        with ef.freeze_batch_norm(model):
            model(data)
        model(data)
    assert all(map(torch.equal, statistics(model), before))
    model(data)
    assert model[1].num_batches_tracked == 1


def test_layers_that_track_nothing_stay_so() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False))
    with ef.freeze_batch_norm(model):
        model(torch.randn(16, 4))
    assert not model[1].track_running_stats
    assert model[1].running_mean is None


def test_a_step_whose_perturbed_gradients_leave_the_statistics_alone() -> None:
    model, data = network(), torch.randn(16, 4)
    plain = network()
    opt = ef.USAM(model.parameters(), lr=0.1, rho=0.1)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        return loss

    closure()
    while opt.ascend():
        with ef.freeze_batch_norm(model):
            closure()
    opt.step()
    plain(data)
    assert all(map(torch.equal, statistics(model), statistics(plain)))
