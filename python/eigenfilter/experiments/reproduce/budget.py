"""Scaling of an experiment to a time budget, estimated from the time of a few steps."""

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

TRAINING, SPECTRA = 0.5, 0.3  # fractions of the budget; the rest is for startup, loading, drawing
START = 7.0  # seconds before the processes of a seed train; two import in 6.4 s on two cores
SECONDS = 1.0  # duration of a timing
FEW = 8  # images per step of a first timing


@dataclass(frozen=True)
class Rates:
    """Seconds per image of a gradient with its update, and of a Hessian-vector product."""

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
    """Return the largest scale in a fixed order that fits into the budget.

    The order is: fewer seeds, then half the epochs, then narrower networks, then half the images.
    Each scale has the finest spectra that fit into their fraction of the budget.

    Args:
        experiment: the experiment.
        full: its full scale.
        minutes: the budget.
        rates: function from the name of a network to its rates; called once per network.
        processes: runs at a time.
        tests: number of images in the test set.

    Returns:
        The scale, its estimated time in seconds, and the rates behind the estimate.

    Raises:
        UserError: no scale fits; the message says what the smallest one takes.
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
            settings = replace(spectrum, samples=min(spectrum.samples, scale.samples, finest))
            runs = scale.seeds * sum(1 for _ in experiment.variants())
            spectra = runs * rate.product * settings.samples * settings.products
            least = max(training / TRAINING, spectra / SPECTRA)
            if least <= 60 * minutes:
                return replace(scale, spectrum=settings), training + spectra, rate
    raise UserError(
        f"--budget {minutes:g} is too small: even the smallest scale takes about "
        f"{least / 60:.2g} minutes here; give as much"
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
    """Estimate the seconds of all runs, which `pipeline.execute` executes seed by seed.

    A seed takes at least as long as its longest run. A test takes a third of the time of a gradient
    per image.
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
    """Time the steps of SGD and the Hessian-vector products of a network.

    The timing uses a whole batch. On a CPU it starts with a few images, and uses no more if these
    are already slow. On a GPU few images take as long as many.
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
            trainer.drain()  # this waits for the device

        gradient = _seconds(step)
        product = _seconds(lambda: op.matvec(vector).sum().item())
    return Rates(gradient / trainer.batch_size, product / trainer.batch_size)


def _seconds(work: Callable[[], object]) -> float:
    work()  # the first call takes longer
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < SECONDS:
        work()
        count += 1
    return (time.perf_counter() - began) / count
