"""Every method is registered once, with its ascents, its optimizer and its theory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eigenfilter.filters import ASCENTS
from eigenfilter.optimizers.registry import METHODS, OPTIMIZERS, VARIANTS


def test_every_method_has_all_three() -> None:
    assert set(METHODS) == set(ASCENTS) == set(OPTIMIZERS) - {"sgd"}
    assert {method for method, _ in VARIANTS.values()} <= set(METHODS)


@pytest.mark.parametrize("name", ASCENTS)
def test_the_names_agree(name: str) -> None:
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(2))], lr=0.1)
    ascent = METHODS[name]()
    assert ascent.method == optimizer.method == name
    assert ascent.theory is ASCENTS[name]
    assert ascent.title == ASCENTS[name].title


@pytest.mark.parametrize("name", ASCENTS)
def test_a_step_takes_as_many_gradients_as_the_theory_says(name: str) -> None:
    x = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = OPTIMIZERS[name]([x], lr=0.1)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls == ASCENTS[name].gradients
