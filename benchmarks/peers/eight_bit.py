"""AdamW with states of 8 bits, of the packages bitsandbytes and torchao, for `bench memory`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch.nn import Parameter


def _bitsandbytes(params: list[Parameter]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params)


def _torchao(params: list[Parameter]) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params)


OPTIMIZERS: dict[str, Callable[[list[Parameter]], Any]] = {
    f"{package} AdamW8bit, bfloat16": make
    for package, make in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao))
    if find_spec(package) is not None
}
"""Those that are installed. Neither keeps master weights: the weights are bfloat16's alone."""
