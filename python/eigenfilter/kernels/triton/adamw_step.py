"""`kernels.adamw_step` in Triton."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from types import SimpleNamespace

import triton
import triton.language as tl
from torch import Tensor

from eigenfilter.kernels.conventions import Table
from eigenfilter.kernels.triton.compression import (
    decoded,
    joined,
    read_corrections,
    read_scales,
    turn_of,
    write_params,
    write_state,
)
from eigenfilter.kernels.triton.device import (
    GROUP,
    address,
    chunk,
    divide,
    for_each_block,
    inverse,
    is_set,
    load,
    power,
    real,
    square_root,
)
from eigenfilter.kernels.triton.launch import dtype_of, is_stochastic, launch, rounds_by_steps
from eigenfilter.kernels.triton.rounding import M, V, noise_of


@triton.jit
def _ahead(alpha, e, b1, b2, t, REAL: tl.constexpr):
    """Factors of m in (lr + e) u and in e (u before), and that of the root of v before."""
    ahead = (alpha + e) / (1.0 - power(b1, t))
    back = tl.where(t > 1.0, e / (1.0 - power(b1, t - 1.0)), 0.0)
    root_before = 1.0 / square_root(1.0 - power(b2, t - 1.0))
    return ahead.to(REAL), back.to(REAL), root_before.to(REAL)


@triton.jit
def _adamw_step_block(at, rule, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, m_at, v_at, from_at, c_at, m_scales_at, v_scales_at = at
    S, beta1, keep1, beta2, keep2, decay, size, root, eps, how, factors, is_ahead = rule
    p = load(from_at, start, length, BLOCK, WIDE)
    c = read_corrections(c_at, start, length, BLOCK, WIDE)
    stored_m = load(m_at, start, length, BLOCK, WIDE)
    stored_v = load(v_at, start, length, BLOCK, WIDE)
    m_scales = read_scales(m_scales_at, start, length, BLOCK)
    v_scales = read_scales(v_scales_at, start, length, BLOCK)
    old_m = decoded(stored_m, m_scales, BLOCK).to(S.dtype)
    old_v = decoded(stored_v, v_scales, BLOCK).to(S.dtype)
    d = S * load(g_at, start, length, BLOCK, WIDE).to(S.dtype)
    m = beta1 * old_m + keep1 * d
    v = beta2 * old_v + keep2 * (d * d)
    x = decay * joined(p, c).to(S.dtype)
    straight = x - divide(size * m, square_root(v) * root + eps)
    m = write_state(m_at, m_scales_at, stored_m, m_scales, m, how, start, length, M, BLOCK, WIDE)
    v = write_state(v_at, v_scales_at, stored_v, v_scales, v, how, start, length, V, BLOCK, WIDE)
    if factors is None:
        x = straight
    else:
        ahead, back, root_before = factors
        change = divide(ahead * m.to(S.dtype), square_root(v.to(S.dtype)) * root + eps)
        if back != 0:
            root_v = square_root(old_v) * root_before
            change = change - divide(back * old_m, root_v + eps)
        x = x - change
        if is_ahead is not None:
            x = tl.where(is_ahead, x, straight)
    write_params(x_at, c_at, p, c, x, how, start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n", "origin"])
def adamw_step_kernel(
    pointers,
    chunks,
    n,
    origin,
    sign: tl.float64,
    lr: tl.float64,
    lr_at,
    beta1: tl.float64,
    beta1_at,
    beta2: tl.float64,
    beta2_at,
    eps: tl.float64,
    eps_at,
    weight_decay: tl.float64,
    weight_decay_at,
    extrapolation: tl.float64,
    extrapolation_at,
    step: tl.float64,
    step_at,
    rounding_seed: tl.float64,
    rounding_seed_at,
    grad_scale,
    found_inf,
    STOCHASTIC: tl.constexpr,
    AHEAD: tl.constexpr,
    CORRECTION: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SCALE: tl.constexpr,
    TURNS: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- b; d = +-S g; m <- beta1 m + (1 - beta1) d; v <- beta2 v + (1 - beta2) d^2;

    x <- (1 - lr wd) x - lr u with u = m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps).

    With an extrapolation e: - lr u - e (u - u before), of m and v as they are stored.
    """
    tensor, first, length, wide = chunk(chunks)
    x_at = address(pointers, tensor, first, DTYPE)
    g_at = address(pointers, tensor + n, first, GRAD)
    m_at = address(pointers, tensor + 2 * n, first, FIRST)
    v_at = address(pointers, tensor + 3 * n, first, SECOND)
    from_at = address(pointers, tensor + origin * n, first, DTYPE)
    c_index = tensor + (4 + (origin > 0)) * n
    scales_index = c_index if CORRECTION is None else c_index + n
    at = (
        x_at,
        g_at,
        m_at,
        v_at,
        from_at,
        None if CORRECTION is None else address(pointers, c_index, first, CORRECTION),
        None if SCALE is None else address(pointers, scales_index, first // GROUP, SCALE),
        None if SCALE is None else address(pointers, scales_index + n, first // GROUP, SCALE),
    )
    S = sign * inverse(grad_scale)
    alpha, t = real(lr, lr_at), real(step, step_at)
    b1, b2 = real(beta1, beta1_at), real(beta2, beta2_at)
    decay = 1.0 - alpha * real(weight_decay, weight_decay_at)
    size = alpha / (1.0 - power(b1, t))
    root = 1.0 / square_root(1.0 - power(b2, t))
    seed = real(rounding_seed, rounding_seed_at)
    e = real(extrapolation, extrapolation_at)
    rule = (
        S.to(REAL),
        b1.to(REAL),
        (1.0 - b1).to(REAL),
        b2.to(REAL),
        (1.0 - b2).to(REAL),
        decay.to(REAL),
        size.to(REAL),
        root.to(REAL),
        real(eps, eps_at).to(REAL),
        (
            is_set(found_inf),
            noise_of(seed, tensor, first) if STOCHASTIC else None,
            turn_of(t, first) if TURNS else None,
        ),
        _ahead(alpha, e, b1, b2, t, REAL) if AHEAD else None,
        None if extrapolation_at is None else e != 0,
    )
    for_each_block(_adamw_step_block, at, rule, length, wide, BLOCK)


def run(table: Table, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.adamw_step`."""
    launch(
        adamw_step_kernel,
        table,
        call,
        origin=0 if call.backups is None else 4,
        sign=-1.0 if call.maximize else 1.0,
        STOCHASTIC=is_stochastic(call),
        AHEAD=isinstance(call.extrapolation, Tensor) or call.extrapolation != 0,
        CORRECTION=dtype_of(call.corrections),
        FIRST=dtype_of(call.exp_avgs),
        SECOND=dtype_of(call.exp_avg_sqs),
        SCALE=dtype_of(call.exp_avg_scales),
        TURNS=rounds_by_steps(call.exp_avgs, call),
    )
