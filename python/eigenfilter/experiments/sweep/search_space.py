"""What a sweep runs: the configurations of a YAML file, each once, under names that stay."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from eigenfilter.experiments import config as configs
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.errors import UserError, quoted
from eigenfilter.experiments.sweep.folders import RUNS, stored_options

KEYS = ("base", "grid", "random", "samples", "random_seed", "seeds")
LONGEST = 120  # letters of a name
DIGITS = 4  # that are kept of a number drawn at random

Values = dict[str, Any]


def read(path: Path, flags: Mapping[str, Any]) -> dict[Config, str]:
    """The configurations of a sweep, in its order, and a name that says what is swept over.

    Every point of the grid meets every random sample and every seed. A sample depends on
    `random_seed`, its number and the option's name alone, so that more samples or options leave
    those that were drawn as they are. Runs take one thread unless `threads` is given.

    Args:
        path: of YAML: `base`, options of all; `grid`, a mapping from options to values, or a list
            of such; `random`, from options to a distribution ({uniform: [a, b]}, {log_uniform:
            [a, b]}, {integers: [a, b]}, {choice: [...]}), with `samples` and `random_seed`;
            `seeds`, a list, or how many.
        flags: options that take the place of those of `base`.

    Raises:
        UserError: it cannot be read, or says something that cannot be run: the message has where.
    """
    try:
        found = configs.read(path)
        for key in found:
            if key not in KEYS:
                raise ValueError(f"unknown key {quoted(key)}{configs.suggestion(key, KEYS)}")
        base = {"threads": 1} | _mapping(found.get("base"), "base") | dict(flags)
        seeds = _seeds(found, base)
        grid, samples = list(_grid(found.get("grid"))), _samples(found)
        _check_swept(grid, samples, flags)
        points = [point | each for point in grid for each in samples]
        chosen: dict[Config, str] = {}
        for point, seed in itertools.product(points, seeds):
            config = _config(base, point, seed)
            chosen.setdefault(config, _name(config, point))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return chosen


def assign_names(chosen: Mapping[Config, str], out: Path) -> dict[str, Config]:
    """Configurations by the name of their folder.

    One that is in `out` already keeps the folder it has, whatever it would be called now; no
    folder of another is taken.

    Raises:
        UserError: a folder's files are damaged.
    """
    stored = {_key(values): folder.name for folder, values in _stored_runs(out)}
    taken = set(stored.values())
    names: dict[str, Config] = {}
    for config, wanted in chosen.items():
        name = stored.get(_key(config.as_dict()))
        if name is None:
            name = f"{wanted}-{_digest(config)}" if wanted in taken else wanted
            taken.add(name)
        names[name] = config
    return names


def format_value(value: object) -> str:
    """A value of an option in few letters."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(config: Config, options: Iterable[str]) -> str:
    """The values of options and the seed, or their beginning."""
    parts = [name for name in configs.NAMES if name in options or name == "seed"]
    name = ",".join(f"{part}={format_value(getattr(config, part))}" for part in parts)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{_digest(config)}"


def _config(base: Values, point: Values, seed: int) -> Config:
    try:
        return Config.of(base | point | {"seed": seed})
    except ValueError as error:
        where = ", ".join(f"{name} {value}" for name, value in point.items())
        raise ValueError(f"{error} (at {where})" if where else str(error)) from None


def _mapping(value: Any, key: str) -> Values:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must contain lines such as 'lr: 0.1', not {quoted(value)}")
    return value


def _seeds(found: Values, base: Values) -> list[int]:
    seeds = found.get("seeds")
    if "seed" in base and seeds is not None:
        raise ValueError("the seed is given twice, as an option and by seeds")
    if seeds is None:
        return [base.get("seed", 0)]
    if _is_count(seeds):
        return list(range(seeds))
    if isinstance(seeds, list) and seeds:
        return seeds
    raise ValueError(f"seeds must be a list, or how many there are, not {quoted(seeds)}")


def _grid(found: Any) -> Iterator[Values]:
    """Every point, of one grid or of several one after another."""
    for grid in found if isinstance(found, list) else [found]:
        options = _mapping(grid, "grid")
        lists = [v if isinstance(v, list) else [v] for v in options.values()]
        for name, values in zip(options, lists, strict=True):
            if not values:
                raise ValueError(f"grid has no value of {name}")
        for point in itertools.product(*lists):
            yield dict(zip(options, point, strict=True))


def _samples(found: Values) -> list[Values]:
    """Every random sample; one without anything where none is asked for."""
    random = _mapping(found.get("random"), "random")
    if not random:
        if "samples" in found:
            raise ValueError("samples is of random, which is not there")
        return [{}]
    count, seed = found.get("samples"), found.get("random_seed", 0)
    if not _is_count(count):
        raise ValueError(f"samples must be how many are drawn by random, not {quoted(count)}")
    if not (_is_count(seed) or seed == 0):
        raise ValueError(f"random_seed must be a whole number of at least 0, not {quoted(seed)}")
    draws = {name: _distribution(name, value) for name, value in random.items()}

    def draw(i: int, name: str) -> Any:
        return draws[name](np.random.default_rng([seed, i, zlib.crc32(str(name).encode())]))

    return [{name: draw(i, name) for name in draws} for i in range(count)]


def _distribution(name: str, value: Any) -> Callable[[np.random.Generator], Any]:
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(f"{name} of random must be as {{uniform: [0, 1]}}, not {quoted(value)}")
    [(kind, bounds)] = value.items()
    if kind == "choice" and isinstance(bounds, list) and bounds:
        return lambda generator: bounds[int(generator.integers(len(bounds)))]
    try:
        low, high = (float(bound) for bound in bounds)
        if not math.isfinite(high - low):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        low, high = 1.0, 0.0

    def rounded(value: float) -> float:  # not out of the range
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)

    if kind == "uniform" and low <= high:
        return lambda generator: rounded(generator.uniform(low, high))
    if kind == "log_uniform" and 0 < low <= high:
        return lambda generator: rounded(np.exp(generator.uniform(np.log(low), np.log(high))))
    if kind == "integers" and low <= high and low.is_integer() and high.is_integer():
        return lambda generator: int(generator.integers(int(low), int(high), endpoint=True))
    raise ValueError(
        f"{name} of random must be {{uniform: [low, high]}}, {{log_uniform: [low, high]}} above 0, "
        f"{{integers: [low, high]}} or {{choice: [...]}}, all finite, not {quoted(value)}"
    )


def _check_swept(
    grid: Sequence[Values], samples: Sequence[Values], flags: Mapping[str, Any]
) -> None:
    swept = {name for point in grid for name in point}
    for name in samples[0]:
        if name in swept:
            raise ValueError(f"{name} is in grid and in random")
    swept |= samples[0].keys()
    if "seed" in swept:
        raise ValueError("the seeds are not in grid or random: give them by seeds")
    for name in flags:
        if name in swept:
            raise ValueError(f"{name} is swept over, and cannot be given as a flag too")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _stored_runs(out: Path) -> Iterator[tuple[Path, Values]]:
    """The folders of runs and the options of what they hold."""
    for folder in (out / RUNS).glob("*"):
        values = stored_options(folder)
        if values is not None:
            yield folder, values


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True)


def _digest(config: Config) -> str:
    return hashlib.sha256(_key(config.as_dict()).encode()).hexdigest()[:8]
