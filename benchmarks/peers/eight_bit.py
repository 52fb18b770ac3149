"""AdamW with states of 8 bits, of the packages bitsandbytes and torchao, for `bench memory`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch.nn import Parameter


def _make(package: str, params: list[Parameter]) -> Any:
    return importlib.import_module(f"{package}.optim").AdamW8bit(params)


OPTIMIZERS: dict[str, Callable[[list[Parameter]], Any]] = {
    f"{package} AdamW8bit, bfloat16": functools.partial(_make, package)
    for package in ("bitsandbytes", "torchao")
    if find_spec(package) is not None
}
"""Those that are installed. Neither keeps master weights: the weights are bfloat16's alone."""
