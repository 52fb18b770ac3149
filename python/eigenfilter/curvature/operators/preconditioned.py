"""H as it decides an optimizer's stability: scaled, after an ascent, with weight decay."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator


class PreconditionedOperator:
    """D (J + W) D for an operator H [n, n] and diagonal D, R, W, with H' = s H and

        J = H' + a H' R H' + b H' R H' R H'

    J is the Jacobian of the gradient that is taken after one or two ascents, see `ascent`. With
    D = A^1/2 the eigenvalues are those of A (J + W), which decide the stability of an optimizer
    whose step has a diagonal factor A: the inverse of a preconditioner, or the learning rates of
    several groups. A product takes one product with H, and one more for each R.

    Args:
        op: the operator H.
        scale: diagonal [n] of D, or its slice, finite, with the operator's dtype and device; the
            same holds for all diagonals below.
        rho: radii of the ascents, >= 0: one number, or the diagonal [n] of R.
        decay: diagonal [n] of W, or None for 0.
        sign: the number s, 1 or -1; -1 is for an optimizer that maximizes, which descends -f.
        ascent: the numbers (a, b): (1, 0) for USAM, (2, 1) for sequential and (1, 1) for anchored
            two-step USAM, (0, 1) for Hessian USAM, with the square roots of its radii as rho.

    Attributes:
        products: number of products with H in one product.

    Raises:
        ValueError: scale, rho or decay has another shape, dtype or device, or is not finite.
    """

    def __init__(
        self,
        op: SymmetricOperator,
        scale: Tensor,
        rho: float | Tensor = 0.0,
        decay: Tensor | None = None,
        sign: float = 1.0,
        ascent: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        self.slices = getattr(op, "slices", None)
        for name, values in (("scale", scale), ("rho", rho), ("decay", decay)):
            if isinstance(values, Tensor):
                _check(name, values, op)
        self._op, self._scale, self._sign = op, scale[:, None], sign
        self._rho = rho[:, None] if isinstance(rho, Tensor) else rho
        self._decay = None if decay is None else decay[:, None]
        self._ascends = bool(rho.any()) if isinstance(rho, Tensor) else rho != 0
        self._ascent = ascent
        self.products = 1 if not self._ascends else 3 if ascent[1] else 2

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return self._op.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self._op.dtype

    @property
    def device(self) -> torch.device:
        """The device of the vectors."""
        return self._op.device

    def matvec(self, v: Tensor) -> Tensor:
        """Return D (J + W) D v [n] for v [n]."""
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Return D (J + W) D V [n, b] for V [n, b]."""
        U = self._scale * V
        product = self._multiply(U)
        if self._ascends:
            a, b = self._ascent
            first = self._rho * product  # R H' U
            ascent = a * first
            if b:
                ascent = ascent + b * self._rho * self._multiply(first)
            product = product + self._multiply(ascent)
        if self._decay is not None:
            product = product + self._decay * U
        return self._scale * product

    def fixed(self) -> AbstractContextManager[object]:
        """The context of H in which H must not change, if it has one."""
        context: AbstractContextManager[object] = getattr(self._op, "fixed", nullcontext)()
        return context

    def _multiply(self, V: Tensor) -> Tensor:
        """Return H' V."""
        if V.shape[1] == 1:
            return self._sign * self._op.matvec(V[:, 0])[:, None]
        return self._sign * self._op.matmat(V)


def _check(name: str, values: Tensor, op: SymmetricOperator) -> None:
    slices = getattr(op, "slices", None)
    length = op.shape[0] if slices is None else slices.length
    if values.shape != (length,) or values.dtype != op.dtype or values.device != op.device:
        raise ValueError(
            f"{name} must be [{length}], {op.dtype}, on {op.device}; got "
            f"{list(values.shape)}, {values.dtype}, on {values.device}"
        )
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite")
