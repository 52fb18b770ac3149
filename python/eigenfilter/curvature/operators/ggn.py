"""The generalized Gauss-Newton matrix of a model's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from eigenfilter.curvature.loss.linear_cross_entropy import LinearLogits
from eigenfilter.curvature.loss.objective import Outer, one_number
from eigenfilter.curvature.operators.base import CurvatureOperator


class GGNOperator(CurvatureOperator):
    """The generalized Gauss-Newton matrix: the Hessian, with the model linearized at x.

        C_b = J^T H_L J,    J = dz/dx,    H_L = d^2 L / dz^2

    z(x) is the output of the model on batch b, a tensor of any shape, and L(z) = loss_fn(z,
    target). H_L comes from differentiating `loss_fn`, which may be any loss. C_b is positive
    semidefinite if L is convex in z. It equals the Hessian where z is linear in x or dL/dz = 0, and
    the Fisher matrix for losses that are the negative log-likelihood of a natural parameter, such
    as the square loss and cross-entropy. The output may be `LinearLogits`, which are not formed.

    L is a function of z alone, so that parameters of `loss_fn` cannot be among `params`. Arguments,
    attributes and other errors are those of `CurvatureOperator`. With engine="finite_difference"
    only J v is a difference, of outputs; the rest is exact.

    Raises:
        ValueError: a parameter of the loss is among `params`; from a product: the output is not a
            tensor (then let `forward` return one).

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import GGNOperator
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[3.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.zeros(2, 1, dtype=torch.float64)
        >>> op = GGNOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> op.to_dense().tolist()  # x^T x, which is the Hessian too, since the model is linear
        [[9.0, 3.0], [3.0, 2.0]]

    Sources: N. N. Schraudolph, Fast curvature matrix-vector products for second-order gradient
    descent, Neural Computation 14 (2002), section 3; J. Martens, Deep learning via Hessian-free
    optimization, ICML (2010), section 4.2, and New insights and perspectives on the natural
    gradient method, JMLR 21 (2020), sections 8 and 9.
    """

    @staticmethod
    def _finish(
        loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, mean: bool
    ) -> tuple[Tensor, Outer]:
        def outer(z: Tensor) -> Tensor:
            return one_number(loss_fn(z, target))

        if isinstance(output, LinearLogits):
            return output.variables(), lambda y: one_number(loss_fn(output.at(y), target))
        return tensor_output(output), outer

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        return self._objective.model.parameters()


def tensor_output(output: Any) -> Tensor:
    """Return a model's output, which must be a tensor.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            "the model's output must be a tensor for this matrix, and is a "
            f"{type(output).__name__}: let forward return the one that loss_fn takes"
        )
    return output
