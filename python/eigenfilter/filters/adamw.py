"""AdamW's filter, on the preconditioned Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eigenfilter.filters.stability import Filter, Interval, check_field


@dataclass(frozen=True)
class AdamW(Filter):
    """AdamW with its preconditioner held fixed, on the eigenvalues of P^-1/2 H P^-1/2.

    With P = diag(sqrt(v / (1 - beta2^t)) + eps), and after the first steps (beta1^t ~ 0),

        m <- beta1 m + (1 - beta1) g,    x <- (1 - lr wd) x - lr P^-1 m

    An eigenvalue mu of the preconditioned Hessian evolves by a 2x2 block, which contracts if

        -wd <= mu <= (1 + beta1) (2 - lr wd) / ((1 - beta1) lr).

    With an extrapolation e the gradient and the decay are taken at y = x - e u, with u = P^-1 m.
    The block then has the trace 1 - lr wd + beta1 - (1 - beta1) (lr + e) mu and the determinant
    (1 - lr wd) beta1 - (1 - beta1) e mu, so that Jury's conditions are

        -wd <= mu,    (1 - beta1) (lr + 2 e) mu <= (1 + beta1) (2 - lr wd),
        (1 - beta1) (-e) mu <= 1 - beta1 (1 - lr wd)

    For wd = 0 that is `HeavyBall` with momentum and dampening beta1. For e > 0 the second decides
    at the upper edge, which it puts anywhere below AdamW's, for e < 0 it may be the third; at the
    lower edge the third decides if e wd (1 - beta1) > 1 - beta1 (1 - lr wd). At an equilibrium x =
    (1 - e wd) y, and H is the Hessian at y.

    After an ascent of USAM, mu is an eigenvalue of P^-1/2 (H + rho H^2) P^-1/2, which the
    eigenvalues without the ascent do not determine. After SAM's, rho / G replaces rho, with the
    gradient norm G; after another method's, mu belongs to P^-1/2 p(H) P^-1/2 with its p. The weight
    decay is decoupled, so that the equilibrium has a nonzero gradient for wd > 0. P follows the
    squared gradients: the statement holds while P changes slowly, and is not one about a limit.

    Args:
        lr: learning rate, at least 0. With 0 every eigenvalue is admitted.
        beta1: decay rate of the first moment, in [0, 1).
        weight_decay: coefficient wd of the decoupled weight decay, at least 0, with lr wd <= 2.
        extrapolation: distance e that the gradient's point lies ahead, in units of u.
        maximize: whether the optimizer maximizes f. Eigenvalues remain those of f's Hessian.

    Raises:
        ValueError: a value is outside its range.

    Source: J. Cohen et al., Adaptive gradient methods at the edge of stability, arXiv 2207.14484,
    whose 2 (1 + beta1) / ((1 - beta1) lr) is the edge at wd = 0; with decay and extrapolation:
    Jury's conditions.

    >>> round(AdamW(1e-3, 0.9).max_eigenvalue(), 6)
    38000.0
    >>> round(AdamW(1e-3, 0.9, extrapolation=1.4e-3).max_eigenvalue(), 6)
    10000.0
    """

    lr: float
    beta1: float = 0.9
    weight_decay: float = 0.0
    extrapolation: float = 0.0
    _: KW_ONLY
    maximize: bool = False

    def __post_init__(self) -> None:
        check_field(self, "lr", 0.0, math.inf)
        check_field(self, "beta1", 0.0, 1.0, closed=False)
        check_field(self, "weight_decay", 0.0, math.inf)
        check_field(self, "extrapolation", -math.inf, math.inf)
        if self.lr * self.weight_decay > 2.0:
            raise ValueError(
                f"lr * weight_decay must be at most 2, got {self.lr * self.weight_decay}: decay "
                "alone diverges"
            )

    @classmethod
    def of_group(cls, group: Mapping[str, Any], **options: Any) -> AdamW:
        """The filter of a group of a live optimizer."""
        if group.get("amsgrad"):
            raise TypeError("no filter is known for AMSGrad, whose preconditioner differs")
        if float(group["weight_decay"]) != 0.0 and not group.get("decoupled_weight_decay", True):
            raise TypeError("no filter is known for Adam whose gradient has the decay: use AdamW")
        names = ("lr", "weight_decay", "maximize")
        own = {name: group[name] for name in names}
        extrapolation = group.get("extrapolation", 0.0)
        return cls(beta1=group["betas"][0], extrapolation=extrapolation, **own)

    def intervals(self) -> list[Interval]:
        """The admitted eigenvalues: one closed interval."""
        low, high = 0.0 - self.weight_decay if self.lr > 0.0 else -math.inf, math.inf
        for slope, bound in (self._real, self._complex):  # slope mu <= bound, with bound >= 0
            if slope > 0.0:
                high = min(high, bound / slope)
            elif slope < 0.0:
                low = max(low, bound / slope)
        return [(-high, -low)] if self.maximize else [(low, high)]

    @property
    def _real(self) -> tuple[float, float]:
        """Slope and bound of the condition at the multiplier -1."""
        reach = (1.0 - self.beta1) * (self.lr + 2.0 * self.extrapolation)
        return reach, (1.0 + self.beta1) * (2.0 - self.lr * self.weight_decay)

    @property
    def _complex(self) -> tuple[float, float]:
        """Slope and bound of the condition on the determinant."""
        kept = self.beta1 * (1.0 - self.lr * self.weight_decay)
        return -(1.0 - self.beta1) * self.extrapolation, 1.0 - kept

    @property
    def composes(self) -> bool:
        """Whether the multipliers 1 and -1 alone decide, so that groups may be composed."""
        (reach, edge), (slope, bound) = self._real, self._complex
        if slope > 0.0:
            return reach > 0.0 and slope * edge <= bound * reach
        return (self.lr > 0.0 or slope == 0.0) and -slope * self.weight_decay <= bound

    @property
    def rate(self) -> float:
        """The lr of gradient descent without momentum that has the same edge.

        Where it `composes`, the decay in its gradient is `edge_decay`; elsewhere wd = 0 in both.
        """
        real = self._real[0] / (1.0 + self.beta1)
        return real if self.composes else max(real, 2.0 * self._complex[0] / (1.0 - self.beta1))

    @property
    def edge_decay(self) -> float:
        """The decay in a gradient that lowers the upper edge as much as wd, where it `composes`."""
        return self.lr * self.weight_decay / self.rate if self.rate > 0.0 else 0.0

    def spectral_radius(self, lam: ArrayLike) -> NDArray[np.float64]:
        """See `Filter.spectral_radius`; the block acts on (x, a multiple of u).

        Raises:
            ValueError: `lam` is not finite.
        """
        values = np.asarray(lam, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("spectral_radius needs finite eigenvalues")
        e, beta, decay = self.extrapolation, self.beta1, self.lr * self.weight_decay
        scale = max(self.lr, abs(e)) or 1.0
        q = (1.0 - beta) * (-values if self.maximize else values)
        block = np.empty((*values.shape, 2, 2))
        block[..., 1, 0] = scale * q  # u <- beta1 u + (1 - beta1) mu y, for y = x - e u
        block[..., 1, 1] = beta - e * q
        block[..., 0, 0] = 1.0 - decay - self.lr * q  # x <- x - lr wd y - lr u, with the new u
        block[..., 0, 1] = (decay * e - self.lr * (beta - e * q)) / scale
        return np.asarray(np.abs(np.linalg.eigvals(block)).max(axis=-1), np.float64)


def design_adamw(
    max_eigenvalue: float, lr: float | None, beta1: float, weight_decay: float
) -> float:
    """The extrapolation, or for None the lr, with which AdamW's filter ends at an eigenvalue.

    Raises:
        ValueError: see `design`.
    """
    AdamW(0.0 if lr is None else lr, beta1, weight_decay)  # checks them
    slope = (1.0 - beta1) * max_eigenvalue
    highest = 2.0 * (1.0 + beta1) / (slope + (1.0 + beta1) * weight_decay)
    if lr is None:
        return highest
    if not lr > 0.0:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if lr > highest:
        raise ValueError(
            f"lr = {lr:g} alone puts the edge below {max_eigenvalue:g}: take lr <= {highest}, and "
            "an extrapolation to it"
        )
    reach = (1.0 + beta1) * (2.0 - lr * weight_decay) / slope
    return max(0.5 * (reach - lr), 0.0)
