"""An operator H as an optimizer sees it: scaled, after an ascent, with weight decay."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from eigenfilter.curvature.protocol import SymmetricOperator


class PreconditionedOperator:
    """D (s H + H R H + W) D for an operator H [n, n] and diagonal D, R, W.

    With D = P^-1/2 and W = 0 its eigenvalues are those of P^-1 (H + H R H): what an optimizer that
    divides by P is filtered by. With D = A^1/2, for learning rates A, radii R and weight decays W,
    they are those of the step A (H + H R H + W) of USAM with several groups. A product takes one of
    H's, or two where R is not 0.

    Args:
        op: H.
        scale: [n], or its slice here, as all below: the diagonal of D, finite, of the operator's
            dtype and on its device.
        rho: of an ascent before the gradient, >= 0: one number or the diagonal [n] of R.
        decay: [n], the diagonal of W, or None for 0.
        sign: s, 1 or -1: an optimizer that maximises descends -f.

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
    ) -> None:
        self.slices = getattr(op, "slices", None)
        for name, given in (("scale", scale), ("rho", rho), ("decay", decay)):
            if isinstance(given, Tensor):
                _check(name, given, op)
        self._op, self._scale, self._sign = op, scale[:, None], sign
        self._rho = rho[:, None] if isinstance(rho, Tensor) else rho
        self._decay = None if decay is None else decay[:, None]
        self._ascends = bool(rho.any()) if isinstance(rho, Tensor) else rho != 0
        self.products = 2 if self._ascends else 1  # of H, in each

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
        """Return D (s H + H R H + W) D v [n] for v [n]."""
        return self.matmat(v[:, None])[:, 0]

    def matmat(self, V: Tensor) -> Tensor:
        """Return D (s H + H R H + W) D V [n, b] for V [n, b]."""
        U = self._scale * V
        H = self._multiply(U)
        found = self._sign * H
        if self._ascends:
            found = found + self._multiply(self._rho * H)
        if self._decay is not None:
            found = found + self._decay * U
        return self._scale * found

    def fixed(self) -> AbstractContextManager[object]:
        """A context in which H must not change, if H has one."""
        held: AbstractContextManager[object] = getattr(self._op, "fixed", nullcontext)()
        return held

    def _multiply(self, V: Tensor) -> Tensor:
        if V.shape[1] == 1:
            return self._op.matvec(V[:, 0])[:, None]
        return self._op.matmat(V)


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
