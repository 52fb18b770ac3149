"""What the core does with parameters for the optimizers: gradients, identity of lists and state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eigenfilter import _core

KEY = "momentum_buffer"
MOMENTS = ("exp_avg", "exp_avg_sq")


def parameters(count: int = 3) -> list[Tensor]:
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_gradients_and_how_many_are_missing() -> None:
    params = parameters()
    params[1].grad = torch.ones(2)
    grads, missing = _core.gradients(params)
    assert missing == 2
    assert grads[1] is params[1].grad
    assert grads[0] is grads[2] is None
    assert _core.gradients([]) == ([], 0)


def test_clearing_gradients() -> None:
    params = parameters()
    for p in params[1:]:
        p.grad = torch.ones(2)
    _core.clear_gradients(params)
    assert all(p.grad is None for p in params)


def test_what_has_no_gradient_raises() -> None:
    with pytest.raises(AttributeError, match="grad"):
        _core.gradients([1.0])
    with pytest.raises(AttributeError, match="grad"):
        _core.clear_gradients([1.0])


def test_the_same_objects() -> None:
    a, b, c = parameters()
    assert _core.same_objects([a, b], [a, b])
    assert not _core.same_objects([a, b], [b, a])
    assert not _core.same_objects([a, b], [a, c])  # equal values are not enough
    assert not _core.same_objects([a, b], [a])
    assert not _core.same_objects([a], [a, b])
    assert _core.same_objects([], [])


def test_the_same_entries() -> None:
    a, b = parameters(2)
    m = torch.ones(2)
    state = {a: {KEY: m}, b: {"other": m}}
    entries, values = list(state.values()), [m, None]
    assert _core.same_entries(state, entries, (KEY,), values)
    assert not _core.same_entries(state, entries, ("other",), values)
    assert not _core.same_entries(state, entries, (KEY,), [m.clone(), None])
    assert not _core.same_entries(state, [dict(entries[0]), entries[1]], (KEY,), values)
    assert not _core.same_entries({a: state[a]}, entries, (KEY,), values)
    assert _core.same_entries(state | {"read by a defaultdict": {}}, entries, (KEY,), values)
    assert not _core.same_entries(state | {"more": {"other": m}}, entries, (KEY,), values)
    both = [m, None, None, m]
    assert _core.same_entries(state, entries, (KEY, "other"), both)
    assert not _core.same_entries(state, entries, (KEY, "other"), [m, None, m, None])
    state[b][KEY] = m
    assert not _core.same_entries(state, entries, (KEY,), values)


def test_the_same_entries_of_several_keys() -> None:
    """Values go entry by entry, each with all keys."""
    a, b = parameters(2)
    m, v, n = torch.ones(3, 2)
    state = {a: dict(zip(MOMENTS, (m, v), strict=True)), b: {"exp_avg": n}}
    entries, values = list(state.values()), [m, v, n, None]
    assert _core.same_entries(state, entries, MOMENTS, values)
    assert not _core.same_entries(state, entries, MOMENTS[::-1], values)
    assert not _core.same_entries(state, entries, MOMENTS, [m, n, v, None])
    assert not _core.same_entries(state, entries, MOMENTS, [m, v, n, v])
    state[b]["exp_avg_sq"] = v
    assert not _core.same_entries(state, entries, MOMENTS, values)
    state[a]["exp_avg_sq"] = v.clone()
    assert not _core.same_entries(state, entries, MOMENTS, [m, v, n, v])


def test_an_entry_that_is_no_dictionary_is_another_one() -> None:
    entry = object()
    assert not _core.same_entries({"p": entry}, [entry], (KEY,), [None])
