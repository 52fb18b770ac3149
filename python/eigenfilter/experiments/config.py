"""The configuration of a training run, from a YAML file and from flags that override it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenfilter import filters
from eigenfilter.experiments import networks
from eigenfilter.experiments.errors import quoted
from eigenfilter.experiments.files import replace_text
from eigenfilter.optimizers import registry
from eigenfilter.schedulers import KINDS as RHO_SCHEDULES

DATASETS = ("digits", "mnist", "fashion", "cifar10", "cifar100")
_PLAIN = tuple(name for name in filters.METHODS if name not in registry.PERTURBATIONS)
OPTIMIZERS = (*_PLAIN, *registry.names(), *registry.updates())
_EXTRAPOLATED = tuple(name for name in OPTIMIZERS if name in registry.extrapolated())
_UPDATES = ", ".join(registry.updates())
METHODS = ("none", *registry.names())
LR_SCHEDULES = ("constant", "linear", "cosine", "step")
PRECISIONS = ("float32", "bfloat16", "float64")
LOSSES = ("cross_entropy", "square")
CONTROL_EVERY = 100  # steps between checks of a controlled run, if none are given

Parse = Callable[[Any], Any]


def _option(default: Any, parse: Parse, description: str) -> Any:
    """Return a dataclass field with the parser of its values and its `--help` text."""
    return dataclasses.field(default=default, metadata={"parse": parse, "help": description})


def _number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Any:
    """Return a parser of finite numbers from low to high.

    Args:
        low: lower bound, or -inf for none, with `above`.
        high: upper bound.
        above: whether the lower bound itself is excluded.
        below: whether the upper bound itself is excluded.
    """
    start = f"above {low:g}" if above else f"of at least {low:g}"
    end = "" if math.isinf(high) else f" and {'below' if below else 'at most'} {high:g}"
    kind = "finite number" if math.isinf(low) else f"number {start}{end}"

    def parse(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        fits = (low < number if above else low <= number) and (
            number < high if below or math.isinf(high) else number <= high
        )
        if not fits:
            raise ValueError(f"must be a {kind}, not {quoted(value)}")
        return number

    return parse


def _integer(low: int, high: int = 2**62) -> Parse:
    """Return a parser of integers from low to high."""

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
            near = suggestion(value, choices)
            raise ValueError(f"must be one of {', '.join(choices)}, not {quoted(value)}{near}")
        return str(value)

    return parse


def _bits(value: Any) -> int:
    return int(_one_of(("0", "8", "16"))(str(value)))


def _boolean(value: Any) -> bool:
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
"""Prefix of the names of torch's own optimizers."""


@dataclass(frozen=True)
class Config:
    """All options that determine the result of a run; paths and the device are not among them.

    Every field is a number, a string or a boolean, and is checked by the constructor. The `help`
    entry of a field's metadata describes it. Equal configurations give equal runs on one machine.

    Raises:
        ValueError: a value is out of range; the message begins with the field's name.
    """

    dataset: str = _option("digits", _one_of(DATASETS), f"one of {', '.join(DATASETS)}")
    samples: int = _option(0, _integer(0), "train on the first N images only; 0 takes all")
    batch_size: int = _option(128, _integer(0), "images per step; 0 takes all (full batch)")
    crop: int = _option(0, _integer(0), "padding in pixels before a random crop; 0 disables it")
    flip: bool = _option(False, _boolean, "random horizontal flips")
    cutout: int = _option(0, _integer(0), "side of the square that cutout blanks; 0 disables it")

    model: str = _option("mlp", _model, networks.HELP)
    activation: str = _option(
        "relu",
        _one_of(tuple(networks.ACTIVATIONS)),
        f"one of {', '.join(networks.ACTIVATIONS)}; applies to mlp, cnn and vit",
    )
    dropout: float = _option(
        0.0, _number(0, 1, below=True), "dropout probability in mlp, cnn, wrn and vit"
    )
    loss: str = _option("cross_entropy", _one_of(LOSSES), f"one of {', '.join(LOSSES)}")
    label_smoothing: float = _option(
        0.0, _number(0, 1, below=True), "label smoothing of cross_entropy"
    )

    optimizer: str = _option("usam", _optimizer, f"one of {', '.join(OPTIMIZERS)}, or {TORCH}NAME")
    method: str = _option(
        "none",
        _one_of(METHODS),
        f"ascent of {_UPDATES} and {TORCH}NAME: {', '.join(METHODS)}",
    )
    lr: float = _option(0.1, _number(0), "learning rate that lr_schedule multiplies")
    momentum: float = _option(0.9, _number(0, 1, below=True), "momentum of the SGD update")
    nesterov: bool = _option(False, _boolean, "use Nesterov momentum instead of heavy ball")
    extrapolation: float = _option(
        0.0,
        _number(-math.inf, above=True),
        f"{' and '.join(_EXTRAPOLATED)}: distance along the update, without lr, at which the "
        "gradient is taken; a negative one looks back",
    )
    state_bits: int = _option(
        0,
        _bits,
        "8 or 16 bits for each number of the optimizer's state, of eigenfilter's optimizers; 0 "
        "keeps the precision of the weights",
    )
    weight_decay: float = _option(0.0, _number(0), "weight decay of all parameters")
    rho: float = _option(
        0.05, _number(0), "radius of the ascents, and of msam, which rho_schedule multiplies"
    )
    beta1: float = _option(0.9, _number(0, 1, below=True), "adamw: decay rate of the first moment")
    beta2: float = _option(
        0.999, _number(0, 1, below=True), "adamw: decay rate of the second moment"
    )
    ascent: str = _option(
        "sequential",
        _one_of(filters.TwoStepUSAM.forms),
        "sequential or anchored second ascent of two_step_usam",
    )
    hvp: str = _option(
        "finite_difference",
        _one_of(("finite_difference", "autograd")),
        "Hessian-vector product of hessian_usam: finite_difference or autograd",
    )
    fd_step: float = _option(
        0.0,
        _number(0),
        "relative step of the finite difference in hessian_usam; 0 depends on the precision",
    )
    ascent_part: float = _option(
        1.0, _number(0, 1, above=True), "fraction of the batch that the ascents use"
    )
    ascent_sync: bool = _option(
        True,
        _boolean,
        "average the gradients of ascents over processes; false takes each process's own",
    )
    clip: float = _option(
        0.0, _number(0), "clip the gradient of the descent to this norm; 0 disables clipping"
    )

    lr_schedule: str = _option("cosine", _one_of(LR_SCHEDULES), f"one of {', '.join(LR_SCHEDULES)}")
    warmup: float = _option(0.0, _number(0), "epochs of linear learning rate warmup")
    lr_end: float = _option(0.0, _number(0), "final factor of linear and cosine lr_schedule")
    lr_every: int = _option(30, _integer(1), "epochs between decays of the step lr_schedule")
    lr_gamma: float = _option(0.1, _number(0), "factor of each decay of the step lr_schedule")
    rho_schedule: str = _option(
        "constant", _one_of(RHO_SCHEDULES), f"one of {', '.join(RHO_SCHEDULES)}"
    )
    rho_end: float = _option(0.0, _number(0), "final factor of linear and cosine rho_schedule")
    rho_every: int = _option(1, _integer(1), "interval in steps of the step and every rho_schedule")
    rho_gamma: float = _option(0.1, _number(0), "factor of each decay of the step rho_schedule")
    rho_start: float = _option(
        0.5, _number(0, 1), "fraction of training after which the late rho_schedule starts"
    )

    epochs: int = _option(10, _integer(1), "passes over the training images")
    precision: str = _option(
        "float32",
        _one_of(PRECISIONS),
        f"one of {', '.join(PRECISIONS)}; bfloat16 is float32 under autocast",
    )
    channels_last: bool = _option(
        False, _boolean, "store images and convolutions in channels-last layout"
    )
    deterministic: bool = _option(
        True, _boolean, "use deterministic algorithms; slower on a GPU, but bit-reproducible"
    )
    threads: int = _option(
        0, _integer(0, 1024), "CPU threads; 0 keeps torch's default, 1 is best for small networks"
    )
    seed: int = _option(0, _integer(0), "seed of weights, order, augmentation and dropout")

    log_every: int = _option(50, _integer(1), "steps between lines of the log")
    evaluate_every: int = _option(1, _integer(1), "epochs between evaluations on the test set")
    checkpoint_every: int = _option(
        0, _integer(0), "steps between checkpoints; 0 saves at ends of epochs"
    )
    sharpness_every: int = _option(
        0,
        _integer(0),
        "steps between measurements of the sharpness; 0 disables them, and stands for "
        f"{CONTROL_EVERY} with sharpness_target",
    )
    sharpness_samples: int = _option(
        512, _integer(1), "training images on which the sharpness is measured"
    )
    sharpness_target: float = _option(
        0.0,
        _number(0),
        "sharpness that is kept while lr follows its schedule, by the extrapolation of "
        f"{' and '.join(_EXTRAPOLATED)} or by rho; 0 disables this",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            try:
                value = field.metadata["parse"](getattr(self, field.name))
            except ValueError as error:
                raise ValueError(f"{field.name} {error}") from None
            object.__setattr__(self, field.name, value)
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError("label_smoothing applies only to loss cross_entropy")
        if self.method != "none" and self.optimizer in (*_PLAIN, *registry.names()):
            raise ValueError(
                f"method applies only to {_UPDATES} and torch's optimizers; {self.optimizer} is "
                "itself a method, leave it out"
            )
        if self.extrapolation and self.optimizer not in _EXTRAPOLATED:
            raise ValueError(
                f"extrapolation applies only to {' and '.join(_EXTRAPOLATED)}, and the optimizer "
                f"is {self.optimizer}; leave it out, or choose one of them"
            )
        if self.state_bits and (self.optimizer.startswith(TORCH) or self.precision == "float64"):
            raise ValueError(
                f"state_bits compresses eigenfilter's optimizers in float32, and this is "
                f"{self.optimizer} in {self.precision}: leave it out"
            )
        if self.sharpness_target and self.rho_schedule != "constant":
            raise ValueError(
                f"rho_schedule {self.rho_schedule} sets rho, and so would sharpness_target: leave "
                "one of them out"
            )
        if self.sharpness_target and self.optimizer.startswith(TORCH) and not self.ascends:
            raise ValueError(
                f"sharpness_target has nothing to set with {self.optimizer}, which takes no "
                "ascent: choose a method such as usam, or an optimizer of eigenfilter"
            )
        for name in ("ascent_part", "ascent_sync"):
            is_given = getattr(self, name) != getattr(Config, name)  # the class has the defaults
            if is_given and not self.ascends:
                raise ValueError(
                    f"{name} applies only to ascents, and {self.optimizer} takes none; leave it "
                    "out, or choose another optimizer or method"
                )

    @classmethod
    def of(cls, values: Mapping[Any, Any]) -> Config:
        """Make a configuration from names and values.

        Raises:
            ValueError: a name is unknown (the message suggests the nearest), or a value is invalid.
        """
        for name in values:
            if name not in NAMES:
                raise ValueError(f"unknown option {quoted(name)}{suggestion(name, NAMES)}")
        return cls(**values)

    @property
    def ascends(self) -> bool:
        """Whether the optimizer takes ascents."""
        return self.method != "none" or self.optimizer in registry.names()

    @property
    def checks_every(self) -> int:
        """Steps between measurements of the sharpness, at least; 0 without any."""
        return self.sharpness_every or (CONTROL_EVERY if self.sharpness_target else 0)

    @property
    def has_rho(self) -> bool:
        """Whether rho has a meaning."""
        theory = filters.METHODS.get(self.optimizer)
        return self.ascends or (theory is not None and theory.takes("rho"))

    def as_dict(self) -> dict[str, Any]:
        """Return all names and values."""
        return dataclasses.asdict(self)


NAMES = tuple(field.name for field in dataclasses.fields(Config))


_NOT_YAML = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions of yaml other than YAMLError, for `!!int ""` or a thousand brackets."""


def check_plain(values: Mapping[Any, Any]) -> None:
    """Check that all names are strings and all values are strings, numbers or booleans.

    Raises:
        ValueError: a name or a value has another type.
    """
    for name, value in values.items():
        if type(name) is not str or type(value) not in (str, int, float, bool):
            raise ValueError(f"its option {quoted(name)} is a {type(value).__name__}")


def read(path: Path) -> dict[str, Any]:
    """Read names and values from a YAML file.

    Raises:
        ValueError: the file cannot be read, or is not a mapping from names to values.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text("utf-8"))
        root = loader.get_single_node()  # each node that an alias refers to stands there once
        # Merge keys are expanded as mappings are made, so the values are counted before that.
        is_small = root is None or _count_values(root, {}) <= _MAX_VALUES
        content = loader.construct_document(root) if root is not None and is_small else None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, *_NOT_YAML) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split()):.300}") from error
    if not is_small:
        raise ValueError(
            f"{path} has aliases that refer to themselves, or that expand to more than "
            f"{_MAX_VALUES:,} values; write the values out"
        )
    if content is None:
        return {}
    try:
        _check_types(content, set())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} must contain lines such as 'lr: 0.1', not a {type(content).__name__}"
        )
    return content


_MAX_VALUES = 1_000_000


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Count the values of a YAML document with all aliases and merge keys (<<) expanded.

    A few lines of nested aliases can stand for any number of values. The count is memoized, so it
    takes time in proportion to the file. A node that contains itself counts as too many.

    Args:
        node: a node of yaml's graph of the document.
        counts: the count of each list or mapping by its identity; it is filled here.
    """
    if isinstance(node.value, str):
        return 1
    if id(node) not in counts:
        counts[id(node)] = _MAX_VALUES + 1  # seen again below only if the node contains itself
        parts = [part for one in node.value for part in (one if isinstance(one, tuple) else [one])]
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[id(node)]


def _check_types(value: Any, checked: set[int]) -> None:
    """Raise ValueError for a value of another type, such as the tuples of !!pairs, or a date."""
    if type(value) not in (dict, list):
        if value is not None and type(value) not in (str, int, float, bool):
            raise ValueError(f"contains {quoted(value)}; options are text, numbers or booleans")
    elif id(value) not in checked:
        checked.add(id(value))
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_types(part, checked)


def write(config: Config, path: Path) -> None:
    """Write a YAML file that `read` accepts.

    Raises:
        UserError: the file cannot be written.
    """
    import yaml

    replace_text(path, yaml.safe_dump(config.as_dict(), sort_keys=False))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option. Flags that are not given are absent from the namespace."""
    group = parser.add_argument_group(
        "training options", "Each option can also be a line of the YAML file."
    )
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        description = f"{field.metadata['help']} (default: {field.default})"
        if isinstance(field.default, bool):
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=description,
            )
        else:
            group.add_argument(
                flag,
                type=_argument(field.metadata["parse"]),
                default=argparse.SUPPRESS,
                metavar="N" if isinstance(field.default, int) else "X",
                help=description,
            )


def from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given as flags."""
    return {name: value for name, value in vars(args).items() if name in NAMES}


def _argument(parse: Parse) -> Parse:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def suggestion(name: Any, names: tuple[str, ...]) -> str:
    """Return the end of a message about an unknown name: a similar name, if there is one."""
    matches = difflib.get_close_matches(name[:80], names, n=1) if isinstance(name, str) else []
    return f": did you mean {matches[0]}?" if matches else ""
