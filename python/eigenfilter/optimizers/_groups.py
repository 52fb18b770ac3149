"""Groups and state of an optimizer: checks, saving and loading; refused during a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from eigenfilter import kernels
from eigenfilter.optimizers._buckets import refuse_overlap
from eigenfilter.optimizers._hyperparameters import DTYPES, check_hyperparameters
from eigenfilter.optimizers._options import refuse_modes
from eigenfilter.optimizers._step_state import through_owner


class GroupedOptimizer(torch.optim.Optimizer):
    """torch's optimizer, whose groups and state cannot change while parameters are perturbed."""

    backend: str | None
    _constructed = False

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        refuse_overlap(self.param_groups)
        self._constructed = True

    @property
    def perturbed(self) -> bool:
        """Whether the parameters are perturbed."""
        raise NotImplementedError

    @through_owner
    def state_dict(self) -> dict[str, Any]:
        """State and hyperparameters in the torch optimizer's form, without backups.

        Raises:
            RuntimeError: the parameters are perturbed, as the model's own state_dict would be.
        """
        self._refuse_perturbed("state_dict()")
        return super().state_dict()

    @through_owner
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of the torch optimizer.

        A hyperparameter that its groups lack, such as rho in torch's, keeps its value.

        Raises:
            RuntimeError: the parameters are perturbed.
            ValueError: the groups do not match.
        """
        self._refuse_perturbed("load_state_dict()")
        state_dict = fill_missing_keys(self, state_dict)
        for group in state_dict.get("param_groups", ()):
            refuse_modes(group)
        super().load_state_dict(state_dict)

    @through_owner
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters are checked as the constructor's are.

        Raises:
            TypeError: a parameter is sparse, complex or of an unsupported dtype.
            ValueError: a hyperparameter is out of its range.
            RuntimeError: the parameters are perturbed.
        """
        self._refuse_perturbed("add_param_group()")
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_hyperparameters(group)
        refuse_modes(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_hyperparameters(group)
        for device in {p.device for p in group["params"] if p.device.type != "meta"}:
            kernels.select(device, self.backend)
        for i, p in enumerate(group["params"]):
            if p.layout != torch.strided or p.dtype not in DTYPES:
                raise TypeError(
                    f"parameter {i} of the group is {p.dtype}, {p.layout}: the optimizers take "
                    "dense float32, float64, bfloat16 and float16 parameters; give the others to "
                    "an optimizer of their own"
                )
        if self._constructed:
            refuse_overlap(self.param_groups)

    def _refuse_perturbed(self, what: str) -> None:
        if self.perturbed:
            raise RuntimeError(
                f"{what} while the parameters are perturbed: first end the step with step(), or "
                "go back with restore()"
            )


def fill_missing_keys(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Add to the groups of a state_dict the hyperparameters that only the optimizer's have."""
    groups = state_dict.get("param_groups", ())  # a wrapper may have a form of its own
    if len(groups) != len(optimizer.param_groups):
        return state_dict
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    joined = [present | loaded for present, loaded in zip(own, groups, strict=True)]
    return state_dict | {"param_groups": joined}
