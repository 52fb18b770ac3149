"""Those who are timed take the same steps; where one would not, its row is red."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from benchmarks.contest import Setting
from benchmarks.methods import LR, METHODS, MOMENTUM, RHO, Method
from benchmarks.networks import NETWORKS
from benchmarks.optimizers import step
from benchmarks.peers import pytorch_optimizer_sam
from benchmarks.shapes import Problem
from benchmarks.verify import verify

from benchmarks import training
from eigenfilter import USAM

CPU = Setting(torch.device("cpu"), "native")
PROBLEM = Problem([(7,), (3, 5), ()], CPU.device)


def off_by_a_tenth() -> Method:
    """USAM beside peers whose rho is another."""

    def make(params: list[torch.nn.Parameter], backend: str) -> USAM:
        return USAM(params, lr=LR, momentum=MOMENTUM, rho=1.1 * RHO, backend=backend)

    return dataclasses.replace(METHODS["usam"], make=make)


@pytest.mark.parametrize("method", METHODS)
def test_all_take_the_same_steps(method: str) -> None:
    verdict = verify(step(METHODS[method], PROBLEM, CPU))
    assert len(verdict.errors) >= 2
    assert not verdict.red


def test_another_rho_is_red() -> None:
    assert set(verify(step(off_by_a_tenth(), PROBLEM, CPU)).red) == {"common SAM", "foreach SAM"}


@pytest.mark.skipif(
    importlib.util.find_spec("pytorch_optimizer") is None, reason="needs pytorch-optimizer"
)
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_pytorch_optimizer_takes_part(method: str) -> None:
    contest = step(METHODS[method], PROBLEM, CPU)
    assert "pytorch_optimizer" in verify(contest).errors
    assert contest.absent == ()


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_a_missing_peer_says_so(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch_optimizer_sam, "installed", lambda: False)
    contest = step(METHODS[method], PROBLEM, CPU)
    assert [peer.name for peer in contest.peers] == ["common SAM", "foreach SAM"]
    (line,) = contest.absent
    assert line == "pytorch_optimizer is not installed: pip install --group bench"


@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_alike_and_another_rho_is_red(network: str) -> None:
    tolerance = training.tolerance("usam", network)
    right = verify(training.train(METHODS["usam"], NETWORKS[network], CPU, tolerance))
    assert not right.red
    wrong = verify(training.train(off_by_a_tenth(), NETWORKS[network], CPU, tolerance))
    assert set(wrong.red) == {"common SAM", "foreach SAM"}


def test_gradients_alone_are_as_many_as_the_method_needs() -> None:
    calls = []
    network = NETWORKS["gpt"]

    def make() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        model.register_forward_hook(lambda *_: calls.append(1))
        return model

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, 4), torch.tensor([0, 2])

    network = dataclasses.replace(network, make=make, data=data)
    contest = training.train(
        METHODS["two-step-usam"], network, CPU, training.tolerance("two-step-usam", "gpt")
    )
    (gradients,) = contest.yardsticks
    for contender in (contest.library, gradients.contender):
        calls.clear()
        contender.repeat(1)
        assert len(calls) == 3
