"""The step of AdamW.

The body is the reference. x: parameter; g: gradient; b: backup of x; m, v: first and second moment;
u: the update that follows from them; e: extrapolation; S = 1 / grad_scale; T: dtype of the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eigenfilter.kernels._op import op
from eigenfilter.kernels.arithmetic import M, V, inverse, power, real, square_root
from eigenfilter.kernels.compression import Lists, item, read
from eigenfilter.kernels.conventions import Scalar, arithmetic_dtype


@op
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    backups: Sequence[Tensor] | None = None,
    corrections: Sequence[Tensor] | None = None,
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    *,
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    extrapolation: Scalar = 0.0,
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
        u = m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)
        x <- (1 - lr wd) x - lr u             (with an extrapolation e: - lr u - e (u - u before))

    Parameters that hold y = x - e u, where x is the iterate, thus hold the next y afterwards: the
    gradient is taken there, and the decay acts there. With an extrapolation u is that of m and v as
    they are stored, with step - 1 for those before, so that x = y + e u can be had back; u is 0
    before step 1.

    Args:
        params: n tensors, overwritten. With backups their present values are not read.
        grads: n tensors g, read.
        exp_avgs: n tensors m, updated; zeros before the first step.
        exp_avg_sqs: n tensors v, updated; zeros before the first step.
        backups: n tensors b, read, or None: the step starts from params.
        corrections: n tensors of int8 or int16, updated, or None: see `sgd_step`.
        exp_avg_scales, exp_avg_sq_scales: n float32 tensors [ceil(numel / 64)] each, updated, where
            the moments are codes: int8 m and uint8 v. Zeros before the first step. None for moments
            of float32, bfloat16 or the parameters' dtype.
        lr: learning rate.
        beta1, beta2: decay rates of the moments, in [0, 1).
        eps: term that keeps the quotient finite, greater than 0.
        weight_decay: coefficient wd of the decoupled weight decay, at least 0.
        extrapolation: how far e along -u the parameters lie ahead of the iterate.
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
        lists = Lists(p, item(corrections, i), rounding_seed, i, found_inf)
        x = lists.start(item(backups, i), T)
        S = inverse(grad_scale, p)
        d = (-S if maximize else S).to(T) * g.to(T)
        b1, b2, a = real(beta1, p), real(beta2, p), real(lr, p)
        betas, count = (b1, b2), int(step)
        scales = item(exp_avg_scales, i), item(exp_avg_sq_scales, i)
        before = read(exp_avgs[i], scales[0], T), read(exp_avg_sqs[i], scales[1], T)
        m = b1.to(T) * before[0] + (1 - b1).to(T) * d
        v = b2.to(T) * before[1] + (1 - b2).to(T) * (d * d)
        decay = (1 - a * real(weight_decay, p)).to(T)
        change = _update(m, v, a, betas, eps, count)
        m = lists.write_state(m, exp_avgs[i], scales[0], M, count)
        v = lists.write_state(v, exp_avg_sqs[i], scales[1], V, count)
        e = real(extrapolation, p)
        if e != 0:
            change = _update(m, v, a + e, betas, eps, count)
            if count > 1:
                change = change - _update(*before, e, betas, eps, count - 1)
        lists.write(decay * x - change)


def _update(
    m: Tensor, v: Tensor, factor: Tensor, betas: tuple[Tensor, Tensor], eps: Scalar, step: int
) -> Tensor:
    """`factor` times the update u that follows from the moments after `step` steps."""
    size = (factor / (1 - power(betas[0], step))).to(m.dtype)
    root = (1 / square_root(1 - power(betas[1], step))).to(m.dtype)
    return size * m / (square_root(v) * root + real(eps, m).to(m.dtype))
