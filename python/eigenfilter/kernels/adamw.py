"""The step of AdamW.

The body is the reference. x: parameter; g: gradient; b: backup of x; m, v: first and second moment;
S = 1 / grad_scale; T: dtype of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eigenfilter.kernels._op import op
from eigenfilter.kernels.arithmetic import (
    M,
    V,
    X,
    dithered,
    inverse,
    power,
    real,
    square_root,
    write,
)
from eigenfilter.kernels.conventions import Scalar, arithmetic_dtype


@op
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
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        T = arithmetic_dtype(p.dtype, g.dtype)
        if backups is not None:
            p.copy_(backups[i])
        S = inverse(grad_scale, p)
        d = (-S if maximize else S).to(T) * g.to(T)
        b1, b2, a = real(beta1, p), real(beta2, p), real(lr, p)
        m = b1.to(T) * exp_avgs[i].to(T) + (1 - b1).to(T) * d
        v = b2.to(T) * exp_avg_sqs[i].to(T) + (1 - b2).to(T) * (d * d)
        size = (a / (1 - power(b1, step))).to(T)
        root = (1 / square_root(1 - power(b2, step))).to(T)
        decay = (1 - a * real(weight_decay, p)).to(T)
        denominator = square_root(v) * root + real(eps, p).to(T)
        x = decay * p.to(T) - size * m / denominator
        for output, target, value in ((M, exp_avgs[i], m), (V, exp_avg_sqs[i], v), (X, p, x)):
            write(target, dithered(value, target, rounding_seed, i, output), found_inf)
