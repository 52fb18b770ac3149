"""Multi-tensor update kernels, one contract in four backends.

Each function works on lists of tensors that share one device and one dtype (float32, float64,
bfloat16 or float16) and are *dense*: their elements fill one stretch of memory, in any order of
dimensions. The i-th tensors of all lists have the same shape and strides, because the kernels index
memory linearly. Arithmetic is float32 (float64 for float64). All arguments are checked before
anything is written, and an error names the list and the index.

Each gradient (in `grads` and `base_grads`) may be wider than its parameter: float32 for bfloat16
and float16 parameters, float64 for float32 ones. It is read in its own dtype, the arithmetic is
that of the wider dtype, and each result is rounded once.

Scalars are floats or 0-dim float32/float64 tensors, which are read on their device without a
synchronization. `grad_scale` (the loss scale to divide gradients by) and `found_inf` (not zero:
leave everything unchanged) are the one-element float32 tensors that `torch.amp.GradScaler` sets.

Results are rounded to nearest, ties to even. With a `rounding_seed`, `sgd_step` and `adamw_step`
round what they write to bfloat16 and float16 *stochastically*: of the neighbors a < b of a float32
value y

    b with probability (y - a) / (b - a), else a,        so that E[rounded y] = y

Steps that rounding to nearest would lose then count on average. Values that the dtype holds stay,
bit for bit. Beyond its largest number, where b would be infinite, rounding is to nearest, as it
always is for float32 and float64. Probabilities are exact, except for float16's subnormals, where
they are multiples of 2^-21. The random bits are a function of the seed, the index of the tensor in
the lists, the output, and the index of the element in memory (modulo 2^32). They are the same in
every backend, and each call should use another seed. Source: S. Gupta et al., 2015, arXiv
1502.02551, section 3.

The kernels of Lanczos iterations work on single tensors of vectors: see `lanczos`.

Under torch.compile a call becomes the operator `torch.ops.eigenfilter.<name>`, and no graph breaks.

After a fork (`os.fork`, the workers of a DataLoader, multiprocessing's "fork") kernels and torch
use one thread in the child, because the threads of the pool do not survive a fork.

`backend` is None (choose by device), "native" (C++ or CUDA), "triton" or "reference".
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from eigenfilter.kernels import dispatch, forks
from eigenfilter.kernels.conventions import Scalar, arithmetic_dtype
from eigenfilter.kernels.dispatch import BACKENDS, Backend, select
from eigenfilter.kernels.lanczos import (
    cholesky_qr,
    gram,
    lanczos_step,
    mix_rows,
    orthogonalize,
    row_dots,
)
from eigenfilter.kernels.torch_library import operator

__all__ = [
    "BACKENDS",
    "Backend",
    "adamw_step",
    "cholesky_qr",
    "flag_nonfinite",
    "gram",
    "lanczos_step",
    "mix_rows",
    "norm",
    "orthogonalize",
    "perturb",
    "perturb_again",
    "perturb_hvp",
    "row_dots",
    "select",
    "sgd_step",
]

forks.watch()


@operator(mutates=("params", "backups"))
def perturb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    alpha: Scalar,
    *,
    adaptive: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Save the parameters and perturb them along their gradients.

        b <- x,    x <- x + alpha g / grad_scale        (adaptive: alpha x^2 g / grad_scale)

    The backup is a bit-for-bit copy, and is written even if `found_inf` leaves x unchanged.

    Args:
        params: n tensors x, perturbed in place.
        grads: n tensors g, read.
        backups: n tensors b, overwritten.
        alpha: step size: rho to ascend f, -rho to ascend -f.
        adaptive: scale the gradient by x^2, elementwise, as ASAM does.
        grad_scale: loss scale that the gradients carry, or None for 1.
        found_inf: flag; if it is not zero, x is unchanged.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError: an element is not a strided tensor of a supported dtype.
        ValueError: lists, devices, dtypes, shapes or strides differ, or tensors overlap.
        RuntimeError: the backend asked for is not available; the message says how to get it.

    Source: arXiv 2510.09034, USAM; arXiv 2102.11600, ASAM; the backup is ours.
    """
    with torch.no_grad():
        dispatch.of("params", params, backend).perturb(
            params,
            grads,
            backups,
            alpha,
            adaptive=adaptive,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
    increment_version([*params, *backups])


@operator(mutates=("params",))
def perturb_again(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    alpha: Scalar,
    backups: Sequence[Tensor] | None = None,
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Perturb the parameters along their gradients, from their present values or their backups.

        x <- x + alpha g / grad_scale        (with backups: x <- b + alpha g / grad_scale)

    Args:
        params: n tensors x, perturbed in place; with backups their present values are not read.
        grads: n tensors g, read.
        alpha: step size of the ascent.
        backups: n tensors b, read, or None.
        grad_scale: loss scale that the gradients carry, or None for 1.
        found_inf: flag; if it is not zero, x is unchanged.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb`.

    Source: the second ascent of two-step USAM, sequential or anchored.
    """
    with torch.no_grad():
        dispatch.of("params", params, backend).perturb_again(
            params, grads, alpha, backups, grad_scale=grad_scale, found_inf=found_inf
        )
    increment_version(params)


@operator(mutates=("params",))
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
    with torch.no_grad():
        dispatch.of("params", params, backend).perturb_hvp(
            params,
            grads,
            base_grads,
            backups,
            alpha,
            eps,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
    increment_version(params)


@operator(mutates=("params", "momenta"))
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    backups: Sequence[Tensor] | None = None,
    *,
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    rounding_seed: Scalar | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Restore the parameters and take one step of SGD from there.

        x <- b                                (where backups are given)
        d = g / grad_scale + wd x             (-g with maximize)
        m <- momentum m + (1 - dampening) d
        x <- x - lr m                         (Nesterov: x - lr (d + momentum m))

    Without `momenta` the step is x <- x - lr d. Momentum buffers start as zeros; torch's first step
    (m <- d) is then the call with dampening 0.

    Args:
        params: n tensors, overwritten. With backups their present values are not read.
        grads: n tensors g, read.
        momenta: n tensors m, updated, or None for no momentum.
        backups: n tensors b, read, or None: the step starts from params.
        lr: learning rate.
        momentum: decay rate of the momentum buffers, in [0, 1).
        dampening: share of the gradient that stays out of the buffers, in [0, 1].
        weight_decay: coefficient wd of the L2 penalty, at least 0.
        nesterov: whether to add the gradient to the new momentum once more.
        maximize: whether to maximize the objective.
        rounding_seed: a whole number from 0 to 2^24 - 1 rounds bfloat16 and float16 results
            stochastically, None to nearest: see `eigenfilter.kernels`. Not checked on a GPU.
        grad_scale: loss scale that the gradients carry, or None for 1.
        found_inf: flag; if it is not zero, x is restored and m stays.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb`; ValueError also for momentum or nesterov
            without momenta, and for a seed out of range.

    Source: torch.optim.SGD's convention of the heavy ball and Nesterov's method.
    """
    is_plain = isinstance(momentum, numbers.Real) and momentum == 0 and not nesterov
    if momenta is None and not is_plain:
        raise ValueError("momentum and nesterov need momenta: pass buffers, zeros at first")
    with torch.no_grad():
        dispatch.of("params", params, backend).sgd_step(
            params,
            grads,
            momenta,
            backups,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            rounding_seed=rounding_seed,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
    increment_version([*params, *(momenta or ())])


@operator(mutates=("params", "exp_avgs", "exp_avg_sqs"))
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    backups: Sequence[Tensor] | None = None,
    *,
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    step: Scalar,
    maximize: bool = False,
    rounding_seed: Scalar | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Restore the parameters and take one step of AdamW from there.

        x <- b                                (where backups are given)
        d = g / grad_scale                    (-g with maximize)
        m <- beta1 m + (1 - beta1) d
        v <- beta2 v + (1 - beta2) d^2
        x <- (1 - lr wd) x - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)

    Args:
        params: n tensors, overwritten. With backups their present values are not read.
        grads: n tensors g, read.
        exp_avgs: n tensors m, updated; zeros before the first step.
        exp_avg_sqs: n tensors v, updated; zeros before the first step.
        backups: n tensors b, read, or None: the step starts from params.
        lr: learning rate.
        beta1, beta2: decay rates of the moments, in [0, 1).
        eps: term that keeps the quotient finite, greater than 0.
        weight_decay: coefficient wd of the decoupled weight decay, at least 0.
        step: the number of this step, a whole number from 1.
        maximize: whether to maximize the objective.
        rounding_seed: a whole number from 0 to 2^24 - 1 rounds bfloat16 and float16 results
            stochastically, None to nearest: see `eigenfilter.kernels`. Not checked on a GPU.
        grad_scale: loss scale that the gradients carry, or None for 1.
        found_inf: flag; if it is not zero, x is restored, m and v stay.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb`; ValueError also for a seed out of range.

    Source: I. Loshchilov and F. Hutter, 2019, arXiv 1711.05101, in torch.optim.AdamW's convention.
    """
    with torch.no_grad():
        dispatch.of("params", params, backend).adamw_step(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            backups,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            maximize=maximize,
            rounding_seed=rounding_seed,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
    increment_version([*params, *exp_avgs, *exp_avg_sqs])


def norm(
    tensors: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
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
    _norm(tensors, out, weights=weights, grad_scale=grad_scale, backend=backend)
    return out


@operator(mutates=("out",))
def _norm(
    tensors: Sequence[Tensor],
    out: Tensor,
    *,
    weights: Sequence[Tensor] | None,
    grad_scale: Tensor | None,
    backend: str | None,
) -> None:
    dispatch.of("tensors", tensors, backend).norm(
        tensors, out, weights=weights, grad_scale=grad_scale
    )
    increment_version([out])


@operator(mutates=("found_inf",))
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
    dispatch.of("tensors", tensors, backend).flag_nonfinite(tensors, found_inf)
    increment_version([found_inf])
