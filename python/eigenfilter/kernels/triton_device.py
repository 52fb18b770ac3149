"""Triton device code, for NVIDIA and AMD GPUs: the kernels without their launchers.

Every kernel walks its chunk (see `triton_tables`) in two loops. The first takes the whole blocks
without a mask, so that accesses are 16 bytes wide. The second takes the rest, or all of a tensor
that is not aligned, with a mask. Updates use smaller blocks in the second loop: with equal ones the
compiler would lay out both loops for wide accesses, at a cost in registers and shared memory.

x, g, g0, m, v, b, S and the hyperparameters are `reference`'s. A scalar that does not lie on the
device has None for an address, and its branch is not compiled. `origin` is the list that a step
starts from: that of the backups, or 0, the parameters.

Compile with OPTIONS: without contraction to fused multiply-adds every backend rounds alike.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from eigenfilter.kernels.triton_rounding import M, V, X, noise_of, rounded

OPTIONS = {"enable_fp_fusion": False}

# One program adds the sums of all others, so it gets many warps.
NORM_OPTIONS = OPTIONS | {"num_warps": 16}
NORM_BLOCK = 8192

# The exponent of a scale and its negative are those of normal numbers.
MOST_EXPONENT = tl.constexpr(1022)
# Far inside of the range of float64: no square that counts in a sum between them has vanished.
LEAST_SUM = tl.constexpr(2.0**-700)
GREATEST_SUM = tl.constexpr(2.0**700)


@triton.jit
def _real(value, at):
    """A hyperparameter in float64: the host's value, or the value at an address of the device."""
    return tl.full((), value, tl.float64) if at is None else tl.load(at).to(tl.float64)


@triton.jit
def _inverse(grad_scale):
    return 1.0 / _real(1.0, grad_scale)


# Triton's `/` and sqrt round to nearest in float64; in float32 they are approximations on a GPU.


@triton.jit
def _divide(a, b):
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def _square_root(t):
    return tl.sqrt_rn(t) if t.dtype == tl.float32 else tl.sqrt(t)


@triton.jit
def _power(base, exponent):
    """base^exponent for a whole exponent, by squaring: with the same roundings in every backend."""
    result = tl.full((), 1.0, tl.float64)
    n = exponent.to(tl.int64)
    while n > 0:
        result = tl.where(n % 2 == 1, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit
def _is_set(found_inf):
    return tl.full((), 0, tl.int1) if found_inf is None else tl.load(found_inf) != 0


@triton.jit
def _unless(stop, old, new):
    """`new` in the dtype of `old`; or `old` where the step is skipped."""
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
        block = tl.load(at + start + lanes, mask=start + lanes < length, other=0)
    return block


@triton.jit
def _store(at, value, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        tl.store(tl.multiple_of(at + start, 16) + lanes, value)
    else:
        tl.store(at + start + lanes, value, mask=start + lanes < length)


@triton.jit
def _for_each_block(block: tl.constexpr, at, rule, length, wide, BLOCK: tl.constexpr):
    """Update a chunk by `block`: the whole blocks without a mask, the rest with one."""
    for start in range(0, wide, BLOCK):
        block(at, rule, start, length, BLOCK, True)
    for start in range(wide, length, BLOCK // 4):
        block(at, rule, start, length, BLOCK // 4, False)


@triton.jit
def _perturb_block(at, rule, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, b_at = at
    step, stop, ADAPTIVE = rule
    p = _load(x_at, start, length, BLOCK, WIDE)
    g = _load(g_at, start, length, BLOCK, WIDE).to(step.dtype)
    x = p.to(step.dtype)
    if ADAPTIVE:
        g = x * x * g
    _store(b_at, p, start, length, BLOCK, WIDE)
    _store(x_at, _unless(stop, p, x + step * g), start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n"])
def perturb_kernel(
    pointers,
    chunks,
    n,
    alpha: tl.float64,
    alpha_at,
    grad_scale,
    found_inf,
    ADAPTIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """b <- x; x <- x + alpha S g (adaptive: x^2 g)."""
    tensor, first, length, wide = _chunk(chunks)
    x_at = _address(pointers, tensor, first, DTYPE)
    g_at = _address(pointers, tensor + n, first, GRAD)
    b_at = _address(pointers, tensor + 2 * n, first, DTYPE)
    step = (_real(alpha, alpha_at) * _inverse(grad_scale)).to(REAL)
    rule = (step, _is_set(found_inf), ADAPTIVE)
    _for_each_block(_perturb_block, (x_at, g_at, b_at), rule, length, wide, BLOCK)


@triton.jit
def _perturb_again_block(at, step, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, from_at = at
    p = _load(from_at, start, length, BLOCK, WIDE)
    g = _load(g_at, start, length, BLOCK, WIDE).to(step.dtype)
    _store(x_at, (p.to(step.dtype) + step * g).to(p.dtype), start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n", "origin"])
def perturb_again_kernel(
    pointers,
    chunks,
    n,
    origin,
    alpha: tl.float64,
    alpha_at,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- x + alpha S g, or b + alpha S g."""
    tensor, first, length, wide = _chunk(chunks)
    x_at = _address(pointers, tensor, first, DTYPE)
    g_at = _address(pointers, tensor + n, first, GRAD)
    from_at = _address(pointers, tensor + origin * n, first, DTYPE)
    step = (_real(alpha, alpha_at) * _inverse(grad_scale)).to(REAL)
    # If x stays unchanged, nothing has to be read at all.
    if not _is_set(found_inf):
        _for_each_block(_perturb_again_block, (x_at, g_at, from_at), step, length, wide, BLOCK)


@triton.jit
def _perturb_hvp_block(at, step, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, g0_at, b_at = at
    b = _load(b_at, start, length, BLOCK, WIDE)
    g = _load(g_at, start, length, BLOCK, WIDE).to(step.dtype)
    g0 = _load(g0_at, start, length, BLOCK, WIDE).to(step.dtype)
    _store(x_at, (b.to(step.dtype) + step * (g - g0)).to(b.dtype), start, length, BLOCK, WIDE)


@triton.jit(do_not_specialize=["n"])
def perturb_hvp_kernel(
    pointers,
    chunks,
    n,
    alpha: tl.float64,
    alpha_at,
    eps: tl.float64,
    eps_at,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- b + alpha h with h = S (g - g0) / eps."""
    tensor, first, length, wide = _chunk(chunks)
    x_at = _address(pointers, tensor, first, DTYPE)
    g_at = _address(pointers, tensor + n, first, GRAD)
    g0_at = _address(pointers, tensor + 2 * n, first, GRAD)
    b_at = _address(pointers, tensor + 3 * n, first, DTYPE)
    step = (_real(alpha, alpha_at) * _inverse(grad_scale) / _real(eps, eps_at)).to(REAL)
    if not _is_set(found_inf):
        _for_each_block(_perturb_hvp_block, (x_at, g_at, g0_at, b_at), step, length, wide, BLOCK)


@triton.jit
def _sgd_step_block(at, rule, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, m_at, from_at = at
    S, alpha, beta, keep, wd, stop, noise, MOMENTA, NESTEROV = rule
    p = _load(from_at, start, length, BLOCK, WIDE)
    x = p.to(S.dtype)
    d = S * _load(g_at, start, length, BLOCK, WIDE).to(S.dtype)
    if wd != 0:
        d = d + wd * x
    u = d
    if MOMENTA:
        old = _load(m_at, start, length, BLOCK, WIDE)
        m = beta * old.to(S.dtype) + keep * d
        u = d + beta * m if NESTEROV else m
        m = rounded(m, noise, M, old, start, BLOCK)
        _store(m_at, _unless(stop, old, m), start, length, BLOCK, WIDE)
    x = rounded(x - alpha * u, noise, X, p, start, BLOCK)
    _store(x_at, _unless(stop, p, x), start, length, BLOCK, WIDE)


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
    rounding_seed: tl.float64,
    rounding_seed_at,
    grad_scale,
    found_inf,
    STOCHASTIC: tl.constexpr,
    MOMENTA: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- b; d = +-S g + wd x; m <- beta m + (1 - tau) d; x <- x - lr m (Nesterov: d + beta m)."""
    tensor, first, length, wide = _chunk(chunks)
    x_at = _address(pointers, tensor, first, DTYPE)
    g_at = _address(pointers, tensor + n, first, GRAD)
    m_at = _address(pointers, tensor + 2 * n, first, DTYPE) if MOMENTA else x_at
    from_at = _address(pointers, tensor + origin * n, first, DTYPE)
    S = sign * _inverse(grad_scale)
    keep = 1.0 - _real(dampening, dampening_at)
    seed = _real(rounding_seed, rounding_seed_at)
    rule = (
        S.to(REAL),
        _real(lr, lr_at).to(REAL),
        _real(momentum, momentum_at).to(REAL),
        keep.to(REAL),
        _real(weight_decay, weight_decay_at).to(REAL),
        _is_set(found_inf),
        noise_of(seed, tensor, first) if STOCHASTIC else None,
        MOMENTA,
        NESTEROV,
    )
    _for_each_block(_sgd_step_block, (x_at, g_at, m_at, from_at), rule, length, wide, BLOCK)


@triton.jit
def _adamw_step_block(at, rule, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    x_at, g_at, m_at, v_at, from_at = at
    S, beta1, keep1, beta2, keep2, decay, size, root, eps, stop, noise = rule
    p = _load(from_at, start, length, BLOCK, WIDE)
    old_m = _load(m_at, start, length, BLOCK, WIDE)
    old_v = _load(v_at, start, length, BLOCK, WIDE)
    d = S * _load(g_at, start, length, BLOCK, WIDE).to(S.dtype)
    m = beta1 * old_m.to(S.dtype) + keep1 * d
    v = beta2 * old_v.to(S.dtype) + keep2 * (d * d)
    x = decay * p.to(S.dtype) - _divide(size * m, _square_root(v) * root + eps)
    m = rounded(m, noise, M, old_m, start, BLOCK)
    v = rounded(v, noise, V, old_v, start, BLOCK)
    x = rounded(x, noise, X, p, start, BLOCK)
    _store(m_at, _unless(stop, old_m, m), start, length, BLOCK, WIDE)
    _store(v_at, _unless(stop, old_v, v), start, length, BLOCK, WIDE)
    _store(x_at, _unless(stop, p, x), start, length, BLOCK, WIDE)


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
    step: tl.float64,
    step_at,
    rounding_seed: tl.float64,
    rounding_seed_at,
    grad_scale,
    found_inf,
    STOCHASTIC: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- b; d = +-S g; m <- beta1 m + (1 - beta1) d; v <- beta2 v + (1 - beta2) d^2;

    x <- (1 - lr wd) x - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps).
    """
    tensor, first, length, wide = _chunk(chunks)
    x_at = _address(pointers, tensor, first, DTYPE)
    g_at = _address(pointers, tensor + n, first, GRAD)
    m_at = _address(pointers, tensor + 2 * n, first, DTYPE)
    v_at = _address(pointers, tensor + 3 * n, first, DTYPE)
    from_at = _address(pointers, tensor + origin * n, first, DTYPE)
    S = sign * _inverse(grad_scale)
    alpha, t = _real(lr, lr_at), _real(step, step_at)
    b1, b2 = _real(beta1, beta1_at), _real(beta2, beta2_at)
    decay = 1.0 - alpha * _real(weight_decay, weight_decay_at)
    size = alpha / (1.0 - _power(b1, t))
    root = 1.0 / _square_root(1.0 - _power(b2, t))
    seed = _real(rounding_seed, rounding_seed_at)
    rule = (
        S.to(REAL),
        b1.to(REAL),
        (1.0 - b1).to(REAL),
        b2.to(REAL),
        (1.0 - b2).to(REAL),
        decay.to(REAL),
        size.to(REAL),
        root.to(REAL),
        _real(eps, eps_at).to(REAL),
        _is_set(found_inf),
        noise_of(seed, tensor, first) if STOCHASTIC else None,
    )
    _for_each_block(_adamw_step_block, (x_at, g_at, m_at, v_at, from_at), rule, length, wide, BLOCK)


@triton.jit
def _power_of_two(exponent):
    """2^exponent in float64, for the exponent of a normal number."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _exponent_of(value):
    """That of the greatest power of two that value > 0 reaches, as far as a scale may have it."""
    exponent = (value.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1023
    return tl.minimum(tl.maximum(exponent, -MOST_EXPONENT), MOST_EXPONENT)


@triton.jit
def _values(t_at, w_at, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Elements of t in float64, or of w t if there are weights."""
    t = _load(t_at, start, length, BLOCK, WIDE).to(tl.float64)
    if w_at is not None:
        t = _load(w_at, start, length, BLOCK, WIDE).to(tl.float64) * t
    return t


@triton.jit
def _sum_squares(t_at, w_at, scale, length, wide, BLOCK: tl.constexpr):
    """Sum of (scale w t)^2 over a chunk; without a scale it is 1."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, wide, BLOCK):
        t = _values(t_at, w_at, start, length, BLOCK, True)
        t = t if scale is None else t * scale
        total += t * t
    for start in range(wide, length, BLOCK):
        t = _values(t_at, w_at, start, length, BLOCK, False)
        t = t if scale is None else t * scale
        total += t * t
    return tl.sum(total, axis=0)


@triton.jit
def _largest(t_at, w_at, length, BLOCK: tl.constexpr):
    """Largest |w t| of a chunk."""
    largest = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, length, BLOCK):
        largest = tl.maximum(largest, tl.abs(_values(t_at, w_at, start, length, BLOCK, False)))
    return tl.max(largest, axis=0)


@triton.jit
def _in_range(total, exponent, t_at, w_at, length, BLOCK: tl.constexpr):
    """The sum of a chunk and its exponent, taken once more if its squares overflow or vanish."""
    if (total < LEAST_SUM) | (total > GREATEST_SUM):
        largest = _largest(t_at, w_at, length, BLOCK)
        if (largest > 0) & (largest < float("inf")):
            exponent = _exponent_of(largest)
            scale = _power_of_two(-exponent)
            total = _sum_squares(t_at, w_at, scale, length, 0, BLOCK)
    return total, exponent


@triton.jit(do_not_specialize=["n"])
def sum_squares_kernel(
    pointers,
    chunks,
    n,
    sums,
    exponents,
    WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[program] 4^exponents[program] <- sum of (w t)^2, in an order free of alignment.

    The exponent is 0 unless squares of float64 elements overflow or vanish. There are exponents
    where a tensor is float64.
    """
    tensor, first, length, wide = _chunk(chunks)
    t_at = _address(pointers, tensor + n if WEIGHTS else tensor, first, GRAD)
    w_at = _address(pointers, tensor, first, DTYPE) if WEIGHTS else None
    total = _sum_squares(t_at, w_at, None, length, wide, BLOCK)
    exponent = tl.full((), 0, tl.int32)
    if tl.float64 == GRAD:
        total, exponent = _in_range(total, exponent, t_at, w_at, length, BLOCK)
    tl.store(sums + tl.program_id(0), total)
    if exponents is not None:
        tl.store(exponents + tl.program_id(0), exponent)


@triton.jit(do_not_specialize=["count"])
def norm_kernel(sums, exponents, count, out, grad_scale, BLOCK: tl.constexpr):
    """out <- S sqrt(sum of `count` sums 4^exponents); one program, hence one order.

    The greatest exponent is taken out of the sum. Without exponents they are 0.
    """
    if exponents is not None:
        greatest = tl.full((BLOCK,), -MOST_EXPONENT, tl.int32)
        for start in range(0, count, BLOCK):
            exponent = _load(exponents, start, count, BLOCK, False)
            counts = _load(sums, start, count, BLOCK, False) != 0
            greatest = tl.where(counts, tl.maximum(greatest, exponent), greatest)
        most = tl.max(greatest, axis=0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        some = _load(sums, start, count, BLOCK, False)
        if exponents is not None:
            exponent = _load(exponents, start, count, BLOCK, False) - most
            scale = _power_of_two(tl.maximum(exponent, -MOST_EXPONENT))
            some = some * scale * scale
        total += some
    norm = _square_root(tl.sum(total, axis=0))
    if exponents is not None:
        norm = norm * _power_of_two(most)
    norm = norm * _inverse(grad_scale)
    tl.store(out, norm.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["n"])
def flag_nonfinite_kernel(
    pointers,
    chunks,
    n,
    found_inf,
    DTYPE: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found_inf <- 1 if an element is inf or NaN."""
    tensor, first, length, wide = _chunk(chunks)
    at = _address(pointers, tensor, first, GRAD)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, wide, BLOCK):
        t = _load(at, start, length, BLOCK, True).to(REAL)
        bad |= tl.where(tl.abs(t) < float("inf"), 0, 1)
    for start in range(wide, length, BLOCK):
        t = _load(at, start, length, BLOCK, False).to(REAL)
        bad |= tl.where(tl.abs(t) < float("inf"), 0, 1)
    if tl.max(bad, axis=0) != 0:
        tl.store(found_inf, 1.0)
