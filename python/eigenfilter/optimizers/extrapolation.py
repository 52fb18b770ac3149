"""Optimizers whose gradient is taken ahead along their update: the parameters hold y = x - e u."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eigenfilter import _distributed
from eigenfilter.optimizers._step_state import retry_on_layout_change, through_owner
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.updates import EXTRAPOLATED, EXTRAPOLATION, ExtrapolatedUpdate

_MAX_EIGENVALUE = "max_eigenvalue"  # in a group until it is checked
_BOTH = "extrapolation and max_eigenvalue set the same: give one of them"


class ExtrapolatedOptimizer(EigenfilterOptimizer):
    """An optimizer with an `ExtrapolatedUpdate`, between whose steps the parameters hold y."""

    _update: ExtrapolatedUpdate

    @staticmethod
    def _extrapolation_options(
        extrapolation: float | None, max_eigenvalue: float | None
    ) -> dict[str, Any]:
        """The defaults of groups for two arguments of a constructor, of which one is None."""
        if None not in (extrapolation, max_eigenvalue):
            raise ValueError(_BOTH)
        extrapolation = 0.0 if extrapolation is None else extrapolation
        options = {EXTRAPOLATION: extrapolation, EXTRAPOLATED: None}
        return options | {_MAX_EIGENVALUE: max_eigenvalue}

    def _add_group(self, param_group: dict[str, Any]) -> None:
        if (
            EXTRAPOLATION in param_group
            and param_group.setdefault(_MAX_EIGENVALUE, None) is not None
        ):
            raise ValueError(_BOTH)
        super()._add_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        max_eigenvalue = group.pop(_MAX_EIGENVALUE, None)
        if max_eigenvalue is not None:
            super()._check_group(group)
            _check_number(_MAX_EIGENVALUE, max_eigenvalue)
            group[EXTRAPOLATION] = self._extrapolation_for(group, max_eigenvalue)
        super()._check_group(group)
        key = self._update.extrapolated_key
        if group[key] is None:  # before the first update x and y are the same
            group[key] = self._wanted(group)

    def _wanted(self, group: dict[str, Any]) -> float:
        """The extrapolation that the parameters of a group should have in training."""
        extrapolation: float = group[EXTRAPOLATION]
        return extrapolation

    def _extrapolation_for(self, group: dict[str, Any], max_eigenvalue: float) -> float:
        """The extrapolation that puts the edge of a group's filter at an eigenvalue."""
        raise NotImplementedError

    def _check_extrapolation(self, group: dict[str, Any]) -> None:
        _check_number(EXTRAPOLATION, group[EXTRAPOLATION])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's optimizer, whose parameters hold x.

        Raises:
            RuntimeError: the parameters are perturbed.
            ValueError: the groups do not match.
        """
        at_x = {self._update.extrapolated_key: 0.0}
        groups = [at_x | group for group in state_dict.get("param_groups", ())]
        super().load_state_dict(state_dict | {"param_groups": groups})

    @through_owner
    def eval(self) -> None:
        """Put x = y + e u into the parameters, to evaluate or to save them.

        The sum is rounded to the parameters' dtype, and so is y when `train()` goes back to it. A
        step without `train()` takes its gradient at x, and leaves y. Without extrapolation x is
        there already.

        Raises:
            RuntimeError: it is called by the closure that `step` is evaluating, or the parameters
                are perturbed.
        """
        self._extrapolate(False)

    @through_owner
    def train(self) -> None:
        """Put y = x - e u into the parameters, to train on.

        Raises:
            RuntimeError: it is called by the closure that `step` is evaluating, or the parameters
                are perturbed.
        """
        self._extrapolate(True)

    @retry_on_layout_change
    @torch.no_grad()
    def _extrapolate(self, is_training: bool) -> None:
        wanted = [(g, self._wanted(g) if is_training else 0.0) for g in self.current_groups()]
        if all(group[self._update.extrapolated_key] == e for group, e in wanted):
            return
        name = "train()" if is_training else "eval()"
        self._step_state.refuse_within_closure(name)
        self._refuse_perturbed(name)
        self._check_groups()
        self._buckets.refresh(self)
        self._update.extrapolate(self._buckets, wanted)
        self._buckets.store.snapshot_if_changed()


@contextmanager
def at_x(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A context in which the parameters hold x; on exit they are what they were, to the bit.

    It is for measurements in the middle of training. `eval()` and `train()` go to the y that the
    groups want by then, with a rounding each way; here a change of e that is yet to come stays so.
    """
    groups = optimizer.param_groups
    key = optimizer._update.extrapolated_key if isinstance(optimizer, ExtrapolatedOptimizer) else ""
    if not isinstance(optimizer, ExtrapolatedOptimizer) or not any(g[key] for g in groups):
        yield
        return
    optimizer._refuse_perturbed("at_x()")
    params = [_distributed.local(p).detach() for group in groups for p in group["params"]]
    params += optimizer._corrections()
    kept, marks = [p.clone() for p in params], [group[key] for group in groups]
    optimizer.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, kept)
        for group, mark in zip(groups, marks, strict=True):
            group[key] = mark


def _check_number(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless a hyperparameter is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, and is {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, and is {value}")
