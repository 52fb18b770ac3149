"""The configurations of a sweep: they are read from a YAML file and get permanent names."""

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
LONGEST = 120  # characters of a name
DIGITS = 4  # significant digits of random numbers

Values = dict[str, Any]


def read(path: Path, flags: Mapping[str, Any]) -> dict[Config, str]:
    """Read the configurations of a sweep, in order, each with a name made of its swept options.

    Every point of the grid is combined with every random sample and every seed. A random number
    depends only on `random_seed`, the number of the sample and the name of the option, so that
    adding samples or options does not change existing ones. Runs use one thread unless `threads`
    is given.

    Args:
        path: YAML file with these keys: `base`, options of all runs; `grid`, a mapping from options
            to values, or a list of such mappings; `random`, a mapping from options to distributions
            ({uniform: [a, b]}, {log_uniform: [a, b]}, {integers: [a, b]} or {choice: [...]}), with
            `samples` and `random_seed`; `seeds`, a list or a number.
        flags: options that override those of `base`.

    Raises:
        UserError: the file cannot be read or is invalid; the message says where.
    """
    try:
        sweep = configs.read(path)
        for key in sweep:
            if key not in KEYS:
                raise ValueError(f"unknown key {quoted(key)}{configs.suggestion(key, KEYS)}")
        base = {"threads": 1} | _mapping(sweep.get("base"), "base") | dict(flags)
        seeds = _seeds(sweep, base)
        grid, samples = list(_grid(sweep.get("grid"))), _samples(sweep)
        _check_swept(grid, samples, flags)
        points = [point | each for point in grid for each in samples]
        names: dict[Config, str] = {}
        for point, seed in itertools.product(points, seeds):
            config = _config(base, point, seed)
            names.setdefault(config, _name(config, point))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return names


def assign_names(preferred: Mapping[Config, str], out: Path) -> dict[str, Config]:
    """Return configurations by the names of their folders.

    A configuration that is already stored in `out` keeps its folder, even if its preferred name has
    changed. A configuration whose preferred name is taken gets a name with a hash.

    Args:
        preferred: preferred names of the configurations.
        out: folder of the sweep.

    Raises:
        UserError: a file in a folder is damaged.
    """
    stored = {_key(values): folder.name for folder, values in _stored_runs(out)}
    taken = set(stored.values())
    names: dict[str, Config] = {}
    for config, preferred_name in preferred.items():
        name = stored.get(_key(config.as_dict()))
        if name is None:
            name = preferred_name
            if name in taken:
                name = f"{name}-{_digest(config)}"
            taken.add(name)
        names[name] = config
    return names


def format_value(value: object) -> str:
    """Return a short text for the value of an option."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(config: Config, options: Iterable[str]) -> str:
    """Return a name of swept options and the seed, which ends in a hash if it is too long."""
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


def _seeds(sweep: Values, base: Values) -> list[int]:
    seeds = sweep.get("seeds")
    if "seed" in base and seeds is not None:
        raise ValueError("the seed is given twice, as an option and by seeds; remove one")
    if seeds is None:
        return [base.get("seed", 0)]
    if _is_count(seeds):
        return list(range(seeds))
    if isinstance(seeds, list) and seeds:
        return seeds
    raise ValueError(f"seeds must be a list or a number of seeds, not {quoted(seeds)}")


def _grid(value: Any) -> Iterator[Values]:
    """Yield every point of a grid, or of a list of grids."""
    for grid in value if isinstance(value, list) else [value]:
        options = _mapping(grid, "grid")
        lists = [v if isinstance(v, list) else [v] for v in options.values()]
        for name, values in zip(options, lists, strict=True):
            if not values:
                raise ValueError(f"grid has no value of {name}")
        for point in itertools.product(*lists):
            yield dict(zip(options, point, strict=True))


def _samples(sweep: Values) -> list[Values]:
    """Return all random samples, or a single empty one without `random`."""
    random = _mapping(sweep.get("random"), "random")
    if not random:
        if "samples" in sweep:
            raise ValueError("samples needs random, which is missing")
        return [{}]
    count, seed = sweep.get("samples"), sweep.get("random_seed", 0)
    if not _is_count(count):
        raise ValueError(f"samples must be the number of random samples, not {quoted(count)}")
    if not (_is_count(seed) or seed == 0):
        raise ValueError(f"random_seed must be a whole number of at least 0, not {quoted(seed)}")
    draws = {name: _distribution(name, value) for name, value in random.items()}

    def draw(i: int, name: str) -> Any:
        return draws[name](np.random.default_rng([seed, i, zlib.crc32(str(name).encode())]))

    return [{name: draw(i, name) for name in draws} for i in range(count)]


def _distribution(name: str, value: Any) -> Callable[[np.random.Generator], Any]:
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(f"{name} of random must be like {{uniform: [0, 1]}}, not {quoted(value)}")
    [(kind, bounds)] = value.items()
    if kind == "choice" and isinstance(bounds, list) and bounds:
        return lambda generator: bounds[int(generator.integers(len(bounds)))]
    try:
        low, high = (float(bound) for bound in bounds)
        if not math.isfinite(high - low):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        low, high = 1.0, 0.0

    def rounded(value: float) -> float:
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)  # rounding may leave the range

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
            raise ValueError(f"{name} is in grid and in random; remove one")
    swept |= samples[0].keys()
    if "seed" in swept:
        raise ValueError("seed cannot be in grid or random; list the seeds under seeds")
    for name in flags:
        if name in swept:
            raise ValueError(f"{name} is swept over; leave its flag out")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _stored_runs(out: Path) -> Iterator[tuple[Path, Values]]:
    """Yield the folders of runs, and the options of the runs in them."""
    for folder in (out / RUNS).glob("*"):
        values = stored_options(folder)
        if values is not None:
            yield folder, values


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True)


def _digest(config: Config) -> str:
    return hashlib.sha256(_key(config.as_dict()).encode()).hexdigest()[:8]
