"""The sharpness of a model while it trains, beside the edge of its optimizer's filter."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from eigenfilter import filters
from eigenfilter.certificate.linearized import (
    Linearized,
    NoFilter,
    NoPreconditioner,
    check_parameters,
    linearized,
)
from eigenfilter.curvature import CurvatureOperator, eigsh
from eigenfilter.filters import AdamW, Filter, PolynomialFilter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN = 1.05  # how far from the sharpness an action puts the edge
ACTIONS = ("warn", "lower_lr", "raise_rho")


@dataclass(frozen=True)
class Check:
    """One look at the sharpness.

    Attributes:
        step: training steps before it.
        sharpness: the largest eigenvalue: of the Hessian, or of what takes its place for AdamW and
            for groups that differ; see `SharpnessMonitor`.
        residual: an eigenvalue lies within it of `sharpness`.
        edge: the largest eigenvalue that the optimizer's filter admits, or None where there is no
            filter: SAM, whose edge moves with the gradient's norm, AdamW before its first step,
            optimizers and groups of which none is known.
        matvecs: products that it took.
        seconds: time that it took.
    """

    step: int
    sharpness: float
    residual: float
    edge: float | None
    matvecs: int
    seconds: float

    @property
    def past_edge(self) -> bool:
        """Whether an eigenvalue lies past the edge, its error counted."""
        return self.edge is not None and self.sharpness - self.residual > self.edge


class Writer(Protocol):
    """What is used of torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class SharpnessMonitor:
    """Watches the sharpness of a model beside the edge that its optimizer's filter gives.

    Every check after the first starts from the eigenvector that the one before found, which on a
    slowly changing model takes two or three products. The data are the operator's: a probe batch
    that stays the same, or all of them.

    For AdamW the sharpness is that of P^-1/2 H P^-1/2, P = sqrt(v / (1 - beta2^t)) + eps, and with
    an ascent of USAM that of P^-1/2 (H + rho H^2) P^-1/2: see `filters.AdamW`. Where groups differ
    it is that of A^1/2 (J + W) A^1/2, with an edge of 2: see docs/theory.md, 14.

    Where several processes share the operator all of them check, act and call back alike, and the
    first one writes.

    Args:
        op: the Hessian of the loss, in the optimizer's parameters: each that requires grad, and no
            others.
        optimizer: whose filter gives the edge.
        every: training steps from one check to the next, >= 1.
        tol: relative tolerance of the sharpness, > 0; what was missed was up to twice as much where
            the gap to the next eigenvalue is small, so that the default is for 1e-3.
        on_edge: what to do when a check finds the sharpness past the edge: "warn"; "lower_lr", to
            where the edge is 5% above the sharpness; "raise_rho", to where the edge is 5% below
            what it was, which drives the sharpness down; a callable, which gets the check; or None.
        log: file to which every check is appended as a line of JSON, or None.
        writer: a TensorBoard SummaryWriter, which gets "sharpness" and "edge", or None.
        callback: gets every check, or None.
        seed: of the first start.

    Attributes:
        history: all checks.

    Raises:
        ValueError: an argument is out of its range; "raise_rho" where no filter has a rho; the
            operator and the optimizer differ in their parameters, which the message names.

    Example:
        >>> monitor = SharpnessMonitor(op, opt, every=100)
        >>> for batch in loader:
        ...     opt.step(closure)
        ...     monitor.step()

    Source: J. Cohen et al., 2021, arXiv 2103.00065, for sharpness in training; the edges are those
    of arXiv 2510.09034.
    """

    def __init__(
        self,
        op: CurvatureOperator,
        optimizer: torch.optim.Optimizer,
        every: int = 1,
        *,
        tol: float = 5e-4,
        on_edge: str | Callable[[Check], object] | None = None,
        log: str | Path | None = None,
        writer: Writer | None = None,
        callback: Callable[[Check], object] | None = None,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        if not tol > 0:
            raise ValueError(f"tol must be positive, not {tol}")
        if isinstance(on_edge, str) and on_edge not in ACTIONS:
            raise ValueError(f"on_edge must be one of {ACTIONS}, a callable or None: {on_edge!r}")
        check_parameters(op, optimizer)
        self.history: list[Check] = []
        self._op, self._optimizer = op, optimizer
        self._every, self._tol, self._seed = every, tol, seed
        self._on_edge, self._callback, self._writer = on_edge, callback, writer
        self._log = None if log is None else Path(log)
        self._steps = 0
        self._vector: Tensor | None = None
        if on_edge == "raise_rho":
            seen = self._linearized()
            _check_rho(None if seen is None else seen.filter)

    def step(self) -> Check | None:
        """Count a training step; check after every `every`-th, and return what was found."""
        self._steps += 1
        return self.check() if self._steps % self._every == 0 else None

    def check(self) -> Check:
        """Measure the sharpness now, log it, and act if it is past the edge.

        Raises:
            RuntimeError: an optimizer holds the parameters away from x; see the operator.
            ValueError: the optimizer has come to move other parameters than the operator's.
        """
        began = time.perf_counter()
        check_parameters(self._op, self._optimizer)  # groups may have been added, or frozen
        seen = self._linearized()
        op = self._op if seen is None else seen.operator
        flt = None if seen is None else seen.filter
        products = 1 if seen is None else seen.products  # of H, in each of op
        found = eigsh(
            op, 1, tol=self._tol, v0=self._vector, check_multiplicity=False, seed=self._seed
        )
        self._vector = found.vectors[:, 0]
        check = Check(
            step=self._steps,
            sharpness=float(found.values[0]),
            residual=float(found.residuals[0]),
            edge=None if flt is None else flt.max_eigenvalue(),
            matvecs=products * found.matvecs,
            seconds=time.perf_counter() - began,
        )
        self.history.append(check)
        self._report(check)
        if flt is not None and check.past_edge:
            self._act(check, flt)
        return check

    def state_dict(self) -> dict[str, Any]:
        """The steps counted and the last eigenvector: with them checks go on bit for bit.

        The history is not among them.
        """
        return {"steps": self._steps, "vector": self._vector}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called.

        Raises:
            ValueError: the eigenvector is that of another model.
        """
        vector = state_dict["vector"]
        slices = self._op.slices
        length = self._op.shape[0] if slices is None else slices.length
        if vector is not None and vector.shape != (length,):
            raise ValueError(f"the state is of {len(vector)} parameters, the operator of {length}")
        self._steps = int(state_dict["steps"])
        self._vector = None if vector is None else vector.to(self._op.device, self._op.dtype)

    def plot(self, ax: Axes | None = None) -> Any:
        """Draw sharpness and edge over the training steps; return the axes. Needs matplotlib."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.gca()
        steps = [c.step for c in self.history]
        [line] = ax.plot(steps, [c.sharpness for c in self.history], label="sharpness")
        edges = [float("nan") if c.edge is None else c.edge for c in self.history]
        ax.plot(steps, edges, linestyle="--", color=line.get_color(), label="edge")
        ax.set_xlabel("training step")
        ax.set_ylabel("largest eigenvalue")
        ax.legend(frameon=False)
        return ax

    def _linearized(self) -> Linearized | None:
        """What the optimizer's filter is of, and the filter; None where there is none."""
        try:
            filters.of(self._optimizer)
        except TypeError:
            return None
        try:
            return linearized(self._op, self._optimizer)
        except (NoFilter, NoPreconditioner):
            return None

    def _report(self, check: Check) -> None:
        if self._log is not None and self._op.leads:
            with self._log.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(check)) + "\n")
        if self._writer is not None and self._op.leads:
            self._writer.add_scalar("sharpness", check.sharpness, check.step)
            if check.edge is not None:
                self._writer.add_scalar("edge", check.edge, check.step)
        if self._callback is not None:
            self._callback(check)

    def _act(self, check: Check, flt: Filter) -> None:
        assert check.edge is not None
        if self._on_edge == "warn":
            warnings.warn(
                f"step {check.step}: the sharpness {check.sharpness:.4g} is past the edge "
                f"{check.edge:.4g} of the optimizer's filter",
                stacklevel=4,
            )
        elif self._on_edge == "lower_lr":
            factor = _lr_factor(flt, _MARGIN * check.sharpness)
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * factor
        elif self._on_edge == "raise_rho":
            _check_rho(flt)  # groups may have come to differ
            rho = _rho_for(flt, check.edge / _MARGIN)
            for group in self._optimizer.param_groups:
                group["rho"] = rho
        elif callable(self._on_edge):
            self._on_edge(check)


def _check_rho(flt: Filter | None) -> None:
    if not hasattr(flt, "rho"):
        raise ValueError(
            "on_edge='raise_rho' needs an optimizer whose filter has a rho, which is not 0: "
            "USAM, TwoStepUSAM or HessianUSAM, with groups that are alike"
        )


def _lr_factor(flt: Filter, edge: float) -> float:
    """What lr has to be multiplied with for the filter to end at `edge`."""
    if isinstance(flt, PolynomialFilter):
        present = float(flt.p(flt.max_eigenvalue())) + flt.weight_decay
        return present / (float(flt.p(edge)) + flt.weight_decay)
    assert isinstance(flt, AdamW)
    rest = (1 - flt.beta1) * edge / (1 + flt.beta1) + flt.weight_decay
    return 2 / rest / flt.lr


def _rho_for(flt: Filter, edge: float) -> float:
    """The rho with which the filter ends at `edge`, below where it does."""
    low = float(flt.rho)  # type: ignore[attr-defined]

    def end(rho: float) -> float:
        changed: Filter = dataclasses.replace(flt, rho=rho)  # type: ignore[type-var]
        return changed.max_eigenvalue()

    high = max(2 * low, 1e-12)
    while end(high) > edge:
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if end(middle) > edge else (low, middle)
    return high
