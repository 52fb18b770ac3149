"""An operator seen through a diagonal preconditioner."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator


class PreconditionedOperator:
    """D (H + rho H^2) D for an operator H [n, n] and a diagonal D.

    With D = P^-1/2 its eigenvalues are those of P^-1 (H + rho H^2): what an optimizer that divides
    by P is filtered by. A product takes one of H's, or two where rho is not 0.

    Args:
        op: H.
        scale: [n], the diagonal of D, finite, of the operator's dtype and on its device.
        rho: of an ascent before the gradient, >= 0.

    Raises:
        ValueError: scale is not such a vector.
    """

    def __init__(self, op: SymmetricOperator, scale: Tensor, rho: float = 0.0) -> None:
        if scale.shape != op.shape[:1] or scale.dtype != op.dtype or scale.device != op.device:
            raise ValueError(
                f"scale must be [{op.shape[0]}], {op.dtype}, on {op.device}; got "
                f"{list(scale.shape)}, {scale.dtype}, on {scale.device}"
            )
        if not scale.isfinite().all():
            raise ValueError("scale must be finite")
        self._op, self._scale, self._rho = op, scale, rho
        self.products = 1 if rho == 0 else 2  # of H, in each

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self._op.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors taken and given."""
        return self._op.dtype

    @property
    def device(self) -> torch.device:
        """Of the vectors taken and given."""
        return self._op.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return D (H + rho H^2) D v [n] for v [n]."""
        h = self._op.matvec(self._scale * v)
        if self._rho:
            h = h + self._rho * self._op.matvec(h)
        return self._scale * h

    def matmat(self, V: Tensor) -> Tensor:
        """Return D (H + rho H^2) D V [n, b] for V [n, b]."""
        scale = self._scale[:, None]
        H = self._op.matmat(scale * V)
        if self._rho:
            H = H + self._rho * self._op.matmat(H)
        return scale * H

    def fixed(self) -> AbstractContextManager[object]:
        """A context in which H must not change, if H has one."""
        held: AbstractContextManager[object] = getattr(self._op, "fixed", nullcontext)()
        return held
