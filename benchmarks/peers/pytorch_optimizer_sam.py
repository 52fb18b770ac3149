"""SAM and ASAM of the package pytorch-optimizer, with their defaults, around a base optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

NAME = "pytorch_optimizer"
MISSING = f"{NAME} is not installed: pip install --group bench"
METHODS = ("sam", "asam")


def is_installed() -> bool:
    """Whether the package is there; it is optional."""
    return importlib.util.find_spec(NAME) is not None


class PytorchOptimizerSAM:
    """The two steps of the package's SAM under the names that the other peers use.

    Args:
        params: the parameters.
        method: "sam" or "asam".
        rho: the method's rho, as for the library's optimizers.
        base: class of the base optimizer.
        settings: options of the base optimizer.
    """

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
        """Perturb the parameters and clear the gradients."""
        self._sam.first_step(zero_grad=True)

    def restore_and_step(self) -> None:
        """Restore the parameters and step the base optimizer."""
        self._sam.second_step()
