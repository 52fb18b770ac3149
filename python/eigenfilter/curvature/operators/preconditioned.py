"""An operator H as an optimizer sees it: scaled, after an ascent, with weight decay."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator


class PreconditionedOperator:
    """D (J + W) D for an operator H [n, n] and diagonal D, R, W, with H' = s H and

        J = H' + a H' R H' + b H' R H' R H'

    the Jacobian of a gradient taken where one or two ascents lead: see `ascent`. For diagonal A its
    eigenvalues with D = A^1/2 are those of A (J + W): what an optimizer is filtered by whose step
    is A = P^-1, of a preconditioner P, or has several groups with their learning rates in A. A
    product takes one of H's, and one more for each R.

    Args:
        op: H.
        scale: [n], or its slice here, as all below: the diagonal of D, finite, of the operator's
            dtype and on its device.
        rho: radii of the ascents, >= 0: one number or the diagonal [n] of R.
        decay: [n], the diagonal of W, or None for 0.
        sign: s, 1 or -1: an optimizer that maximises descends -f.
        ascent: (a, b): (1, 0) for USAM, (2, 1) and (1, 1) for two-step USAM, sequential and
            anchored, (0, 1) for Hessian USAM, with the square roots of its radii.

    Raises:
        ValueError: scale, rho or decay is not such a vector.
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
        for name, given in (("scale", scale), ("rho", rho), ("decay", decay)):
            if isinstance(given, Tensor):
                _check(name, given, op)
        self._op, self._scale, self._sign = op, scale[:, None], sign
        self._rho = rho[:, None] if isinstance(rho, Tensor) else rho
        self._decay = None if decay is None else decay[:, None]
        self._ascends = bool(rho.any()) if isinstance(rho, Tensor) else rho != 0
        self._ascent = ascent
        self.products = 1 if not self._ascends else 3 if ascent[1] else 2  # of H, in each

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
        """Return D (J + W) D v [n] for v [n]."""
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Return D (J + W) D V [n, b] for V [n, b]."""
        U = self._scale * V
        found = self._multiply(U)
        if self._ascends:
            once, twice = self._ascent
            up = self._rho * found
            far = once * up
            if twice:
                far = far + twice * self._rho * self._multiply(up)
            found = found + self._multiply(far)
        if self._decay is not None:
            found = found + self._decay * U
        return self._scale * found

    def fixed(self) -> AbstractContextManager[object]:
        """A context in which H must not change, if H has one."""
        held: AbstractContextManager[object] = getattr(self._op, "fixed", nullcontext)()
        return held

    def _multiply(self, V: Tensor) -> Tensor:
        """H' V."""
        if V.shape[1] == 1:
            return self._sign * self._op.matvec(V[:, 0])[:, None]
        return self._sign * self._op.matmat(V)


def _check(name: str, given: Tensor, op: SymmetricOperator) -> None:
    slices = getattr(op, "slices", None)
    length = op.shape[0] if slices is None else slices.length
    if given.shape != (length,) or given.dtype != op.dtype or given.device != op.device:
        raise ValueError(
            f"{name} must be [{length}], {op.dtype}, on {op.device}; got "
            f"{list(given.shape)}, {given.dtype}, on {given.device}"
        )
    if not given.isfinite().all():
        raise ValueError(f"{name} must be finite")
