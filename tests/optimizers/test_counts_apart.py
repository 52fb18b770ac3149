"""AdamW's parameters whose numbers of steps are equal at times, and were counted apart."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import eigenfilter as ef
from optimizers.extrapolated import ADAMW, Formula, distance, gradient


class Run:
    """An optimizer, beside a formula for each parameter that counts its own steps.

    Attributes:
        e: the extrapolation that the parameters have.
    """

    def __init__(self, e: float = 0.0, *, splits: bool = False, **options: Any) -> None:
        gen = torch.Generator().manual_seed(2)
        self.params = [
            nn.Parameter(torch.rand(n, generator=gen, dtype=torch.float64)) for n in (5, 3, 4)
        ]
        parts = [self.params[:2], self.params[2:]] if splits else [self.params]
        groups = [{"params": part} for part in parts]
        self.opt = ef.AdamW(groups, **ADAMW | options, extrapolation=e)
        self.formulas = [Formula([p], **options) for p in self.params]
        self.e = e

    def set_gradients(self, given: list[int]) -> None:
        self.opt.zero_grad()
        for i in given:
            self.params[i].grad = gradient(self.params[i].detach())

    def step(self, *given: int, wanted: float | None = None) -> None:
        """Take a step with gradients of some parameters, after which e is the one wanted."""
        for group in self.opt.param_groups:
            if wanted is not None:
                group["extrapolation"] = wanted
        self.set_gradients([*given])
        for i in given:
            self.formulas[i].step(self.e)
        self.opt.step()
        self.e = self.opt.param_groups[0]["extrapolation"]
        self.check()

    def refused_step(self, *given: int) -> None:
        """Take a step that the sparse gradient of the last one ends before its first write."""
        self.set_gradients([*given])
        self.params[given[-1]].grad = self.params[given[-1]].detach().to_sparse()
        with pytest.raises(TypeError, match="is sparse"):
            self.opt.step()
        self.check()

    def eval(self) -> None:
        self.opt.eval()
        self.e = 0.0
        self.check()

    def train(self) -> None:
        self.opt.train()
        self.e = self.opt.param_groups[0]["extrapolation"]
        self.check()

    def check(self) -> None:
        for p, formula in zip(self.params, self.formulas, strict=True):
            assert distance([p], formula.y(self.e)) < 1e-13
            assert float(self.opt.state.get(p, {}).get("step", 0.0)) == formula.steps


def test_a_refused_step_does_not_join_them() -> None:
    run = Run(splits=True)
    for _ in range(2):
        run.step(0, 2)
        run.step(1, 2)
    run.refused_step(0, 1, 2)
    run.step(0)
    run.step(0)
    run.step(0, 1, 2)
    run.step(0, 1, 2)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_change_of_the_extrapolation_does_not_join_them(evaluates: bool) -> None:
    run, e = Run(0.05), iter([0.01 * n for n in range(6, 20)])
    for _ in range(2):
        run.step(0, 2)
        run.step(1, wanted=None if evaluates else next(e))
    if evaluates:  # with equal counts, as the changes were made
        run.eval()
        run.train()
    for given in ((0, 2), (0, 2), (1,), (0, 1, 2), (0, 1, 2), (1,)):
        run.step(*given, wanted=next(e))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("splits", [False, True])
def test_random_steps(splits: bool, seed: int) -> None:
    """Few parameters, in few combinations, so that counts meet often."""
    draw = random.Random(seed)
    run = Run(draw.choice([0.0, 0.05, -0.01]), splits=splits, weight_decay=draw.choice([0.0, 0.3]))
    for _ in range(60):
        given = draw.choice([(0, 2), (1,), (0, 1, 2), (0, 2), (1,), (0,), (2, 1)])
        match draw.choice(["step", "step", "step", "change", "refuse", "eval", "train"]):
            case "step":
                run.step(*given)
            case "change":
                run.step(*given, wanted=draw.choice([0.0, 0.03, 0.05, -0.01]))
            case "refuse":
                run.refused_step(*given)
            case "eval":
                run.eval()
            case "train":
                run.train()
