"""A late switch: SGD becomes USAM halfway, and the sharpness falls to the edge of USAM.

Two runs with the same start take the same steps for the first half. Then one of them turns rho on
at the same lr, which lowers its edge by 20%. Before the switch a step costs one gradient.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import eigenfilter as ef
from eigenfilter.experiments.full_batch import FullBatchRun, FullBatchTraining, MethodSpec
from eigenfilter.experiments.phenomena.common import (
    PhenomenonSetting,
    parse_setting,
    report,
    settled_ratio,
    train,
)
from eigenfilter.experiments.phenomena.common import configure as configure_training
from eigenfilter.filters import design
from eigenfilter.schedulers import RhoScheduler

HELP = "switching SGD to USAM late lowers the sharpness"
TITLE = "A late switch to USAM"
LOWER = 0.8  # ratio of the edge of USAM to the edge of SGD
START = 0.5  # fraction of the steps before the switch


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    configure_training(parser, "late", steps=1500)


def run(args: argparse.Namespace) -> int:
    """Train with and without the switch; return the exit code."""
    setting = parse_setting(args)
    lr = design("sgd", setting.edge)
    rho = design("usam", LOWER * setting.edge, lr=lr)
    plain = MethodSpec("SGD", f"lr {lr:.3g}", lambda p: ef.SGD(p, lr=lr))
    switching = MethodSpec(
        "SGD, then USAM", f"lr {lr:.3g}, rho {rho:.3g}", lambda p: ef.USAM(p, lr=lr, rho=rho)
    )
    runs = [train(setting, plain, share=0.4), switched(setting, switching)]
    half = [[c for c in r.history if c.step < START * setting.steps] for r in runs]
    before = [asdict(settled_ratio(checks)) for checks in half]
    report(setting, "late", TITLE, runs, {"start": START, "before": before})
    return 0


def switched(setting: PhenomenonSetting, method: MethodSpec) -> FullBatchRun:
    """Train with USAM, whose rho is 0 until the switch."""
    schedules: list[RhoScheduler] = []

    def prepare(training: FullBatchTraining) -> None:
        schedules.append(
            RhoScheduler(training.optimizer, "late", total_steps=setting.steps, start=START)
        )

    return train(setting, method, at_start=prepare, after_step=lambda _: schedules[0].step())
