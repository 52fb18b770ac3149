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

    After an ascent of USAM, mu is an eigenvalue of P^-1/2 (H + rho H^2) P^-1/2, which the
    eigenvalues without the ascent do not determine. After SAM's, rho / G replaces rho, with the
    gradient norm G; after another method's, mu belongs to P^-1/2 p(H) P^-1/2 with its p. The weight
    decay is decoupled, so that the equilibrium has a nonzero gradient for wd > 0. P follows the
    squared gradients: the statement holds while P changes slowly, and is not one about a limit.

    Args:
        lr: learning rate, at least 0. With 0 every eigenvalue is admitted.
        beta1: decay rate of the first moment, in [0, 1).
        weight_decay: coefficient wd of the decoupled weight decay, at least 0, with lr wd <= 2.
        maximize: whether the optimizer maximizes f. Eigenvalues remain those of f's Hessian.

    Raises:
        ValueError: a value is outside its range.

    Source: J. Cohen et al., Adaptive gradient methods at the edge of stability, arXiv 2207.14484,
    whose 2 (1 + beta1) / ((1 - beta1) lr) is the edge at wd = 0; with decay: Jury's conditions.

    >>> round(AdamW(1e-3, 0.9).max_eigenvalue(), 6)
    38000.0
    """

    lr: float
    beta1: float = 0.9
    weight_decay: float = 0.0
    _: KW_ONLY
    maximize: bool = False

    def __post_init__(self) -> None:
        check_field(self, "lr", 0.0, math.inf)
        check_field(self, "beta1", 0.0, 1.0, closed=False)
        check_field(self, "weight_decay", 0.0, math.inf)
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
        return cls(beta1=group["betas"][0], **{name: group[name] for name in names})

    def intervals(self) -> list[Interval]:
        """The admitted eigenvalues: one closed interval."""
        if self.lr == 0.0:
            return [(-math.inf, math.inf)]
        step = (1.0 - self.beta1) * self.lr
        high = (1.0 + self.beta1) * (2.0 - self.lr * self.weight_decay) / step
        low = 0.0 - self.weight_decay
        return [(-high, -low)] if self.maximize else [(low, high)]

    @property
    def rate(self) -> float:
        """The lr of gradient descent without momentum that has the same edge at wd = 0."""
        return (1.0 - self.beta1) / (1.0 + self.beta1) * self.lr

    def spectral_radius(self, lam: ArrayLike) -> NDArray[np.float64]:
        """See `Filter.spectral_radius`; the block acts on (x, lr P^-1 m).

        Raises:
            ValueError: `lam` is not finite.
        """
        values = np.asarray(lam, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("spectral_radius needs finite eigenvalues")
        gain = (1.0 - self.beta1) * self.lr * (-values if self.maximize else values)
        block = np.empty((*values.shape, 2, 2))
        block[..., 1, 0] = gain
        block[..., 1, 1] = self.beta1
        block[..., 0, 0] = 1.0 - self.lr * self.weight_decay - gain
        block[..., 0, 1] = -self.beta1
        return np.asarray(np.abs(np.linalg.eigvals(block)).max(axis=-1), np.float64)
