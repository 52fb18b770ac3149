"""Device code that the Triton kernels over lists of tensors share, for NVIDIA and AMD GPUs.

Every kernel walks its chunk (see `tables`) in two loops. The first takes the whole blocks
without a mask, so that accesses are 16 bytes wide. The second takes the rest, or all of a tensor
that is not aligned, with a mask. Updates use smaller blocks in the second loop: with equal ones the
compiler would lay out both loops for wide accesses, at a cost in registers and shared memory.

x, g, g0, m, v, b, S and the hyperparameters are those of the references. A scalar that does not lie
on the device has None for an address, and its branch is not compiled. A table has the lists that
are given, in the order of the arguments. `origin` is the list that a step starts from: that of the
backups, or 0, the parameters.

Compile with OPTIONS: without contraction to fused multiply-adds every backend rounds alike.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from eigenfilter.kernels import compression

OPTIONS = {"enable_fp_fusion": False}

GROUP = tl.constexpr(compression.GROUP)  # blocks have whole groups: see `compression`


@triton.jit
def real(value, at):
    """A hyperparameter in float64: the host's value, or the value at an address of the device."""
    return tl.full((), value, tl.float64) if at is None else tl.load(at).to(tl.float64)


@triton.jit
def inverse(grad_scale):
    """S = 1 / grad_scale in float64; 1 without a scale."""
    return 1.0 / real(1.0, grad_scale)


# Triton's `/` and sqrt round to nearest in float64; in float32 they are approximations on a GPU.


@triton.jit
def divide(a, b):
    """The correctly rounded quotient."""
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def square_root(t):
    """The correctly rounded square root."""
    return tl.sqrt_rn(t) if t.dtype == tl.float32 else tl.sqrt(t)


@triton.jit
def power(base, exponent):
    """base^exponent for a whole exponent, by squaring: with the same roundings in every backend."""
    result = tl.full((), 1.0, tl.float64)
    n = exponent.to(tl.int64)
    while n > 0:
        result = tl.where(n % 2 == 1, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit
def is_set(found_inf):
    """Whether the flag is there and not zero."""
    return tl.full((), 0, tl.int1) if found_inf is None else tl.load(found_inf) != 0


@triton.jit
def unless(stop, old, new):
    """`new` in the dtype of `old`; or `old` where the step is skipped."""
    return tl.where(stop, old, new.to(old.dtype))


@triton.jit
def chunk(chunks):
    """This program's tensor, first element, elements, and elements to access 16 bytes at a time."""
    at = chunks + tl.program_id(0)
    row = tl.num_programs(0)
    length = tl.load(at + 2 * row).to(tl.int32)
    wide = tl.load(at + 3 * row).to(tl.int32)
    return tl.load(at), tl.load(at + row), length, wide


@triton.jit
def address(pointers, index, first, DTYPE: tl.constexpr):
    """Address of element `first` of the tensor that is entry `index` of the table."""
    return tl.load(pointers + index).to(tl.pointer_type(DTYPE)) + first


@triton.jit
def load(at, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A block from element `start` on: 16 bytes at a time if WIDE, else what is before `length`."""
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        block = tl.load(tl.multiple_of(at + start, 16) + lanes)
    else:
        block = tl.load(at + start + lanes, mask=start + lanes < length, other=0)
    return block


@triton.jit
def store(at, value, start, length, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Store a block as `load` reads it."""
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        tl.store(tl.multiple_of(at + start, 16) + lanes, value)
    else:
        tl.store(at + start + lanes, value, mask=start + lanes < length)


@triton.jit
def for_each_block(block: tl.constexpr, at, rule, length, wide, BLOCK: tl.constexpr):
    """Update a chunk by `block`: the whole blocks without a mask, the rest with one."""
    REST: tl.constexpr = BLOCK // 4 if BLOCK > 4 * GROUP else GROUP
    for start in range(0, wide, BLOCK):
        block(at, rule, start, length, BLOCK, True)
    for start in range(wide, length, REST):
        block(at, rule, start, length, REST, False)
