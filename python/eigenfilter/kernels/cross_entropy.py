"""Products with the Hessian of cross-entropy in its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels import dispatch
from eigenfilter.kernels._op import op
from eigenfilter.kernels.vectors import count


def cross_entropy_hvp(
    logits: Tensor,
    u: Tensor,
    scales: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply vectors by the Hessian of cross-entropy in its logits.

        m_i = p_i . u_i,    out_i <- s_i (p_i u_i - m_i p_i),    p_i = softmax(z_i)

    For any target y_i the loss -log p_i[y_i] has the gradient p_i - y_i (as a one-hot vector) and
    the Hessian diag(p_i) - p_i p_i^T. So targets are no argument, and what
    `torch.nn.functional.cross_entropy` makes of ignored targets, class weights, label smoothing and
    its reduction is in the scales. Sums are taken in float64, in an order that depends on the sizes
    alone. On the CPU logits and u are read from memory once and the product is written once; no
    other memory of their size is used. Exponentials err by less than two units in the last place.

    Args:
        logits: z [n, c], float32 or float64, contiguous.
        u: [n, c], of the same dtype, contiguous.
        scales: s [n], float64, on their device, contiguous. Where s_i is 0 the product is 0, and
            z_i is not read.
        out: [n, c] for the product, contiguous; it may be u itself. None allocates it.
        backend: see `eigenfilter.kernels`.

    Returns:
        out, and the means m [n], float64; m_i is 0 where s_i is.

    Raises:
        TypeError, ValueError, RuntimeError: as `orthogonalize`; ValueError also where `out`
            overlaps other arguments without being u.

    Example:
        >>> import torch
        >>> from eigenfilter.kernels import cross_entropy_hvp
        >>> z, u = torch.tensor([[2.0, 2.0]]), torch.tensor([[4.0, 0.0]])
        >>> cross_entropy_hvp(z, u, torch.ones(1, dtype=torch.float64))
        (tensor([[ 1., -1.]]), tensor([2.], dtype=torch.float64))

    Sources: N. N. Schraudolph, Neural Computation 14 (2002), section 3, for the matrix; M. Milakov
    and N. Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867, algorithm 3.
    """
    rows = count("u", u, _core.most_softmax_rows)
    out = torch.empty_like(dispatch.tensor("u", u)) if out is None else out
    means = torch.zeros(rows, dtype=torch.float64, device=u.device)
    _cross_entropy_hvp(out, logits, scales, means, None if out is u else u, backend)
    return out, means


@op
def _cross_entropy_hvp(
    out: Tensor,
    logits: Tensor,
    scales: Tensor,
    means: Tensor,
    u: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """m_i <- p_i . u_i, out_i <- s_i (p_i u_i - m_i p_i), in float64; rounded once."""
    p = logits.double().softmax(1)
    product = p * (out if u is None else u).double()
    mean = product.sum(1)
    counts = scales != 0
    out.copy_((scales[:, None] * (product - mean[:, None] * p)).where(counts[:, None], 0))
    means.copy_(mean.where(counts, 0))
