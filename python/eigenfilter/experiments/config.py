"""What a training run is: plain data, from one YAML file and flags over it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenfilter.experiments import networks
from eigenfilter.experiments.errors import quoted
from eigenfilter.experiments.files import replace_text
from eigenfilter.schedulers import KINDS as RHO_SCHEDULES

DATASETS = ("digits", "mnist", "fashion", "cifar10", "cifar100")
OPTIMIZERS = ("sgd", "usam", "sam", "asam", "two_step_usam", "hessian_usam", "adamw")
METHODS = ("none", "usam", "sam", "asam", "two_step_usam", "hessian_usam")
LR_SCHEDULES = ("constant", "linear", "cosine", "step")
PRECISIONS = ("float32", "bfloat16", "float64")
LOSSES = ("cross_entropy", "square")

Parse = Callable[[Any], Any]


def _option(default: Any, parse: Parse, words: str) -> Any:
    """A field with what its values may be and what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"parse": parse, "help": words})


def _number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Any:
    """Finite numbers from low to high, without them where `above` and `below` say so."""
    start = f"above {low:g}" if above else f"of at least {low:g}"
    end = "" if math.isinf(high) else f" and {'below' if below else 'at most'} {high:g}"

    def parse(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        fits = (low < number if above else low <= number) and (
            number < high if below or math.isinf(high) else number <= high
        )
        if not fits:
            raise ValueError(f"must be a number {start}{end}, not {quoted(value)}")
        return number

    return parse


def _whole(low: int, high: int = 2**62) -> Parse:
    """Whole numbers from low on."""

    def parse(value: Any) -> int:
        try:
            number = low - 1 if isinstance(value, bool) else int(value)
            number = number if isinstance(value, str) or number == value else low - 1
        except (TypeError, ValueError, OverflowError):
            number = low - 1
        if not low <= number <= high:
            end = f" and at most {high}" if high < 2**62 else ""
            raise ValueError(f"must be a whole number of at least {low}{end}, not {quoted(value)}")
        return number

    return parse


def _one_of(choices: tuple[str, ...]) -> Parse:
    def parse(value: Any) -> str:
        if value not in choices:
            near = nearest(value, choices)
            raise ValueError(f"must be one of {', '.join(choices)}, not {quoted(value)}{near}")
        return str(value)

    return parse


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {quoted(value)}")
    return value


def _model(value: Any) -> str:
    networks.parse(str(value))
    return str(value)


def _optimizer(value: Any) -> str:
    if str(value).startswith(TORCH):
        return str(value)
    try:
        return str(_one_of(OPTIMIZERS)(value))
    except ValueError as error:
        raise ValueError(f"{error} (or {TORCH}NAME)") from None


TORCH = "torch.optim."
"""What the names of torch's own optimizers begin with."""


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes; where it runs and writes is said elsewhere.

    Every field is a number, a string or a truth value, checked when it is made; `help` in a field's
    metadata says what it is. Equal configurations give equal runs on one machine.

    Raises:
        ValueError: a value is out of its range; the message begins with the field's name.
    """

    dataset: str = _option("digits", _one_of(DATASETS), f"one of {', '.join(DATASETS)}")
    samples: int = _option(0, _whole(0), "training images, the first of the set; 0: all")
    batch_size: int = _option(128, _whole(0), "images a step; 0: all of them")
    crop: int = _option(0, _whole(0), "random crops, after padding by so many pixels")
    flip: bool = _option(False, _truth, "random reflections, left to right")
    cutout: int = _option(0, _whole(0), "side of a square that is blanked in every image")

    model: str = _option("mlp", _model, networks.HELP)
    activation: str = _option("relu", _one_of(tuple(networks.ACTIVATIONS)), "of mlp, cnn and vit")
    dropout: float = _option(0.0, _number(0, 1, below=True), "of mlp, cnn, wrn and vit")
    loss: str = _option("cross_entropy", _one_of(LOSSES), f"one of {', '.join(LOSSES)}")
    label_smoothing: float = _option(0.0, _number(0, 1, below=True), "of cross_entropy")

    optimizer: str = _option(
        "usam", _optimizer, f"one of {', '.join(OPTIMIZERS)}, or {TORCH}NAME of torch"
    )
    method: str = _option("none", _one_of(METHODS), "ascent of adamw and of torch's optimizers")
    lr: float = _option(0.1, _number(0), "learning rate, before its schedule")
    momentum: float = _option(0.9, _number(0, 1, below=True), "of SGD's update")
    nesterov: bool = _option(False, _truth, "in place of heavy ball")
    weight_decay: float = _option(0.0, _number(0), "of all parameters")
    rho: float = _option(0.05, _number(0), "radius of the ascents, before its schedule")
    beta1: float = _option(0.9, _number(0, 1, below=True), "of adamw")
    beta2: float = _option(0.999, _number(0, 1, below=True), "of adamw")
    ascent: str = _option("sequential", _one_of(("sequential", "anchored")), "of two_step_usam")
    hvp: str = _option(
        "finite_difference", _one_of(("finite_difference", "autograd")), "of hessian_usam"
    )
    fd_step: float = _option(
        0.0, _number(0), "relative step of hessian_usam's difference; 0: by the precision"
    )
    ascent_part: float = _option(
        1.0, _number(0, 1, above=True), "part of the batch whose gradients the ascents take"
    )
    clip: float = _option(0.0, _number(0), "largest norm of the descent's gradient; 0: any")

    lr_schedule: str = _option("cosine", _one_of(LR_SCHEDULES), f"one of {', '.join(LR_SCHEDULES)}")
    warmup: float = _option(0.0, _number(0), "epochs over which lr rises from 0 at first")
    lr_end: float = _option(0.0, _number(0), "last factor of linear and cosine")
    lr_every: int = _option(30, _whole(1), "epochs from one step of the schedule to the next")
    lr_gamma: float = _option(0.1, _number(0), "factor of each step of the schedule")
    rho_schedule: str = _option(
        "constant", _one_of(RHO_SCHEDULES), f"one of {', '.join(RHO_SCHEDULES)}"
    )
    rho_end: float = _option(0.0, _number(0), "last factor of linear and cosine")
    rho_every: int = _option(1, _whole(1), "training steps, for step and every")
    rho_gamma: float = _option(0.1, _number(0), "factor of each step of the schedule")
    rho_start: float = _option(0.5, _number(0, 1), "part of the training before late begins")

    epochs: int = _option(10, _whole(1), "passes over the training images")
    precision: str = _option("float32", _one_of(PRECISIONS), "bfloat16: float32 under autocast")
    channels_last: bool = _option(False, _truth, "memory layout of images and convolutions")
    deterministic: bool = _option(True, _truth, "the same bits again, at some cost on a GPU")
    threads: int = _option(
        0, _whole(0, 1024), "of the CPU; 0: torch's choice. Small networks want 1"
    )
    seed: int = _option(0, _whole(0), "of weights, order, augmentation and dropout")

    log_every: int = _option(50, _whole(1), "steps from one line of the log to the next")
    evaluate_every: int = _option(1, _whole(1), "epochs from one test to the next")
    checkpoint_every: int = _option(
        0, _whole(0), "steps from one checkpoint to the next; 0: epochs"
    )
    sharpness_every: int = _option(0, _whole(0), "steps from one sharpness to the next; 0: none")
    sharpness_samples: int = _option(512, _whole(1), "training images the sharpness is that of")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = field.metadata["parse"](getattr(self, field.name))
            except ValueError as error:
                raise ValueError(f"{field.name} {error}") from None
            object.__setattr__(self, field.name, value)
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError("label_smoothing goes with loss cross_entropy only")
        if self.method != "none" and self.optimizer in OPTIMIZERS and self.optimizer != "adamw":
            raise ValueError(f"method is for adamw and torch's optimizers: {self.optimizer} is one")
        if self.ascent_part != 1 and not self.ascends:
            raise ValueError(f"ascent_part is of the ascents, and {self.optimizer} takes none")

    @classmethod
    def of(cls, values: Mapping[Any, Any]) -> Config:
        """Make one from names and values.

        Raises:
            ValueError: a name is unknown (the message has the nearest one), or a value is bad.
        """
        for name in values:
            if name not in NAMES:
                raise ValueError(f"unknown option {quoted(name)}{nearest(name, NAMES)}")
        return cls(**values)

    @property
    def ascends(self) -> bool:
        """Whether a step may have an ascent, and rho a meaning."""
        plain = self.optimizer in ("sgd", "adamw") or self.optimizer.startswith(TORCH)
        return self.method != "none" or not plain

    def as_dict(self) -> dict[str, Any]:
        """All names and values."""
        return dataclasses.asdict(self)


NAMES = tuple(field.name for field in dataclasses.fields(Config))


_NOT_YAML = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What yaml itself raises besides, as for `!!int ""` and a thousand brackets."""


def check_plain(values: Mapping[Any, Any]) -> None:
    """Check that names are text, and values text, numbers or truth values.

    Raises:
        ValueError: one is something else.
    """
    for name, value in values.items():
        if type(name) is not str or type(value) not in (str, int, float, bool):
            raise ValueError(f"its option {quoted(name)} is a {type(value).__name__}")


def read(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file.

    Raises:
        ValueError: it cannot be read, or is no mapping from names to values.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text("utf-8"))
        node = loader.get_single_node()  # in which what is referred to stands once
        # Merge keys are written out as mappings are made: before that, see how much it would be.
        fits = node is None or _written_out(node, {}) <= _MOST_VALUES
        found = loader.construct_document(node) if node is not None and fits else None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, *_NOT_YAML) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split()):.300}") from error
    if not fits:
        raise ValueError(f"{path} refers to itself, or to the same over and over: write it out")
    if found is None:
        return {}
    try:
        _check_types(found, set())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold lines such as 'lr: 0.1', not a {type(found).__name__}")
    return found


_MOST_VALUES = 1_000_000


def _written_out(node: Any, known: dict[int, int]) -> int:
    """How many values there are once all aliases and merge keys (<<) are written out: a few lines
    may make any number.

    known: by the identity of a node of yaml; one that holds itself has too many.
    """
    if isinstance(node.value, str):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1
        inside = [part for one in node.value for part in (one if isinstance(one, tuple) else [one])]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in inside)
    return known[id(node)]


def _check_types(found: Any, seen: set[int]) -> None:
    """Raise ValueError for a value of another type, such as the tuples of !!pairs, or a date."""
    if type(found) not in (dict, list):
        if found is not None and type(found) not in (str, int, float, bool):
            raise ValueError(f"has {quoted(found)}, and options are text, numbers or truth values")
    elif id(found) not in seen:
        seen.add(id(found))
        for value in [*found, *found.values()] if isinstance(found, dict) else found:
            _check_types(value, seen)


def write(config: Config, path: Path) -> None:
    """Write a YAML file that `read` takes.

    Raises:
        UserError: it cannot be written.
    """
    import yaml

    replace_text(path, yaml.safe_dump(config.as_dict(), sort_keys=False))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option; what is not given is not in the namespace."""
    group = parser.add_argument_group("what is trained", "each also a line of CONFIG.yaml")
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        words = f"{field.metadata['help']} (default: {field.default})"
        if isinstance(field.default, bool):
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=words,
            )
        else:
            group.add_argument(
                flag,
                type=_argument(field.metadata["parse"]),
                default=argparse.SUPPRESS,
                metavar="N" if isinstance(field.default, int) else "X",
                help=words,
            )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given as flags."""
    return {name: value for name, value in vars(args).items() if name in NAMES}


def _argument(parse: Parse) -> Parse:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def nearest(name: Any, names: tuple[str, ...]) -> str:
    """The end of a message on an unknown name: which one was meant, if one is near."""
    found = difflib.get_close_matches(name[:80], names, n=1) if isinstance(name, str) else []
    return f": did you mean {found[0]}?" if found else ""
