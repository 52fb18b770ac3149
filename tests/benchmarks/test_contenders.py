"""Contenders take the same steps, and the verification fails if one does not."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from benchmarks import training
from benchmarks.comparison import Setting
from benchmarks.methods import LR, METHODS, MOMENTUM, RHO, Method
from benchmarks.networks import NETWORKS
from benchmarks.optimizers import step
from benchmarks.peers import pytorch_optimizer_sam
from benchmarks.shapes import TensorProblem
from benchmarks.verify import verify
from eigenfilter import USAM

CPU = Setting(torch.device("cpu"), "native")
PROBLEM = TensorProblem([(7,), (3, 5), ()], CPU.device)


def usam_with_larger_rho() -> Method:
    """USAM with a rho that is not its peers'."""

    def make(params: list[torch.nn.Parameter], backend: str) -> USAM:
        return USAM(params, lr=LR, momentum=MOMENTUM, rho=1.1 * RHO, backend=backend)

    return dataclasses.replace(METHODS["usam"], make=make)


@pytest.mark.parametrize("method", METHODS)
def test_all_contenders_take_the_same_steps(method: str) -> None:
    verdict = verify(step(METHODS[method], PROBLEM, CPU))
    assert len(verdict.errors) >= 2
    assert not verdict.failures


def test_another_rho_fails() -> None:
    assert set(verify(step(usam_with_larger_rho(), PROBLEM, CPU)).failures) == {
        "common SAM",
        "foreach SAM",
    }


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="needs pytorch-optimizer"
)
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_pytorch_optimizer_takes_part(method: str) -> None:
    comparison = step(METHODS[method], PROBLEM, CPU)
    assert "pytorch_optimizer" in verify(comparison).errors
    assert comparison.absent == ()


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_a_missing_peer_has_a_line(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch_optimizer_sam, "is_installed", lambda: False)
    comparison = step(METHODS[method], PROBLEM, CPU)
    assert [peer.name for peer in comparison.peers] == ["common SAM", "foreach SAM"]
    (line,) = comparison.absent
    assert line == "pytorch_optimizer is not installed: pip install --group bench"


@pytest.mark.parametrize("network", NETWORKS)
def test_training_steps_agree_and_another_rho_fails(network: str) -> None:
    tolerance = training.tolerance("usam", network)
    right = verify(training.train(METHODS["usam"], NETWORKS[network], CPU, tolerance))
    assert not right.failures
    wrong = verify(training.train(usam_with_larger_rho(), NETWORKS[network], CPU, tolerance))
    assert set(wrong.failures) == {"common SAM", "foreach SAM"}


def test_the_reference_takes_as_many_gradients_as_the_method() -> None:
    calls = []
    network = NETWORKS["gpt"]

    def make() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        model.register_forward_hook(lambda *_: calls.append(1))
        return model

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, 4), torch.tensor([0, 2])

    network = dataclasses.replace(network, make=make, data=data)
    comparison = training.train(
        METHODS["two-step-usam"], network, CPU, training.tolerance("two-step-usam", "gpt")
    )
    (gradients,) = comparison.references
    for contender in (comparison.library, gradients.contender):
        calls.clear()
        contender.repeat(1)
        assert len(calls) == 3
