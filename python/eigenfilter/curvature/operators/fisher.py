"""The empirical Fisher matrix of a model's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from eigenfilter.curvature.loss.objective import Outer
from eigenfilter.curvature.operators.base import CurvatureOperator
from eigenfilter.curvature.operators.ggn import tensor_output


class EmpiricalFisherOperator(CurvatureOperator):
    """The empirical Fisher matrix: the second moment of the gradients of single samples.

        C_b = 1/N sum_i g_i g_i^T    (reduction="mean"),    g_i = d l_i / dx
        C_b = sum_i g_i g_i^T        (reduction="sum")

    l_i is the loss on sample i of the N samples of batch b. If `loss_fn` returns a tensor [N] (as
    torch's losses do with reduction="none"), these are the l_i. If it returns one number, l_i is
    loss_fn(output[i : i + 1], target[i : i + 1]), vectorized by `torch.vmap` where that works, and
    evaluated one by one where not. In this case class weights have no effect, because torch's
    weighted mean over one sample divides by its weight.

    C is no curvature: it uses the targets of the data, not targets drawn from the model, and need
    not be near the Fisher matrix, which is a GGN (see `GGNOperator`). A product costs one product
    with the Jacobian of l and one with its transpose; no g_i is formed. Arguments, attributes and
    other errors are those of `CurvatureOperator`. With engine="finite_difference" the g_i^T v are
    differences of losses.

    Raises:
        ValueError: from a product: the output is not a tensor with a leading dimension of samples,
            or loss_fn returns neither [N] nor one number.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import EmpiricalFisherOperator
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x = torch.tensor([[3.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        >>> y = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
        >>> op = EmpiricalFisherOperator(model, torch.nn.functional.mse_loss, (x, y))
        >>> op.to_dense().tolist()  # the mean of the outer products of (-6, -2) and (0, 0)
        [[18.0, 6.0], [6.0, 2.0]]

    Sources: J. Martens, New insights and perspectives on the natural gradient method, JMLR 21
    (2020), section 11; F. Kunstner, L. Balles and P. Hennig, Limitations of the empirical Fisher
    approximation for natural gradient descent, NeurIPS (2019), eq. (3).
    """

    @staticmethod
    def _finish(
        loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, mean: bool
    ) -> tuple[Tensor, Outer]:
        losses = _losses(loss_fn, tensor_output(output), target)
        share = 1.0 / max(len(losses), 1) if mean else 1.0

        def outer(z: Tensor) -> Tensor:
            return 0.5 * share * z.square().sum()

        return losses, outer


def _losses(loss_fn: Callable[[Any, Any], Tensor], output: Tensor, target: Any) -> Tensor:
    """Return the losses [N] of the samples."""
    loss = loss_fn(output, target)
    samples = output.shape[:1]
    if isinstance(loss, Tensor) and samples and loss.shape == samples:
        return loss
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and samples):
        shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            "loss_fn must return one loss a sample, [N] for an output [N, ...], or one number; got "
            f"{shape} for {list(output.shape)}"
        )

    def alone(z: Tensor, t: Any) -> Tensor:
        one = None if t is None else tree_map(lambda a: a.unsqueeze(0), t)
        return loss_fn(z.unsqueeze(0), one).reshape(())

    try:
        return torch.vmap(alone, in_dims=(0, None if target is None else 0))(output, target)
    except RuntimeError:  # vmap does not support everything, such as derivatives in the loss
        parts = [tree_map(lambda a, i=i: a[i], target) for i in range(len(output))]
        return torch.stack([alone(z, t) for z, t in zip(output, parts, strict=True)])
