"""Every method is registered once, with its ascents, its optimizer and its theory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eigenfilter import filters
from eigenfilter.filters import ASCENTS
from eigenfilter.optimizers import registry
from eigenfilter.optimizers.registry import OPTIMIZERS, PERTURBATIONS, VARIANTS


def test_every_method_has_all_three() -> None:
    assert set(PERTURBATIONS) == set(ASCENTS) == set(OPTIMIZERS) - {"sgd", "msam", "adamw"}
    assert {method for method, _ in VARIANTS.values()} <= set(PERTURBATIONS)
    assert registry.updates() == ("adamw",)


@pytest.mark.parametrize("names", [("usam", {}), ("adamw", {}), ("asam", {}), ("new", {"sam": {}})])
def test_a_name_is_registered_once(names: tuple[str, dict[str, Any]]) -> None:
    before = dict(OPTIMIZERS), dict(PERTURBATIONS), dict(VARIANTS)
    with pytest.raises(ValueError, match="is registered already: choose another one"):
        registry.register(names[0], PERTURBATIONS["usam"], **names[1])
    assert before == (OPTIMIZERS, PERTURBATIONS, VARIANTS)
    with pytest.raises(ValueError, match="the name 'usam' is registered already"):
        filters.methods.register(filters.USAM)


@pytest.mark.parametrize("name", ASCENTS)
def test_the_names_agree(name: str) -> None:
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(2))], lr=0.1)
    ascent = PERTURBATIONS[name]()
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
