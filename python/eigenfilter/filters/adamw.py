"""AdamW's filter, on the preconditioned Hessian."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eigenfilter.filters.stability import Filter, Interval, check_field


@dataclass(frozen=True)
class AdamW(Filter):
    """AdamW with its preconditioner held fixed, on the eigenvalues of P^-1/2 H P^-1/2.

    With P = diag(sqrt(v / (1 - beta2^t)) + eps) and m past its first steps (beta1^t ~ 0),

        m <- beta1 m + (1 - beta1) g,    x <- (1 - lr wd) x - lr P^-1 m

    and an eigenvalue mu of the preconditioned Hessian evolves by a 2x2 block, which contracts where

        -wd <= mu <= (1 + beta1) (2 - lr wd) / ((1 - beta1) lr).

    Where the gradient is taken after an ascent of USAM, mu is an eigenvalue of P^-1/2 (H + rho H^2)
    P^-1/2: no function of those without the ascent; after one of SAM's, of that with rho / G for
    rho, G the gradient's norm; after others, of P^-1/2 p(H) P^-1/2 with their p. The decay is
    decoupled, hence with wd > 0 the equilibrium has a nonzero gradient. v follows the squared
    gradients, so that P itself moves: the statement is of a moment at which it moves slowly, not of
    a limit.

    Args:
        lr: >= 0. With 0 nothing moves and every eigenvalue is admitted.
        beta1: in [0, 1).
        weight_decay: wd, >= 0, with lr wd <= 2.
        maximize: the optimizer ascends f; eigenvalues stay those of f's Hessian.

    Raises:
        ValueError: for a value outside its range.

    Source: J. Cohen et al., Adaptive gradient methods at the edge of stability, arXiv 2207.14484,
    whose 2 (1 + beta1) / ((1 - beta1) lr) is the edge at wd = 0; with decay: Jury's conditions.

    >>> AdamW(1e-3, 0.9).max_eigenvalue()
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
        """The lr of gradient descent, without momentum, that has the same edge at wd = 0."""
        return (1.0 - self.beta1) / (1.0 + self.beta1) * self.lr

    def spectral_radius(self, lam: ArrayLike) -> NDArray[np.float64]:
        """See `Filter.spectral_radius`; the block acts on (x, lr P^-1 m).

        Raises:
            ValueError: `lam` is not finite.
        """
        values = np.asarray(lam, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("spectral_radius needs finite eigenvalues")
        fed = (1.0 - self.beta1) * self.lr * (-values if self.maximize else values)
        block = np.empty((*values.shape, 2, 2))
        block[..., 1, 0] = fed
        block[..., 1, 1] = self.beta1
        block[..., 0, 0] = 1.0 - self.lr * self.weight_decay - fed
        block[..., 0, 1] = -self.beta1
        return np.asarray(np.abs(np.linalg.eigvals(block)).max(axis=-1), np.float64)
