"""SAM and ASAM of the package pytorch-optimizer, as they are by default: around a base's class."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

NAME = "pytorch_optimizer"
MISSING = f"{NAME} is not installed: pip install --group bench"
METHODS = ("sam", "asam")


def installed() -> bool:
    """Whether the package, which is optional, is there."""
    return importlib.util.find_spec(NAME) is not None


class PytorchOptimizerSAM:
    """Its two steps under the names of the other peers; see `CommonSAM` for the arguments."""

    def __init__(
        self,
        params: Iterable[Parameter],
        method: str,
        rho: float,
        base: type[torch.optim.Optimizer],
        **settings: Any,
    ) -> None:
        from pytorch_optimizer import SAM

        self._sam = SAM(params, base, rho=rho, adaptive=method == "asam", **settings)
        self.base_optimizer: torch.optim.Optimizer = self._sam.base_optimizer

    def ascend(self) -> None:
        """Move the parameters, clear the gradients."""
        self._sam.first_step(zero_grad=True)

    def descend(self) -> None:
        """Put the parameters back and step."""
        self._sam.second_step()
