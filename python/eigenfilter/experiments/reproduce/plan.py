"""The paper's three experiments as configurations, in full or scaled down to a budget.

Methods, radii, momenta and networks are those of the paper. Its text was not available to us when
this was written, so the learning rates, epochs, batch sizes, the width of the MLP and the number of
seeds are ours. The learning rates are large enough for the edges of the filters to be near, and
constant because an edge belongs to one rate. The MLP uses tanh because a Hessian must exist. There
is no weight decay, because with it the filters would hold only to first order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eigenfilter import filters
from eigenfilter.experiments import networks
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import quoted
from eigenfilter.experiments.schema import Nullable, validate

_PAPERS = ("sgd", "sam", "usam", "two_step_usam", "hessian_usam")
METHODS = {name: filters.METHODS[name].title for name in _PAPERS}
GRADIENTS = {name: filters.METHODS[name].gradients for name in _PAPERS}  # per step

CLAIMS = (("sgd", "usam"), ("usam", "two_step_usam"), ("usam", "hessian_usam"))
"""Pairs of methods of which, according to the paper, the first ends at a sharper point."""


@dataclass(frozen=True)
class SpectrumSettings:
    """Settings of the measurement of a Hessian.

    Attributes:
        samples: number of the first training images, without augmentation.
        pairs: number of largest eigenvalues.
        probes: number of random vectors for the density.
        steps: number of products per random vector.
    """

    samples: int = 2000
    pairs: int = 10
    probes: int = 2
    steps: int = 50

    @property
    def products(self) -> int:
        """Estimated number of products, with eight per eigenpair, which is a measured value."""
        return 8 * self.pairs + self.probes * self.steps


COARSER = (
    SpectrumSettings(1000, 10, 2, 40),
    SpectrumSettings(500, 5, 1, 40),
    SpectrumSettings(200, 3, 1, 20),
    SpectrumSettings(100, 1, 1, 10),
    SpectrumSettings(50, 1, 1, 5),
)


@dataclass(frozen=True)
class ExperimentScale:
    """The size of an experiment: numbers of seeds and epochs, the network, the training images."""

    seeds: int
    epochs: int
    model: str
    samples: int
    spectrum: SpectrumSettings = field(default_factory=SpectrumSettings)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ExperimentScale:
        """Make a scale from the result of `asdict`."""
        return cls(**{**values, "spectrum": SpectrumSettings(**values["spectrum"])})


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Attributes:
        title: title of the experiment.
        fixed: options that all its configurations share.
        lr: learning rates by momentum.
        rhos: radii by method; SGD has none.
        full: the full scale.
        narrower: networks for smaller budgets, the largest first.
        least: smallest number of training images, if the set has as many.
    """

    title: str
    fixed: Mapping[str, Any]
    lr: Mapping[float, float]
    rhos: Mapping[str, tuple[float, ...]]
    full: ExperimentScale
    narrower: tuple[str, ...]
    least: int

    def full_on(self, images: int) -> ExperimentScale:
        """Return the full scale for a data set with a number of training images."""
        samples = min(images, self.full.samples)
        spectrum = replace(self.full.spectrum, samples=min(samples, self.full.spectrum.samples))
        return replace(self.full, samples=samples, spectrum=spectrum)

    def variants(self) -> Iterator[tuple[str, float, float | None]]:
        """Yield all combinations of method, momentum and rho."""
        for momentum in self.lr:
            for method in METHODS:
                for rho in self.rhos.get(method, (None,)):
                    yield method, momentum, rho

    def config(
        self, method: str, momentum: float, rho: float | None, *, scale: ExperimentScale, seed: int
    ) -> Config:
        """Return the configuration of one run."""
        radius: dict[str, Any] = {} if rho is None else {"rho": rho}
        return Config(
            **self.fixed,
            **radius,
            optimizer=method,
            momentum=momentum,
            lr=self.lr[momentum],
            lr_schedule="constant",
            model=scale.model,
            epochs=scale.epochs,
            evaluate_every=scale.epochs,
            samples=scale.samples,
            seed=seed,
        )

    def runs(self, scale: ExperimentScale, seed: int) -> dict[str, Config]:
        """Return the configurations of one seed by the names of the runs."""
        configs = {}
        for method, momentum, rho in self.variants():
            radius = "" if rho is None else f"-rho{rho:g}"
            name = f"{method}-momentum{momentum:g}{radius}-seed{seed}"
            configs[name] = self.config(method, momentum, rho, scale=scale, seed=seed)
        return configs


_SMALL = {"sam": (0.05, 0.1, 0.2), "usam": (0.05, 0.1, 0.2), "two_step_usam": (0.05, 0.1, 0.2)}
_MLP: dict[str, Any] = {"batch_size": 512, "activation": "tanh", "threads": 1}


def _image_dataset(title: str, dataset: str) -> Experiment:
    return Experiment(
        title=title,
        fixed={"dataset": dataset, **_MLP},
        lr={0.0: 1.0, 0.9: 0.2},
        rhos={**_SMALL, "hessian_usam": (0.01, 0.02, 0.05, 0.1, 0.2)},
        full=ExperimentScale(seeds=3, epochs=8, model="mlp-32", samples=60_000),
        narrower=(),
        least=1_000,
    )


EXPERIMENTS: Mapping[str, Experiment] = {
    "mnist": _image_dataset("MNIST", "mnist"),
    "fashion": _image_dataset("Fashion-MNIST", "fashion"),
    "cifar10": Experiment(
        title="CIFAR-10",
        fixed={
            "dataset": "cifar10",
            "batch_size": 128,
            "crop": 4,
            "flip": True,
            "channels_last": True,
        },
        lr={0.0: 0.5, 0.9: 0.1},
        rhos=dict.fromkeys(_PAPERS[1:], (0.001,)),
        full=ExperimentScale(seeds=3, epochs=60, model="wrn-16-8", samples=50_000),
        narrower=("wrn-16-4", "wrn-16-2", "wrn-16-1", "wrn-10-1"),
        least=500,
    ),
}


@dataclass(frozen=True)
class Plan:
    """The plan of a reproduction.

    Attributes:
        experiment: name of the experiment.
        seed: the first seed.
        budget: time budget in minutes, or None.
        full: full scale of the experiment.
        scale: scale of this reproduction.
        estimate: estimated time in seconds if there is a budget, else None.
        rates: rates behind the estimate, or None.
    """

    experiment: str
    seed: int
    budget: float | None
    full: ExperimentScale
    scale: ExperimentScale
    estimate: float | None = None
    rates: dict[str, float] | None = None

    @property
    def seeds(self) -> range:
        """All seeds."""
        return range(self.seed, self.seed + self.scale.seeds)

    @property
    def statement(self) -> str:
        """One line that says whether the experiment is run in full, and how it is reduced."""
        reduced = self.reductions
        if self.budget is None:
            return f"scaled by hand: {', '.join(reduced)}" if reduced else "in full"
        head = f"budget of {self.budget:g} minutes"
        if not reduced:
            return f"{head}, which the experiment in full fits into"
        return f"scaled down to a {head}: {', '.join(reduced)}"

    @property
    def reductions(self) -> list[str]:
        """Descriptions of the differences to the full scale."""
        full, scale = self.full, self.scale
        parts = []
        if scale.seeds != full.seeds:
            parts.append(_of(scale.seeds, full.seeds, "seed"))
        if scale.epochs != full.epochs:
            parts.append(_of(scale.epochs, full.epochs, "epoch"))
        if scale.model != full.model:
            parts.append(f"{scale.model} in place of {full.model}")
        if scale.samples != full.samples:
            parts.append(f"{scale.samples:,} of {full.samples:,} training images")
        spectrum, whole = scale.spectrum, full.spectrum
        if spectrum != whole:
            parts.append(
                f"spectra on {_pluralize(spectrum.samples, 'image')}, "
                f"{_pluralize(spectrum.pairs, 'eigenvalue')}, "
                f"{_pluralize(spectrum.probes, 'probe')} of {spectrum.steps} products "
                f"(in full {whole.samples:,}, {whole.pairs}, {whole.probes} of {whole.steps})"
            )
        return parts

    def as_dict(self) -> dict[str, Any]:
        """Return plain data that `of` accepts."""
        return asdict(self) | {"statement": self.statement}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Plan:
        """Make a plan from the result of `as_dict`.

        Raises:
            ValueError: the values are not those of a plan.
        """
        validate(values, _SCHEMA, "the plan")
        if values["experiment"] not in EXPERIMENTS:
            raise ValueError(f"there is no experiment {quoted(values['experiment'])}")
        for scale in (values["full"], values["scale"]):
            networks.parse(scale["model"])
            counts = [scale[name] for name in ("seeds", "epochs", "samples")]
            if min(*counts, *scale["spectrum"].values()) < 1:
                raise ValueError("a number in it is not positive")
        fields = {name: value for name, value in values.items() if name != "statement"}
        return cls(
            **{
                **fields,
                "full": ExperimentScale.of(fields["full"]),
                "scale": ExperimentScale.of(fields["scale"]),
            }
        )


_SCALE_SCHEMA = {
    "seeds": int,
    "epochs": int,
    "model": str,
    "samples": int,
    "spectrum": dict.fromkeys(("samples", "pairs", "probes", "steps"), int),
}
_SCHEMA = {
    "experiment": str,
    "seed": int,
    "budget": Nullable(float),
    "full": _SCALE_SCHEMA,
    "scale": _SCALE_SCHEMA,
    "estimate": Nullable(float),
    "rates": Nullable({"gradient": float, "product": float}),
    "statement": str,
}
"""Schema of the result of `Plan.as_dict`."""


def _of(n: int, full: int, name: str) -> str:
    return f"{_pluralize(n, name)} {'of' if n < full else 'in place of'} {full}"


def _pluralize(n: int, name: str) -> str:
    return f"{n:,} {name}{'s' * (n != 1)}"
