"""The paper's three experiments as configurations, in full or scaled down to a budget.

Methods, radii, momenta and networks are the paper's. Its text was not available to us when this was
written, so that learning rates, epochs, batch sizes, widths of the MLP and seeds are ours: rates so
large that the filters' edges are near, constant, since an edge is that of one rate; tanh in the
MLP, since a Hessian is wanted; no weight decay, with which the filters would hold to first order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eigenfilter.experiments import networks
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import quoted
from eigenfilter.experiments.schema import Nullable, validate

METHODS = {
    "sgd": "SGD",
    "sam": "SAM",
    "usam": "USAM",
    "two_step_usam": "two-step USAM",
    "hessian_usam": "Hessian USAM",
}
GRADIENTS = {"sgd": 1, "sam": 2, "usam": 2, "two_step_usam": 3, "hessian_usam": 3}  # a step

CLAIMS = (("sgd", "usam"), ("usam", "two_step_usam"), ("usam", "hessian_usam"))
"""Which of two methods the paper says to end at the sharper point, it first."""


@dataclass(frozen=True)
class SpectrumSettings:
    """How a Hessian is measured.

    Attributes:
        samples: the first training images, as they are.
        pairs: largest eigenvalues.
        probes, steps: random vectors of the density, and products with each.
    """

    samples: int = 2000
    pairs: int = 10
    probes: int = 2
    steps: int = 50

    @property
    def products(self) -> int:
        """About how many products it takes: eight an eigenpair, as measured."""
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
    """How large an experiment is: the seeds and epochs, the network, the training images."""

    seeds: int
    epochs: int
    model: str
    samples: int
    spectrum: SpectrumSettings = field(default_factory=SpectrumSettings)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ExperimentScale:
        """From what `asdict` gives."""
        return cls(**{**values, "spectrum": SpectrumSettings(**values["spectrum"])})


@dataclass(frozen=True)
class Experiment:
    """One of the paper's.

    Attributes:
        title: in words.
        fixed: what every configuration has.
        lr: by momentum.
        rhos: by method; none for SGD.
        full: the experiment in full.
        narrower: networks for smaller budgets, the largest first.
        least: images that are trained on at least, where there are so many.
    """

    title: str
    fixed: Mapping[str, Any]
    lr: Mapping[float, float]
    rhos: Mapping[str, tuple[float, ...]]
    full: ExperimentScale
    narrower: tuple[str, ...]
    least: int

    def full_on(self, images: int) -> ExperimentScale:
        """The experiment in full on a set of so many training images."""
        samples = min(images, self.full.samples)
        spectrum = replace(self.full.spectrum, samples=min(samples, self.full.spectrum.samples))
        return replace(self.full, samples=samples, spectrum=spectrum)

    def variants(self) -> Iterator[tuple[str, float, float | None]]:
        """Yield method, momentum and rho of each."""
        for momentum in self.lr:
            for method in METHODS:
                for rho in self.rhos.get(method, (None,)):
                    yield method, momentum, rho

    def config(
        self, method: str, momentum: float, rho: float | None, *, scale: ExperimentScale, seed: int
    ) -> Config:
        """The configuration of one run."""
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
        """The runs of one seed, by name."""
        found = {}
        for method, momentum, rho in self.variants():
            radius = "" if rho is None else f"-rho{rho:g}"
            name = f"{method}-momentum{momentum:g}{radius}-seed{seed}"
            found[name] = self.config(method, momentum, rho, scale=scale, seed=seed)
        return found


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
        rhos=dict.fromkeys(("sam", "usam", "two_step_usam", "hessian_usam"), (0.001,)),
        full=ExperimentScale(seeds=3, epochs=60, model="wrn-16-8", samples=50_000),
        narrower=("wrn-16-4", "wrn-16-2", "wrn-16-1", "wrn-10-1"),
        least=500,
    ),
}


@dataclass(frozen=True)
class Plan:
    """What is run, and what it was scaled down from.

    Attributes:
        experiment: name.
        seed: the first.
        budget: minutes, or None.
        full, scale: of the experiment, and of this.
        estimate: seconds it was thought to take, where there was a budget.
        rates: that the estimate is from.
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
        """All of them."""
        return range(self.seed, self.seed + self.scale.seeds)

    @property
    def statement(self) -> str:
        """Whether this is the experiment in full, and what was left out, in a line."""
        reduced = self.reductions
        if self.budget is None:
            return f"scaled by hand: {', '.join(reduced)}" if reduced else "in full"
        head = f"budget of {self.budget:g} minutes"
        if not reduced:
            return f"{head}, which the experiment in full fits into"
        return f"scaled down to a {head}: {', '.join(reduced)}"

    @property
    def reductions(self) -> list[str]:
        """What is other than in full, each in words."""
        full, here = self.full, self.scale
        words = []
        if here.seeds != full.seeds:
            words.append(_of(here.seeds, full.seeds, "seed"))
        if here.epochs != full.epochs:
            words.append(_of(here.epochs, full.epochs, "epoch"))
        if here.model != full.model:
            words.append(f"{here.model} in place of {full.model}")
        if here.samples != full.samples:
            words.append(f"{here.samples:,} of {full.samples:,} training images")
        spectrum, whole = here.spectrum, full.spectrum
        if spectrum != whole:
            words.append(
                f"spectra on {_pluralize(spectrum.samples, 'image')}, "
                f"{_pluralize(spectrum.pairs, 'eigenvalue')}, "
                f"{_pluralize(spectrum.probes, 'probe')} of {spectrum.steps} products "
                f"(in full {whole.samples:,}, {whole.pairs}, {whole.probes} of {whole.steps})"
            )
        return words

    def as_dict(self) -> dict[str, Any]:
        """Plain data, which `of` takes."""
        return asdict(self) | {"statement": self.statement}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Plan:
        """From what `as_dict` gives.

        Raises:
            ValueError: it is something else.
        """
        validate(values, _WANTED, "the plan")
        if values["experiment"] not in EXPERIMENTS:
            raise ValueError(f"there is no experiment {quoted(values['experiment'])}")
        for scale in (values["full"], values["scale"]):
            networks.parse(scale["model"])
            counts = [scale[name] for name in ("seeds", "epochs", "samples")]
            if min(*counts, *scale["spectrum"].values()) < 1:
                raise ValueError("a number in it is not above 0")
        fields = {name: value for name, value in values.items() if name != "statement"}
        return cls(
            **{
                **fields,
                "full": ExperimentScale.of(fields["full"]),
                "scale": ExperimentScale.of(fields["scale"]),
            }
        )


_SCALE = {
    "seeds": int,
    "epochs": int,
    "model": str,
    "samples": int,
    "spectrum": dict.fromkeys(("samples", "pairs", "probes", "steps"), int),
}
_WANTED = {
    "experiment": str,
    "seed": int,
    "budget": Nullable(float),
    "full": _SCALE,
    "scale": _SCALE,
    "estimate": Nullable(float),
    "rates": Nullable({"gradient": float, "product": float}),
    "statement": str,
}
"""What `Plan.as_dict` gives."""


def _of(n: int, full: int, name: str) -> str:
    return f"{_pluralize(n, name)} {'of' if n < full else 'in place of'} {full}"


def _pluralize(n: int, name: str) -> str:
    return f"{n:,} {name}{'s' * (n != 1)}"
