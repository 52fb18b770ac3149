"""Triton device code, for NVIDIA and AMD GPUs: the kernels without their launchers.

Every kernel goes over its chunk (see `triton_tables`) in two loops: over the whole blocks without a
mask, so that accesses are 16 bytes wide, and over what is left, or over all of a tensor that is not
aligned, with one. Updates take smaller blocks in the second: were they equal, the compiler would
lay both loops out for wide accesses and pay for it with registers and shared memory.

x, g, m, b, S and the hyperparameters are `reference`'s. A scalar that does not lie on the device
has None for an address, and its branch is not compiled.

Compile with OPTIONS: without contraction to fused multiply-adds every room rounds alike.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

# One program sums what all others left, so it has to be fast at it.
NORM_OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}
NORM_BLOCK = 8192


@triton.jit
def _real(value, at):
    """A hyperparameter in float64: the host's value, or what lies at an address of the device."""
    return tl.full((), value, tl.float64) if at is None else tl.load(at).to(tl.float64)


@triton.jit
def _inverse(grad_scale):
    return 1.0 / _real(1.0, grad_scale)


@triton.jit
def _is_set(found_inf):
    return tl.full((), 0, tl.int1) if found_inf is None else tl.load(found_inf) != 0


@triton.jit
def _unless(stop, old, new):
    """`new` in the dtype of `old`; or `old`, where there is to be no step."""
    return tl.where(stop, old, new.to(old.dtype))


@triton.jit
def _chunk(chunks):
    """This program's tensor, first element, elements, and elements to access 16 bytes at a time."""
    at = chunks + tl.program_id(0)
    row = tl.num_programs(0)
    length = tl.load(at + 2 * row).to(tl.int32)
    wide = tl.load(at + 3 * row).to(tl.int32)
    return tl.load(at), tl.load(at + row), length, wide


@triton.jit
def _address(pointers, index, first, DTYPE: tl.constexpr):
    """Address of element `first` of the tensor that is entry `index` of the table."""
    return tl.load(pointers + index).to(tl.pointer_type(DTYPE)) + first


@triton.jit
def _load(at, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        block = tl.load(tl.multiple_of(at + start, 16) + lanes)
    else:
        block = tl.load(at + start + lanes, mask=start + lanes < length, other=0.0)
    return block


@triton.jit
def _store(at, value, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        tl.store(tl.multiple_of(at + start, 16) + lanes, value)
    else:
        tl.store(at + start + lanes, value, mask=start + lanes < length)


@triton.jit
def _ascend_block(at, step, stop, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, b_at = at
    x = _load(x_at, start, length, BLOCK, WIDE)
    g = _load(g_at, start, length, BLOCK, WIDE).to(step.dtype)
    _store(b_at, x, start, length, BLOCK, WIDE)
    _store(x_at, _unless(stop, x, x.to(step.dtype) + step * g), start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n"])
def ascend_kernel(
    pointers,
    chunks,
    n,
    alpha: tl.float64,
    alpha_at,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """b <- x; x <- x + alpha S g."""
    tensor, first, length, wide = _chunk(chunks)
    x_at = _address(pointers, tensor, first, DTYPE)
    g_at = _address(pointers, tensor + n, first, DTYPE)
    b_at = _address(pointers, tensor + 2 * n, first, DTYPE)
    at = (x_at, g_at, b_at)
    step = (_real(alpha, alpha_at) * _inverse(grad_scale)).to(REAL)
    stop = _is_set(found_inf)
    for start in range(0, wide, BLOCK):
        _ascend_block(at, step, stop, start, length, BLOCK, True)
    for start in range(wide, length, BLOCK // 4):
        _ascend_block(at, step, stop, start, length, BLOCK // 4, False)


@triton.jit
def _descend_block(
    at,
    rule,
    stop,
    start,
    length,
    MOMENTA: tl.constexpr,
    NESTEROV: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    x_at, g_at, m_at, from_at = at
    S, alpha, beta, keep, wd = rule
    p = _load(from_at, start, length, BLOCK, WIDE)
    x = p.to(REAL)
    d = S * _load(g_at, start, length, BLOCK, WIDE).to(REAL)
    if wd != 0:
        d = d + wd * x
    u = d
    if MOMENTA:
        old = _load(m_at, start, length, BLOCK, WIDE)
        m = beta * old.to(REAL) + keep * d
        u = d + beta * m if NESTEROV else m
        _store(m_at, _unless(stop, old, m), start, length, BLOCK, WIDE)
    _store(x_at, _unless(stop, p, x - alpha * u), start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n"])
def descend_kernel(
    pointers,
    chunks,
    n,
    lr: tl.float64,
    lr_at,
    momentum: tl.float64,
    momentum_at,
    dampening: tl.float64,
    dampening_at,
    weight_decay: tl.float64,
    weight_decay_at,
    grad_scale,
    found_inf,
    MOMENTA: tl.constexpr,
    BACKUPS: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- b; d = +-S g + wd x; m <- beta m + (1 - tau) d; x <- x - lr m (Nesterov: d + beta m)."""
    tensor, first, length, wide = _chunk(chunks)
    x_at = _address(pointers, tensor, first, DTYPE)
    g_at = _address(pointers, tensor + n, first, DTYPE)
    m_at = _address(pointers, tensor + 2 * n, first, DTYPE) if MOMENTA else x_at
    from_at = _address(pointers, tensor + (2 + MOMENTA) * n, first, DTYPE) if BACKUPS else x_at
    at = (x_at, g_at, m_at, from_at)
    S = -_inverse(grad_scale) if MAXIMIZE else _inverse(grad_scale)
    keep = 1.0 - _real(dampening, dampening_at)
    rule = (
        S.to(REAL),
        _real(lr, lr_at).to(REAL),
        _real(momentum, momentum_at).to(REAL),
        keep.to(REAL),
        _real(weight_decay, weight_decay_at).to(REAL),
    )
    stop = _is_set(found_inf)
    for start in range(0, wide, BLOCK):
        _descend_block(at, rule, stop, start, length, MOMENTA, NESTEROV, REAL, BLOCK, True)
    for start in range(wide, length, BLOCK // 4):
        _descend_block(at, rule, stop, start, length, MOMENTA, NESTEROV, REAL, BLOCK // 4, False)


@triton.jit
def sum_squares_kernel(
    pointers, chunks, sums, DTYPE: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr
):
    """sums[program] <- sum of squares, in an order that alignment does not change."""
    tensor, first, length, wide = _chunk(chunks)
    at = _address(pointers, tensor, first, DTYPE)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, wide, BLOCK):
        t = _load(at, start, length, BLOCK, True).to(tl.float64)
        total += t * t
    for start in range(wide, length, BLOCK):
        t = _load(at, start, length, BLOCK, False).to(tl.float64)
        total += t * t
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def norm_kernel(sums, count, out, grad_scale, BLOCK: tl.constexpr):
    """out <- S sqrt(sum of `count` sums); one program, hence one order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        total += _load(sums, start, count, BLOCK, False)
    norm = tl.sqrt(tl.sum(total, axis=0)) * _inverse(grad_scale)
    tl.store(out, norm.to(out.dtype.element_ty))


@triton.jit
def flag_nonfinite_kernel(
    pointers, chunks, found_inf, DTYPE: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr
):
    """found_inf <- 1 if an element is inf or NaN."""
    tensor, first, length, wide = _chunk(chunks)
    at = _address(pointers, tensor, first, DTYPE)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, wide, BLOCK):
        t = _load(at, start, length, BLOCK, True).to(REAL)
        bad |= tl.where(tl.abs(t) < float("inf"), 0, 1)
    for start in range(wide, length, BLOCK):
        t = _load(at, start, length, BLOCK, False).to(REAL)
        bad |= tl.where(tl.abs(t) < float("inf"), 0, 1)
    if tl.max(bad, axis=0) != 0:
        tl.store(found_inf, 1.0)
