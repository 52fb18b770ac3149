"""The sharpness of a model during training, compared with the edge of its optimizer's filter."""

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
from eigenfilter.filters import MSAM, AdamW, Filter, PolynomialFilter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN = 1.05  # the ratio of edge and sharpness that an action aims at
_BASE_LR = "rho_base_lr"  # in a group whose rho a RhoScheduler computes from lr
ACTIONS = ("warn", "lower_lr", "raise_rho")


@dataclass(frozen=True)
class SharpnessCheck:
    """One measurement of the sharpness.

    Attributes:
        step: number of training steps before it.
        sharpness: the largest eigenvalue of the Hessian, or of the matrix that replaces it for
            AdamW and for groups that differ; see `SharpnessMonitor`.
        residual: an eigenvalue lies within this distance of `sharpness`.
        edge: the largest eigenvalue that the optimizer's filter admits. It is None if there is no
            filter: for SAM, whose edge moves with the gradient norm, for AdamW before its first
            step, and for other optimizers and groups without a known filter.
        matvecs: number of products with the Hessian.
        seconds: time in seconds.
    """

    step: int
    sharpness: float
    residual: float
    edge: float | None
    matvecs: int
    seconds: float

    @property
    def past_edge(self) -> bool:
        """Whether an eigenvalue lies past the edge, even allowing for its error."""
        return self.edge is not None and self.sharpness - self.residual > self.edge


class Writer(Protocol):
    """The part of torch.utils.tensorboard.SummaryWriter that the monitor uses."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class SharpnessMonitor:
    """Compares the sharpness of a model during training with the edge of its optimizer's filter.

    Every check after the first starts from the previous eigenvector, so that it takes few products
    while the model changes slowly. docs/curvature.md says how often to check, which matrix replaces
    the Hessian for AdamW and for groups that differ, and what happens with several processes.

    Args:
        op: the Hessian of the loss in the optimizer's parameters, all that require grad and no
            others. Its data may be all data, or a probe batch that stays the same.
        optimizer: the optimizer whose filter has the edge.
        every: number of training steps from one check to the next, >= 1.
        tol: relative tolerance of the sharpness, > 0. Errors were up to twice as large if the gap
            to the next eigenvalue is small, so that the default achieves 1e-3.
        on_edge: what to do when the sharpness is past the edge. "warn" warns; "lower_lr" lowers the
            learning rate, and the extrapolation (for MSAM rho) by the same factor, until the edge
            is 5% above the sharpness, or higher where a `RhoScheduler` lowers the rho of ascents
            with it; "raise_rho" raises rho until the edge is 5% lower than before, which drives the
            sharpness down; a callable is called with the check; None does nothing.
        log: file to which every check is appended as a line of JSON, or None.
        writer: TensorBoard SummaryWriter that gets "sharpness" and "edge", or None.
        callback: function that is called with every check, or None.
        seed: seed of the random start of the first check.

    Attributes:
        history: list of all checks.

    Raises:
        ValueError: an argument is out of its range; "raise_rho" is requested and the filter has no
            rho (of MSAM a check after its first step says so); or the operator and the optimizer
            have different parameters.

    Example:
        >>> import eigenfilter as ef, torch
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> loss_fn = torch.nn.functional.mse_loss
        >>> opt = ef.SGD(model.parameters(), lr=0.1)  # admits eigenvalues up to 2 / lr = 20
        >>> op = ef.curvature.HessianOperator(model, loss_fn, (x, y))
        >>> monitor = ef.SharpnessMonitor(op, opt, every=2)
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     opt.step()
        ...     _ = monitor.step()
        >>> [(check.step, round(check.sharpness, 3), check.edge) for check in monitor.history]
        [(2, 9.0, 20.0), (4, 9.0, 20.0)]

    Source: J. Cohen et al., 2021, arXiv 2103.00065, for sharpness in training; the edges are those
    of arXiv 2510.09034.
    """

    _followed = 1  # pairs that a check computes, and the next one starts from

    def __init__(
        self,
        op: CurvatureOperator,
        optimizer: torch.optim.Optimizer,
        every: int = 1,
        *,
        tol: float = 5e-4,
        on_edge: str | Callable[[SharpnessCheck], object] | None = None,
        log: str | Path | None = None,
        writer: Writer | None = None,
        callback: Callable[[SharpnessCheck], object] | None = None,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        if not tol > 0:
            raise ValueError(f"tol must be positive, not {tol}")
        if isinstance(on_edge, str) and on_edge not in ACTIONS:
            raise ValueError(f"on_edge must be one of {ACTIONS}, a callable or None: {on_edge!r}")
        check_parameters(op, optimizer)
        self.history: list[SharpnessCheck] = []
        self._op, self._optimizer = op, optimizer
        self._every, self._tol, self._seed = every, tol, seed
        self._on_edge, self._callback, self._writer = on_edge, callback, writer
        self._log = None if log is None else Path(log)
        self._steps = 0
        self._vector: Tensor | None = None
        self._has_rho = on_edge == "raise_rho" and _check_rho(self._linearized(), optimizer)

    def step(self) -> SharpnessCheck | None:
        """Count a training step; after every `every`-th one, check and return the check."""
        self._steps += 1
        return self.check() if self._steps % self._every == 0 else None

    def check(self) -> SharpnessCheck:
        """Measure the sharpness now, log it, and act if it is past the edge.

        Raises:
            RuntimeError: an optimizer holds perturbed parameters; see the operator.
            ValueError: the optimizer has other parameters than the operator by now, or no rho that
                "raise_rho" may raise.
        """
        start = time.perf_counter()
        check_parameters(self._op, self._optimizer)  # groups may have been added, or frozen
        linear = self._linearized()
        if self._on_edge == "raise_rho" and not self._has_rho:
            self._has_rho = _check_rho(linear, self._optimizer)
        op = self._op if linear is None else linear.operator
        flt = None if linear is None else linear.filter
        products = 1 if linear is None else linear.products  # with H, in one product with op
        k = min(self._followed, op.shape[0])
        result = eigsh(
            op, k, tol=self._tol, v0=self._vector, check_multiplicity=False, seed=self._seed
        )
        self._vector = result.vectors.squeeze(1)
        check = SharpnessCheck(
            step=self._steps,
            sharpness=float(result.values[0]),
            residual=float(result.residuals[0]),
            edge=None if flt is None else flt.max_eigenvalue(),
            matvecs=products * result.matvecs,
            seconds=time.perf_counter() - start,
        )
        self.history.append(check)
        self._report(check)
        if linear is not None and check.past_edge:
            self._act(check, linear)
        return check

    def state_dict(self) -> dict[str, Any]:
        """Return the step count and the last eigenvector, to continue checks bit for bit.

        The history is not included.
        """
        return {"steps": self._steps, "vector": self._vector}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            ValueError: the eigenvector belongs to another model.
        """
        vector = state_dict["vector"]
        slices = self._op.slices
        length = self._op.shape[0] if slices is None else slices.length
        if vector is not None and len(vector) != length:
            raise ValueError(
                f"the state is of {len(vector)} parameters, and the operator has {length}"
            )
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
        """Return the matrix and the filter of the optimizer; None if there is no filter."""
        try:
            filters.of(self._optimizer)
        except TypeError:
            return None
        try:
            return linearized(self._op, self._optimizer)
        except (NoFilter, NoPreconditioner):
            return None

    def _report(self, check: SharpnessCheck) -> None:
        if self._log is not None and self._op.leads:
            with self._log.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(check)) + "\n")
        if self._writer is not None and self._op.leads:
            self._writer.add_scalar("sharpness", check.sharpness, check.step)
            if check.edge is not None:
                self._writer.add_scalar("edge", check.edge, check.step)
        if self._callback is not None:
            self._callback(check)

    def _act(self, check: SharpnessCheck, linear: Linearized) -> None:
        flt = linear.filter
        assert check.edge is not None
        if self._on_edge == "warn":
            warnings.warn(
                f"step {check.step}: the sharpness {check.sharpness:.4g} is past the edge "
                f"{check.edge:.4g} of the optimizer's filter",
                stacklevel=4,
            )
        elif self._on_edge == "lower_lr":
            factor = _lr_factor(flt, _MARGIN * check.sharpness)
            own = filters.of(self._optimizer)
            for group, each in zip(self._optimizer.param_groups, own, strict=True):
                group["lr"] = group["lr"] * factor
                name = "rho" if isinstance(each, MSAM) else "extrapolation"
                follows_lr = name == "rho" and _BASE_LR in group
                if group.get(name) and not follows_lr:
                    group[name] *= factor
        elif self._on_edge == "raise_rho":
            _check_rho(linear, self._optimizer)  # groups may have come to differ
            rho = _rho_for(flt, check.edge / _MARGIN)
            for group in self._optimizer.param_groups:
                group["rho"] = rho
        elif callable(self._on_edge):
            self._on_edge(check)


def _check_rho(linear: Linearized | None, optimizer: torch.optim.Optimizer) -> bool:
    """Check that "raise_rho" has a rho; False for one that only a later check can see."""
    if any(_BASE_LR in group for group in optimizer.param_groups):
        raise ValueError(
            "on_edge='raise_rho' sets rho, which RhoScheduler(optimizer, 'lr') computes from lr at "
            "every step: use another kind of scheduler, or on_edge='lower_lr'"
        )
    groups = optimizer.param_groups
    if linear is None and any(g.get("momentum_norm") == 0.0 and g["rho"] != 0 for g in groups):
        return False  # MSAM has a filter after its first step
    if linear is None or not hasattr(linear.filter, "rho"):
        raise ValueError(
            "on_edge='raise_rho' needs an optimizer whose filter has a rho, which is not 0: "
            "USAM, TwoStepUSAM, HessianUSAM or MSAM, with groups that are alike"
        )
    return True


def _lr_factor(flt: Filter, edge: float) -> float:
    """Return the factor of lr and extrapolation with which the filter ends at `edge`."""
    if isinstance(flt, PolynomialFilter):
        present = float(flt.p(flt.max_eigenvalue())) + flt.weight_decay
        return present / (float(flt.p(edge)) + flt.weight_decay)
    assert isinstance(flt, AdamW)
    beta, e, decay = flt.beta1, flt.extrapolation, flt.lr * flt.weight_decay
    bounds = (  # by Jury's conditions, see `AdamW`: the factor times the first <= the second
        ((1 - beta) * (flt.lr + 2 * e) * edge + (1 + beta) * decay, 2 * (1 + beta)),
        (-(1 - beta) * e * edge - beta * decay, 1 - beta),
    )
    return min(bound / slope for slope, bound in bounds if slope > 0)


def _rho_for(flt: Filter, edge: float) -> float:
    """Return the rho with which the filter ends at `edge`, which is below its present end."""
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
