"""Whatever argument is bad, in whatever way: one clear error in every backend, and no write."""

from __future__ import annotations

import pytest
import torch

from eigenfilter import kernels
from refusals import KERNELS, assert_refused, bad_calls


@pytest.mark.parametrize("name", KERNELS)
def test_sound_arguments_are_accepted(name: str, host_backend: str) -> None:
    KERNELS[name](host_backend, **KERNELS[name].make())


@pytest.mark.parametrize("name", KERNELS)
def test_bad_arguments_are_refused(name: str, host_backend: str) -> None:
    kernel = KERNELS[name]
    wrong = []
    for argument, what, arguments, bad in bad_calls(kernel):
        try:
            assert_refused(kernel, host_backend, argument, arguments, bad)
        except Exception as error:  # all of them are to be seen
            wrong.append(f"{argument}, {what}: {type(error).__name__}: {str(error)[:150]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", KERNELS)
def test_all_backends_refuse_in_the_same_words(name: str, host_backend: str) -> None:
    kernel = KERNELS[name]
    for argument, _, arguments, bad in bad_calls(kernel):
        if argument != "backend":
            backends = (host_backend, "reference")
            words = {assert_refused(kernel, b, argument, arguments, bad) for b in backends}
            assert len(words) == 1, words


def test_parameters_that_require_grad_are_no_reason_to_refuse() -> None:
    for backend in ("native", "reference"):
        x = torch.ones(4, requires_grad=True)
        g, b = torch.ones(4, requires_grad=True), torch.zeros(4)
        kernels.select("cpu", backend).perturb([x], [g], [b], 0.5)
        assert x.tolist() == [1.5] * 4
        assert not b.requires_grad
        norm = kernels.norm([x], backend=backend)
        assert not norm.requires_grad
