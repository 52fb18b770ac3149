"""Compressed tensors of a step: 16-bit parameters with corrections, states as codes of 8 bits.

This is the reference, and what exports and imports them. Every backend has the same numbers, bit
for bit.

Master weights. A parameter p of bfloat16 or float16 with a correction c of k = 8 or 16 bits stands
for a number w with k bits more in its mantissa. Magnitudes in the order of the numbers are whole
numbers, code(p) for those of p's dtype, and |w| has the one code(p) 2^k + c, where p is w rounded
to nearest, ties away from zero. The rounding of a float32 to w errs by at most

                        bfloat16, 8 bits   bfloat16, 16 bits   float16, 8 bits   float16, 16 bits
    |w| >= 2^-14        2^-16 |w|          0                   2^-19 |w|         0
    smaller             2^-16 |w|, 2^-142  0                   2^-33             2^-41

(2^-142 below float32's least normal number; float16 with 16 bits is exact from 2^-17 on).

States. 64 elements, in the order of memory, share a scale s, their largest magnitude, and

    m = s q |q| / 127^2,  -127 <= q <= 127;      sqrt(v) = s q^2 / 255^2,  0 <= q <= 255.

The root spends the codes on small values. In a step of an optimizer m errs by at most
(254 sqrt(s |m|) + s) / 127^2 and sqrt(v) by at most (510 sqrt(s sqrt(v)) + s) / 255^2, but for
float32's roundings, and s by nothing. v > 0 has q >= 1, so that no update is divided by 0. A moment
often changes by less than a step of q: it is rounded up or down by a sequence over the steps that
takes each fraction equally often, where rounding to nearest would leave it as it is; and so is a
state of bfloat16 beside parameters of another dtype, or with corrections. A group whose largest
magnitude is not finite is NaN, and one below 2^-100 is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eigenfilter import _core
from eigenfilter.kernels.arithmetic import X, dither, dithered, square_root, write
from eigenfilter.kernels.conventions import Scalar

GROUP: int = _core.group_size
"""Elements of a state that share a scale."""

CODES = (torch.int8, torch.uint8)
"""The dtypes of first and of second moments as codes."""

_MOST = {torch.int8: 127, torch.uint8: 255}
_GOLDEN = 0x9E3779B9


def groups(t: Tensor) -> int:
    """The number of scales that the codes of a tensor have."""
    return -(-t.numel() // GROUP)


def join(param: Tensor, correction: Tensor) -> Tensor:
    """The master weights, float32, of a parameter (bfloat16 or float16) with its correction.

    A parameter that is not finite is its own master weight.
    """
    bits, is_half = 8 * correction.itemsize, param.dtype == torch.float16
    code = param.view(torch.int16).long() & 0x7FFF
    size = ((code << bits) + correction.long()).clamp(min=0)
    if is_half:
        cut = 13 - bits
        normal = ((size << cut if cut > 0 else size >> -cut) + (112 << 23)).int()
        small = size.float() * 2.0 ** -(24 + bits)
        magnitude = normal.view(torch.float32).where(size >= 1 << (10 + bits), small)
    else:
        magnitude = (size << (16 - bits)).int().view(torch.float32)
    return torch.where(param.isfinite(), magnitude.copysign(param), param.float())


def split(value: Tensor, dtype: torch.dtype, correction: torch.dtype) -> tuple[Tensor, Tensor]:
    """The parameter and the correction that stand for float32 values, rounded to nearest.

    Args:
        value: the master weights.
        dtype: the parameter's dtype, bfloat16 or float16.
        correction: that of the correction, int8 or int16.

    Returns:
        Both, like `value`. Values beyond the largest number of `dtype` become infinite.
    """
    bits, is_half = 8 * correction.itemsize, dtype == torch.float16
    infinity, nan = (0x7C00, 0x7E00) if is_half else (0x7F80, 0x7FC0)
    size = value.abs().view(torch.int32).long() & 0x7FFFFFFF
    cut = (13 if is_half else 16) - bits
    magnitude = size - (112 << 23) if is_half else size
    if cut > 0:
        magnitude = magnitude + ((1 << (cut - 1)) - 1) + (magnitude >> cut & 1) >> cut
    else:
        magnitude = magnitude << -cut
    if is_half:
        small = (value.abs().clamp(max=2.0**-14) * 2.0 ** (24 + bits)).round().long()
        magnitude = torch.where(size < 0x38800000, small, magnitude)
    code = (magnitude + (1 << (bits - 1)) >> bits).clamp(max=infinity)
    rest = torch.where(code < infinity, magnitude - (code << bits), 0)
    code = torch.where(value.isnan(), nan, code) | torch.where(value.signbit(), -0x8000, 0)
    return code.to(torch.int16).view(dtype), rest.to(correction)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The state, float32, that codes (int8 or uint8) of groups with these scales stand for."""
    most = _MOST[codes.dtype]
    q = _in_memory(codes).float()
    scale = scales.repeat_interleave(GROUP)[: q.numel()]
    value = q * q.abs() * (1 / most**2) * scale
    return _like(value if codes.dtype == torch.int8 else value * value, codes)


def encode(value: Tensor, codes: torch.dtype, step: int | None = None) -> tuple[Tensor, Tensor]:
    """The codes and the scales of a state, float32.

    Args:
        value: the state, dense.
        codes: int8 for a first moment, uint8 for a second one, which is not negative.
        step: the number of the step, for a state that changes by little in each: it is rounded up
            or down. None rounds to nearest.

    Returns:
        Codes like `value`, and float32 scales [groups].
    """
    most, is_root = _MOST[codes], codes == torch.uint8
    flat = _in_memory(value)
    size = square_root(flat) if is_root else flat.abs()
    size = F.pad(size, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    largest = size.amax(1)
    scale = torch.where(largest.isfinite(), largest, torch.nan)
    scale = torch.where(scale < 2.0**-100, 0.0, scale)
    # A number divided by a tensor would be its reciprocal times the number.
    factor = torch.where(scale > 0, torch.full_like(scale, most**2) / scale, 0.0)
    root = square_root(size * factor[:, None]).flatten()[: flat.numel()]
    root = torch.where(root < most, root, float(most))
    whole = root.round() if step is None else (root + _words_of(flat, step) * 2.0**-16).floor()
    signed = torch.where(flat < 0, -whole, whole)
    q = torch.where(flat > 0, whole.clamp(min=1), whole) if is_root else signed
    return _like(q.to(codes), value), scale


def read(state: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A state in the arithmetic's dtype, in memory of its own."""
    return state.to(dtype, copy=True) if scales is None else decode(state, scales)


@dataclass(frozen=True, slots=True)
class Lists:
    """The compressed tensors of one parameter's step, for the references.

    Attributes:
        param: the parameter, which is written.
        correction: its correction, or None.
        seed: the seed of the step, or None.
        tensor: index of the parameter in the lists.
        found_inf: the flag of the step, or None.
    """

    param: Tensor
    correction: Tensor | None
    seed: Scalar | None
    tensor: int
    found_inf: Tensor | None

    def start(self, backup: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Restore the parameter; return what the step starts from."""
        if backup is not None:
            self.param.copy_(backup)
        if self.correction is None:
            return self.param.to(dtype)
        return join(self.param, self.correction)

    def write(self, x: Tensor) -> None:
        """Write the parameter's result, and its correction."""
        if self.correction is None:
            write(self.param, self._dithered(x, self.param, X), self.found_inf)
            return
        param, correction = split(x, self.param.dtype, self.correction.dtype)
        write(self.param, param, self.found_inf)
        write(self.correction, correction, self.found_inf)

    def write_state(
        self, value: Tensor, state: Tensor, scales: Tensor | None, output: int, step: int
    ) -> Tensor:
        """Write a state's result; return it as it is when it is read again, flag or not."""
        if scales is None:
            if self._rounds_by_steps(state):
                words = _like(_words_of(_in_memory(state), step), state)
                value = dither(value, state.dtype, words)
            stored = self._dithered(value, state, output).to(state.dtype)
            write(state, stored, self.found_inf)
            return stored.to(value.dtype)
        codes, new_scales = encode(value, state.dtype, step)
        write(state, codes, self.found_inf)
        write(scales, new_scales, self.found_inf)
        return decode(codes, new_scales)

    def _rounds_by_steps(self, state: Tensor) -> bool:
        is_compressed = self.correction is not None or state.dtype != self.param.dtype
        return is_compressed and state.dtype == torch.bfloat16 and self._seed() is None

    def _seed(self) -> Scalar | None:
        return self.seed if self.param.itemsize == 2 else None

    def _dithered(self, value: Tensor, like: Tensor, output: int) -> Tensor:
        return dithered(value, like, self._seed(), self.tensor, output)


def item(tensors: Sequence[Tensor] | None, i: int) -> Tensor | None:
    """The i-th tensor of a list, or None if there is no list."""
    return None if tensors is None else tensors[i]


def _words_of(flat: Tensor, step: int) -> Tensor:
    """The words of a sequence of steps for each element, whole numbers of 16 bits."""
    index = torch.arange(flat.numel(), device=flat.device)
    return ((index + step) * _GOLDEN & 0xFFFFFFFF) >> 16


def _in_memory(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return t.as_strided((t.numel(),), (1,))


def _like(flat: Tensor, model: Tensor) -> Tensor:
    """Elements in the order of memory, with the shape and the strides of a dense tensor."""
    return flat.as_strided(model.shape, model.stride())
