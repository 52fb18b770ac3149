"""The Hessian of a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eigenfilter.curvature.engines.graphs import gradient
from eigenfilter.curvature.engines.vectors import Sums, split
from eigenfilter.curvature.objective import Outer, one_number
from eigenfilter.curvature.operators import CurvatureOperator


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
        self._current()
        place = self.params if at is None else split(at.clone(), self.params)
        inputs = [p if at is None else p.requires_grad_() for p in place]
        names = self._objective.names(self.params)
        named = None if at is None else dict(zip(names, inputs, strict=True))
        given = [] if at is None else [at]
        like = torch.empty(self.shape[0], 1, dtype=self.dtype, device=self.device)
        with (
            self._refusing_together(like, given),
            torch.autocast(self.device.type, enabled=False),
        ):
            sums = Sums(like, inputs)
            for index, batch in enumerate(self._source.batches()):
                here = self._objective.evaluate(index, batch, named)
                weight = 1.0 if self._source.single else here.weight()
                if weight:
                    sums.weight += weight
                    sums.add(gradient(here, inputs), weight, 0)
                del here
        return self._total(sums, given)[0]

    @staticmethod
    def _finish(
        loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, mean: bool
    ) -> tuple[Tensor, Outer | None]:
        return one_number(loss_fn(output, target)), None
