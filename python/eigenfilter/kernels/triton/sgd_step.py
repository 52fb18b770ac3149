"""`kernels.sgd_step` in Triton."""

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
    for_each_block,
    inverse,
    is_set,
    load,
    real,
)
from eigenfilter.kernels.triton.launch import dtype_of, is_stochastic, launch, rounds_by_steps
from eigenfilter.kernels.triton.rounding import M, noise_of


@triton.jit
def _sgd_step_block(at, rule, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, m_at, from_at, c_at, scales_at = at
    S, alpha, beta, keep, wd, e, how, MOMENTA, NESTEROV, AHEAD = rule
    p = load(from_at, start, length, BLOCK, WIDE)
    c = read_corrections(c_at, start, length, BLOCK, WIDE)
    x = joined(p, c).to(S.dtype)
    d = S * load(g_at, start, length, BLOCK, WIDE).to(S.dtype)
    if wd != 0:
        d = d + wd * x
    if MOMENTA:
        stored = load(m_at, start, length, BLOCK, WIDE)
        scales = read_scales(scales_at, start, length, BLOCK)
        old = decoded(stored, scales, BLOCK).to(S.dtype)
        m = beta * old + keep * d
        u = d + beta * m if NESTEROV else m
        m = write_state(m_at, scales_at, stored, scales, m, how, start, length, M, BLOCK, WIDE)
        x = x - alpha * u
        if AHEAD:  # noqa: SIM102 (one condition is not decided at compile time)
            if e != 0:
                x = x - e * (m.to(S.dtype) - old)
    else:
        x = x - alpha * d
    write_params(x_at, c_at, p, c, x, how, start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n", "origin"])
def sgd_step_kernel(
    pointers,
    chunks,
    n,
    origin,
    sign: tl.float64,
    lr: tl.float64,
    lr_at,
    momentum: tl.float64,
    momentum_at,
    dampening: tl.float64,
    dampening_at,
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
    MOMENTA: tl.constexpr,
    NESTEROV: tl.constexpr,
    AHEAD: tl.constexpr,
    CORRECTION: tl.constexpr,
    STATE: tl.constexpr,
    SCALE: tl.constexpr,
    TURNS: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- b; d = +-S g + wd x; m <- beta m + (1 - tau) d; x <- x - lr m (Nesterov: d + beta m).

    With an extrapolation e last x <- x - e (m - m before).
    """
    tensor, first, length, wide = chunk(chunks)
    x_at = address(pointers, tensor, first, DTYPE)
    g_at = address(pointers, tensor + n, first, GRAD)
    m_at = address(pointers, tensor + 2 * n, first, STATE) if MOMENTA else x_at
    from_at = address(pointers, tensor + origin * n, first, DTYPE)
    c_index = tensor + (2 + MOMENTA + (origin > 0)) * n
    scales_index = c_index if CORRECTION is None else c_index + n
    at = (
        x_at,
        g_at,
        m_at,
        from_at,
        None if CORRECTION is None else address(pointers, c_index, first, CORRECTION),
        None if SCALE is None else address(pointers, scales_index, first // GROUP, SCALE),
    )
    S = sign * inverse(grad_scale)
    keep = 1.0 - real(dampening, dampening_at)
    seed = real(rounding_seed, rounding_seed_at)
    rule = (
        S.to(REAL),
        real(lr, lr_at).to(REAL),
        real(momentum, momentum_at).to(REAL),
        keep.to(REAL),
        real(weight_decay, weight_decay_at).to(REAL),
        real(extrapolation, extrapolation_at).to(REAL),
        (
            is_set(found_inf),
            noise_of(seed, tensor, first) if STOCHASTIC else None,
            turn_of(real(step, step_at), first) if TURNS else None,
        ),
        MOMENTA,
        NESTEROV,
        AHEAD,
    )
    for_each_block(_sgd_step_block, at, rule, length, wide, BLOCK)


def run(table: Table, call: SimpleNamespace) -> None:
    """Launch the kernel: see `eigenfilter.kernels.sgd_step`."""
    has_momenta = call.momenta is not None
    launch(
        sgd_step_kernel,
        table,
        call,
        origin=0 if call.backups is None else 2 + has_momenta,
        sign=-1.0 if call.maximize else 1.0,
        STOCHASTIC=is_stochastic(call),
        MOMENTA=has_momenta,
        NESTEROV=call.nesterov,
        AHEAD=isinstance(call.extrapolation, Tensor) or call.extrapolation != 0,
        CORRECTION=dtype_of(call.corrections),
        STATE=dtype_of(call.momenta),
        SCALE=dtype_of(call.momentum_scales),
        TURNS=rounds_by_steps(call.momenta, call),
    )
