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
    """The Hessian of a model's loss: C_b is the Hessian of the loss on batch b.

        H v = d/dt grad f(x + t v) at t = 0

    Arguments, attributes and errors are those of `CurvatureOperator`.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import HessianOperator
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = HessianOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> v = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> (op @ v).tolist()  # the Hessian is x^T x
        [9.0, 3.0]

    Source: B. A. Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6
    (1994), eq. (3), by automatic differentiation of the gradient.
    """

    _through_backward = True

    @torch.no_grad()
    def gradient(self, at: Tensor | None = None) -> Tensor:
        """Return the gradient [n] of the loss at x, or at another point `at` [n].

        The model's parameters and their `.grad` do not change.

        Raises:
            ValueError: `at` does not have the operator's shape, dtype and device.
            RuntimeError: see the class.
        """
        if self.slices is not None:
            raise RuntimeError(
                "gradient() does not support a model that FSDP2 shards: use an unsharded copy"
            )
        if at is not None:
            self._check_like("at", "[{}]", at, at.ndim == 1)
        engines, _ = self._current()
        points = [] if at is None else [at]
        like = torch.empty(self.shape[0], 1, dtype=self.dtype, device=self.device)
        exact = self.engine != "finite_difference"
        with (
            self._raising_everywhere(like, points),
            torch.autocast(self.device.type, enabled=False),
            _parameters_at(engines.params, at),
        ):
            sums = Sums(like, engines.params)
            for index, batch in enumerate(self._source.batches()):
                here = engines.objective.evaluate(index, batch, exact=exact)
                weight = 1.0 if self._source.single else here.weight()
                if weight:
                    sums.weight += weight
                    sums.add(gradient(here, engines.params), weight, 0)
                del here
        return self._total(sums, points)[0]

    @staticmethod
    def _finish(
        loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, mean: bool
    ) -> tuple[Tensor, Outer | None]:
        return one_number(loss_fn(output, target)), None


@contextmanager
def _parameters_at(params: Sequence[Tensor], at: Tensor | None) -> Iterator[None]:
    """Set the parameters to another point, and restore them bit for bit.

    They change in place, as in `FiniteDifference`, so that modules that run again in backward, and
    references to a parameter outside its module, see the other point too.
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
