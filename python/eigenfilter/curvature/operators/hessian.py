"""The Hessian of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eigenfilter.curvature.engines.derivative_graphs import gradient
from eigenfilter.curvature.loss.objective import Outer, one_number
from eigenfilter.curvature.loss.vectors import Sums, split
from eigenfilter.curvature.operators.base import CurvatureOperator


class HessianOperator(CurvatureOperator):
    """The Hessian of a model's loss: C_b is that of loss_b(x), of batch b.

        H v = d/dt grad f(x + t v) at t = 0

    Everything else is as `CurvatureOperator` says.

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
    (1994), eq. (3), by automatic differentiation of the gradient.
    """

    _through_backward = True

    @torch.no_grad()
    def gradient(self, at: Tensor | None = None) -> Tensor:
        """Return the gradient of f [n] at x, or at another point `at` [n].

        The model's parameters, and their gradients, are left as they are.

        Raises:
            ValueError: `at` is not of the operator's shape, dtype and device.
            RuntimeError: see the class.
        """
        if self.slices is not None:
            raise RuntimeError(
                "there are no gradients of a model that FSDP2 shards here: pass an unsharded copy"
            )
        if at is not None:
            self._check_like("at", "[{}]", at, at.ndim == 1)
        made, _ = self._current()
        given = [] if at is None else [at]
        like = torch.empty(self.shape[0], 1, dtype=self.dtype, device=self.device)
        exact = self.engine != "finite_difference"
        with (
            self._refusing_together(like, given),
            torch.autocast(self.device.type, enabled=False),
            _placed(made.params, at),
        ):
            sums = Sums(like, made.params)
            for index, batch in enumerate(self._source.batches()):
                here = made.objective.evaluate(index, batch, exact=exact)
                weight = 1.0 if self._source.single else here.weight()
                if weight:
                    sums.weight += weight
                    sums.add(gradient(here, made.params), weight, 0)
                del here
        return self._total(sums, given)[0]

    @staticmethod
    def _finish(
        loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, mean: bool
    ) -> tuple[Tensor, Outer | None]:
        return one_number(loss_fn(output, target)), None


@contextmanager
def _placed(params: Sequence[Tensor], at: Tensor | None) -> Iterator[None]:
    """Move parameters to another point, and back bit for bit.

    In place, as `FiniteDifference` does: what backward runs again, or f holds of a parameter
    outside its module, is then at that point too.
    """
    if at is None:
        yield
        return
    moving = [p.data for p in params]
    backup = [p.clone() for p in moving]
    try:
        torch._foreach_copy_(moving, split(at.clone(), moving))
        yield
    finally:
        torch._foreach_copy_(moving, backup)
