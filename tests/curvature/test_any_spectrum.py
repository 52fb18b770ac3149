"""eigsh on spectra of integers, which repeat their eigenvalues in any way."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvature.dense import assert_eigenpairs, operator, wanted
from eigenfilter.curvature import eigsh

spectra = st.lists(st.integers(-6, 6), min_size=1, max_size=24)


@settings(max_examples=150)
@given(spectra, st.data())
def test_any_spectrum(integers: list[int], data: st.DataObject) -> None:
    """Small spectra with many repeated eigenvalues, every end, any k, any block size."""
    spectrum = torch.tensor(integers, dtype=torch.float64)
    k = data.draw(st.integers(1, len(integers)))
    which = data.draw(st.sampled_from(["LA", "SA", "LM", "BE"]))
    block_size = data.draw(st.integers(1, 3))
    op = operator(spectrum)
    result = eigsh(op, k, which, block_size=block_size)
    expected = wanted(spectrum, k, which)
    if which == "LM":  # -2 and 2 may stand for each other
        torch.testing.assert_close(result.values.abs(), expected.abs(), rtol=1e-4, atol=1e-9)
    else:
        assert_eigenpairs(op, result, expected, 1e-4)
