"""Scaling an experiment down to a budget, from the time of its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from eigenfilter.curvature import HessianOperator
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.datasets import ImageDataset
from eigenfilter.experiments.errors import UserError
from eigenfilter.experiments.reproduce.plan import COARSER, GRADIENTS, Experiment, ExperimentScale
from eigenfilter.experiments.trainer import Trainer, reproducible

TRAINING, SPECTRA = 0.5, 0.3  # parts of a budget; the rest is for starting, loading, drawing
START = 7.0  # seconds until the processes of a seed train: two at once import in 6.4 on two cores
SECONDS = 1.0  # that a rate is timed for
FEW = 8  # images that a step is timed on at first


@dataclass(frozen=True)
class Rates:
    """Seconds an image: of a gradient with its update, and of a Hessian-vector product."""

    gradient: float
    product: float


def fit_to_budget(
    experiment: Experiment,
    full: ExperimentScale,
    minutes: float,
    rates: Callable[[str], Rates],
    *,
    processes: int,
    tests: int,
) -> tuple[ExperimentScale, float, Rates]:
    """The largest scale of a fixed order that the budget is thought to suffice for.

    The order: fewer seeds; then epochs, halved; then narrower networks; then images, halved. Each
    is taken with the finest spectra that fit into their part of the budget.

    Args:
        experiment: what is scaled.
        full: its scale in full.
        minutes: the budget.
        rates: of a network, by name; asked once for each.
        processes: runs at a time.
        tests: images of the test set.

    Returns:
        The scale, the seconds it is estimated to take, the rates that this is from.

    Raises:
        UserError: nothing fits; the message says what would.
    """
    rates_by_model: dict[str, Rates] = {}
    least = 0.0
    for scale in _smaller_scales(experiment, full):
        if scale.model not in rates_by_model:
            rates_by_model[scale.model] = rates(scale.model)
        rate = rates_by_model[scale.model]
        training = _training(experiment, scale, rate, tests, processes)
        finest = full.spectrum.samples
        for spectrum in (full.spectrum, *COARSER):
            fine = replace(spectrum, samples=min(spectrum.samples, scale.samples, finest))
            runs = scale.seeds * sum(1 for _ in experiment.variants())
            spectra = runs * rate.product * fine.samples * fine.products
            least = max(training / TRAINING, spectra / SPECTRA)
            if least <= 60 * minutes:
                return replace(scale, spectrum=fine), training + spectra, rate
    raise UserError(
        f"--budget {minutes:g} is too small: even at its smallest the experiment takes about "
        f"{least / 60:.2g} minutes here"
    )


def _smaller_scales(experiment: Experiment, full: ExperimentScale) -> Iterator[ExperimentScale]:
    scale = full
    yield scale
    steps: list[ExperimentScale] = []
    while scale.seeds > 1:
        scale = replace(scale, seeds=scale.seeds - 1)
        steps.append(scale)
    while scale.epochs > 1:
        scale = replace(scale, epochs=scale.epochs // 2)
        steps.append(scale)
    for model in experiment.narrower:
        scale = replace(scale, model=model)
        steps.append(scale)
    while scale.samples // 2 >= experiment.least:
        scale = replace(scale, samples=scale.samples // 2)
        steps.append(scale)
    yield from steps


def _training(
    experiment: Experiment, scale: ExperimentScale, rate: Rates, tests: int, processes: int
) -> float:
    """Seconds of all runs, seed by seed, as `execution.execute` has them.

    A seed takes as long as its longest run at least; a test takes a third of a gradient an image.
    """
    runs = [
        (scale.epochs * scale.samples * GRADIENTS[method] + tests / 3) * rate.gradient
        for method, _, _ in experiment.variants()
    ]
    return scale.seeds * (START + max(*runs, sum(runs) / min(processes, len(runs))))


def measure_rates(
    experiment: Experiment,
    full: ExperimentScale,
    model: str,
    data: ImageDataset,
    device: torch.device,
) -> Rates:
    """Time steps of SGD and Hessian-vector products of a network.

    On a whole batch; on a CPU on a few images first, and on no more where these are slow already.
    A GPU takes as long for few as for many.
    """
    config = experiment.config("sgd", 0.0, None, scale=replace(full, model=model), seed=0)
    if device.type == "cpu":
        rates = _rates(replace(config, batch_size=FEW), data, device)
        if rates.gradient * config.batch_size > SECONDS:
            return rates
    return _rates(config, data, device)


def _rates(config: Config, data: ImageDataset, device: torch.device) -> Rates:
    with reproducible(config, device):
        trainer = Trainer(replace(config, epochs=1_000_000), data, device)
        op = HessianOperator(
            trainer.model, trainer.loss_fn, trainer.examples(trainer.batch_size), mode="train"
        )
        vector = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)

        def step() -> None:
            trainer.advance()
            trainer.drain()  # waits for the device

        gradient = _seconds(step)
        product = _seconds(lambda: op.matvec(vector).sum().item())
    return Rates(gradient / trainer.batch_size, product / trainer.batch_size)


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first time takes longer
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < SECONDS:
        work()
        count += 1
    return (time.perf_counter() - began) / count
