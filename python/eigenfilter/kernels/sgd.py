"""The step of SGD: gradient descent, heavy ball, Nesterov.

The body is the reference. x: parameter; g: gradient; b: backup of x; m: momentum buffer; beta:
momentum; tau: dampening; wd: weight decay; e: extrapolation; S = 1 / grad_scale; T: dtype of the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eigenfilter.kernels._op import op
from eigenfilter.kernels.arithmetic import M, inverse, real
from eigenfilter.kernels.compression import Lists, item, read
from eigenfilter.kernels.conventions import Scalar, arithmetic_dtype


@op
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    backups: Sequence[Tensor] | None = None,
    corrections: Sequence[Tensor] | None = None,
    momentum_scales: Sequence[Tensor] | None = None,
    *,
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    extrapolation: Scalar = 0.0,
    step: Scalar = 1.0,
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
        x <- x - e (m - m before)             (with an extrapolation e)

    Parameters that hold y = x - e m, where x is the iterate, thus hold the next y afterwards: the
    gradient is taken there, at heavy ball's price. The last line uses m as it is stored, so that
    x = y + e m can be had back.

    Without `momenta` the step is x <- x - lr d. Momentum buffers start as zeros; torch's first step
    (m <- d) is then the call with dampening 0.

    Args:
        params: n tensors, overwritten. With backups their present values are not read.
        grads: n tensors g, read.
        momenta: n tensors m, updated, or None for no momentum.
        backups: n tensors b, read, or None: the step starts from params.
        corrections: n tensors of int8 or int16, updated: bfloat16 or float16 parameters stand with
            them for master weights, from which the step starts; b are the parameters' 16 bits. None
            for parameters alone. See `eigenfilter.kernels.compression`.
        momentum_scales: n float32 tensors [ceil(numel / 64)], updated, where the momenta are codes
            (int8); zeros before the first step. None for momenta of float32, bfloat16 or the
            parameters' dtype.
        lr: learning rate.
        momentum: decay rate of the momentum buffers, in [0, 1).
        dampening: share of the gradient that stays out of the buffers, in [0, 1].
        weight_decay: coefficient wd of the L2 penalty, at least 0.
        extrapolation: how far e along -m the parameters lie ahead of the iterate.
        step: the number of this step, a whole number from 1. Momenta that are codes, or bfloat16
            beside corrections or parameters of another dtype, are rounded up or down by it; it has
            to differ from step to step.
        nesterov: whether to add the gradient to the new momentum once more.
        maximize: whether to maximize the objective.
        rounding_seed: a whole number from 0 to 2^24 - 1 rounds bfloat16 and float16 results
            stochastically, None to nearest: see `eigenfilter.kernels`. Not checked on a GPU.
        grad_scale: loss scale that the gradients carry, or None for 1.
        found_inf: flag; if it is not zero, x is restored and m stays.
        backend: see `eigenfilter.kernels`.

    Raises:
        TypeError, ValueError, RuntimeError: as `perturb`; ValueError also for momentum, nesterov
            or extrapolation without momenta, and for a seed out of range.

    Source: torch.optim.SGD's convention of the heavy ball and Nesterov's method.
    """
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        T = arithmetic_dtype(p.dtype, g.dtype)
        lists = Lists(p, item(corrections, i), rounding_seed, i, found_inf)
        x = lists.start(item(backups, i), T)
        S = inverse(grad_scale, p)
        d = (-S if maximize else S).to(T) * g.to(T)
        wd = real(weight_decay, p).to(T)
        if wd != 0:
            d = d + wd * x
        u = d
        ahead = None
        if momenta is not None:
            beta = real(momentum, p).to(T)
            keep = (1 - real(dampening, p)).to(T)
            scales = item(momentum_scales, i)
            before = read(momenta[i], scales, T)
            m = beta * before + keep * d
            u = d + beta * m if nesterov else m
            m = lists.write_state(m, momenta[i], scales, M, int(step))
            e = real(extrapolation, p).to(T)
            if e != 0:
                ahead = e * (m - before)
        x = x - real(lr, p).to(T) * u
        if ahead is not None:
            x = x - ahead
        lists.write(x)
