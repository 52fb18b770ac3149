"""Reductions over all elements of all tensors of a list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eigenfilter.kernels import dispatch
from eigenfilter.kernels._op import op
from eigenfilter.kernels.arithmetic import inverse
from eigenfilter.kernels.compression import item, read
from eigenfilter.kernels.conventions import arithmetic_dtype, power_of_two


def norm(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Euclidean norm of all elements of all tensors, or of their products with weights.

        out <- sqrt(sum_i sum_j (w_i[j] t_i[j])^2) / grad_scale

    Squares are summed in float64, in an order that depends on the sizes alone (with CUDA, also on
    which tensors are 16-byte aligned): the result is the same bit for bit from run to run, whatever
    the number of threads. Where squares of float64 elements overflow or vanish (beyond about 1e154,
    or below 1e-154), they are summed again, scaled by a power of two.

    Args:
        tensors: n tensors t, read, each in its own dtype.
        weights: n tensors w, read, or None for ones. A tensor may be wider than its
            weights, as a gradient may be wider than its parameter.
        momentum_scales: n float32 tensors [ceil(numel / 64)], read, where t are momenta as codes
            (int8): see `eigenfilter.kernels.compression`. None where they are numbers.
        grad_scale: loss scale that the tensors carry, or None for 1.
        out: 0-dim tensor of the result's dtype on the tensors' device, or None to allocate it. It
            may be float64 for any tensors, whose norm can exceed their dtype's range.
        backend: see `eigenfilter.kernels`.

    Returns:
        0-dim tensor, float32 (float64 where a tensor is float64), on the tensors' device.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb`.
    """
    if out is None:
        t = dispatch.first("tensors", tensors)
        wide = arithmetic_dtype(*{each.dtype for each in tensors if isinstance(each, Tensor)})
        out = torch.empty((), dtype=wide, device=t.device)
    elif not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, not {type(out).__name__}")
    _norm(
        tensors,
        out,
        weights=weights,
        momentum_scales=momentum_scales,
        grad_scale=grad_scale,
        backend=backend,
    )
    return out


@op
def _norm(
    tensors: Sequence[Tensor],
    out: Tensor,
    *,
    weights: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """out <- S sqrt(sum of (w t)^2 over all elements of all tensors), summed in float64."""
    values = [
        read(t, item(momentum_scales, i), torch.float64).double() for i, t in enumerate(tensors)
    ]
    if weights is not None:
        values = [w.double() * v for w, v in zip(weights, values, strict=True)]
    root = _root_of_squares(values, out.device)
    filled = [v.abs().amax() for v in values if v.numel() > 0]
    if filled and any(t.dtype == torch.float64 for t in tensors):
        scale = power_of_two(torch.stack(filled).amax())
        scaled = _root_of_squares([v / scale for v in values], out.device) * scale
        # Scaled, if the squares overflow float64 or are so small that they lose significant digits.
        root = torch.where((root >= 2.0**-350) & (root < torch.inf), root, scaled)
    out.copy_(root * inverse(grad_scale, out))


def _root_of_squares(values: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for v in values:
        total = total + v.square().sum()
    return total.sqrt()


@op
def flag_nonfinite(
    tensors: Sequence[Tensor], found_inf: Tensor, *, backend: str | None = None
) -> None:
    """Set a flag where any element is infinite or NaN.

        found_inf <- 1 if some t_i[j] is not finite, else unchanged

    Args:
        tensors: n tensors, read, each in its own dtype.
        found_inf: one-element float32 tensor on their device.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb`.
    """
    for t in tensors:
        found_inf.masked_fill_(~t.isfinite().all(), 1.0)
