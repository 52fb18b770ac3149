"""Perturbations of the parameters, before the gradient of a step is taken.

The bodies are the references. x: parameter; g: gradient; g0: gradient at x; b: backup of x; S =
1 / grad_scale; T: dtype of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eigenfilter.kernels._op import op
from eigenfilter.kernels.arithmetic import inverse, real, write
from eigenfilter.kernels.compression import Lists, item, read
from eigenfilter.kernels.conventions import Scalar, arithmetic_dtype


@op
def perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    alpha: Scalar,
    *,
    corrections: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,
    save: bool = True,
    adaptive: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Perturb the parameters along their gradients, and save them first.

        b <- x,    x <- b + alpha g / grad_scale        (adaptive: alpha b^2 g / grad_scale)

    A second ascent does not save: with `save=False` it starts from the backups b, or without
    backups from the present values x.

    An optimizer whose gradient is taken ahead along a momentum moves along that, in the format in
    which it is kept: then with `save=False` and without backups.

    Args:
        params: n tensors x, perturbed in place. With backups that are not saved to, their present
            values are not read.
        grads: n tensors g, read: gradients, or momenta of float32, bfloat16 or int8 codes.
        backups: n tensors b, which become bit-for-bit copies of x, even if `found_inf` leaves x
            unchanged. With `save=False` they are read, or None.
        alpha: step size: rho to ascend f, -rho to ascend -f.
        corrections: n tensors of int8 or int16, updated: bfloat16 or float16 parameters stand with
            them for master weights, which are moved. See `eigenfilter.kernels.compression`.
        momentum_scales: n float32 tensors [ceil(numel / 64)], read, where g are codes.
        save: whether to save x to the backups.
        adaptive: whether to scale the gradient by b^2, elementwise, as ASAM does.
        grad_scale: loss scale that the gradients carry, or None for 1.
        found_inf: flag; if it is not zero, x is unchanged.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError: an element is not a strided tensor of a supported dtype.
        ValueError: lists, devices, dtypes, shapes or strides differ, tensors overlap, or there are
            no backups to save to, or backups beside corrections or scales.
        RuntimeError: the backend asked for is not available; the message says how to get it.

    Source: arXiv 2510.09034, USAM, and the second ascent of two-step USAM, anchored or sequential;
    arXiv 2102.11600, ASAM; the backup is ours.
    """
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        T = arithmetic_dtype(p.dtype, grad.dtype)
        step = (real(alpha, p) * inverse(grad_scale, p)).to(T)
        b = item(backups, i)
        if save and b is not None:
            b.copy_(p)
        lists = Lists(p, item(corrections, i), None, i, found_inf)
        x = lists.start(None, T) if b is None else b.to(T)
        g = read(grad, item(momentum_scales, i), T)
        lists.write(x + step * (x * x * g if adaptive else g))


@op
def perturb_hvp(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    base_grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    eps: Scalar,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Perturb the backups along a Hessian-vector product by finite differences.

        h = (g - g0) / (eps grad_scale),    x <- b + alpha h

    With g = grad f(b + eps g0) this is h = H(b) g0 up to O(eps).

    Args:
        params: n tensors x, overwritten; their present values are not read.
        grads: n tensors g, gradients at the perturbed point, read.
        base_grads: n tensors g0, gradients at b, read.
        backups: n tensors b, read.
        alpha: step size of the ascent.
        eps: step size of the finite difference, not 0.
        grad_scale: loss scale that both gradients carry, or None for 1.
        found_inf: flag; if it is not zero, x is unchanged.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb`.

    Source: the Hessian correction of Hessian USAM.
    """
    for p, g, g0, b in zip(params, grads, base_grads, backups, strict=True):
        T = arithmetic_dtype(p.dtype, g.dtype)
        step = (real(alpha, p) * inverse(grad_scale, p) / real(eps, p)).to(T)
        write(p, b.to(T) + step * (g.to(T) - g0.to(T)), found_inf)
