"""What compressed tensors stand for, and how far it errs: the bounds that the documentation states.

They are checked on the reference, whose bits every backend has: see test_compressed_steps.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import every_pattern, same_bits
from eigenfilter.kernels.compression import GROUP, decode, encode, groups, join, split

NARROW = (torch.bfloat16, torch.float16)
CORRECTIONS = (torch.int8, torch.int16)
ROUNDING = 2.0**-22  # of float32, in the few operations of a code

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def every_exponent() -> Tensor:
    """Float32 numbers of every exponent and of both signs, with random and with extreme digits."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(0, 2**23, (255, 60), generator=generator)
    digits[:, :6] = torch.tensor([0, 1, 2**22, 2**23 - 1, 2**15, 2**15 - 1])
    bits = (torch.arange(255)[:, None] << 23 | digits).int().view(torch.float32).flatten()
    return torch.cat([bits, -bits])


def largest(dtype: torch.dtype) -> float:
    """Numbers below are nearer to the largest number of a dtype than to the next one."""
    info = torch.finfo(dtype)
    return info.max * (1 + info.eps / 4)


def error_bound(w: Tensor, dtype: torch.dtype, correction: torch.dtype) -> Tensor:
    """The bound of the documentation on |w - master weight|."""
    w = w.double().abs()
    if dtype == torch.bfloat16:
        eight_bits = torch.maximum(w * 2.0**-16, torch.tensor(2.0**-142))
        return eight_bits if correction == torch.int8 else torch.zeros_like(w)
    if correction == torch.int8:
        return torch.where(w >= 2.0**-14, w * 2.0**-19, 2.0**-33)
    return torch.where(w >= 2.0**-17, 0.0, 2.0**-41)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_a_master_weight_errs_within_its_bound(dtype: torch.dtype, correction: torch.dtype) -> None:
    w = every_exponent()
    w = w[w.abs() < largest(dtype)]
    master = join(*split(w, dtype, correction))
    assert ((master.double() - w.double()).abs() <= error_bound(w, dtype, correction)).all()
    assert same_bits(master.signbit().byte(), w.signbit().byte())


@given(value=finite)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_any_master_weight(dtype: torch.dtype, correction: torch.dtype, value: float) -> None:
    w = torch.tensor([value])
    param, rest = split(w, dtype, correction)
    assert param.dtype == dtype
    assert rest.dtype == correction
    if w.abs() >= largest(dtype):
        assert param.isinf()
        assert rest == 0
        assert same_bits(join(param, rest), param.float())
        return
    error = (join(param, rest).double() - w.double()).abs()
    assert (error <= error_bound(w, dtype, correction)).all()
    # The parameter is a nearest one of its dtype.
    nearest = (w.to(dtype).double() - w.double()).abs()
    assert (param.double() - w.double()).abs() <= nearest + error_bound(w, dtype, correction)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_split_again_stays(dtype: torch.dtype, correction: torch.dtype) -> None:
    param, rest = split(every_exponent(), dtype, correction)
    again = split(join(param, rest), dtype, correction)
    assert same_bits(again[0], param)
    assert same_bits(again[1], rest)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_a_parameter_without_a_correction_is_its_own_master_weight(
    dtype: torch.dtype, correction: torch.dtype
) -> None:
    every = every_pattern(dtype)
    master = join(every, torch.zeros(every.shape, dtype=correction))
    assert same_bits(master[~every.isnan()], every.float()[~every.isnan()])
    assert master[every.isnan()].isnan().all()
    param, rest = split(master, dtype, correction)
    assert same_bits(param[~every.isnan()], every[~every.isnan()])
    assert not rest.any()


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("dtype", NARROW)
def test_a_correction_of_another_parameter_moves_it_by_half_a_spacing(
    dtype: torch.dtype, correction: torch.dtype
) -> None:
    """Other code may write parameters, and leave corrections that were made for others."""
    every = every_pattern(dtype)
    ends = torch.iinfo(correction)
    for rest in (ends.min, ends.max):
        master = join(every, torch.full(every.shape, rest, dtype=correction))
        assert same_bits(master[every.isinf()], every[every.isinf()].float())
        assert master[every.isfinite()].isfinite().all()
        step = torch.finfo(dtype).eps * every.double().abs()
        step = torch.maximum(step, torch.tensor(torch.finfo(dtype).smallest_normal).double())
        moved = (master.double() - every.double()).abs()
        assert (moved <= step / 2)[every.isfinite()].all()


def states(seed: int, spread: float) -> Tensor:
    """Many groups of numbers of many magnitudes, the last one of them partial."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(200 * GROUP + 17, generator=generator)
    size = torch.randn(value.numel(), generator=generator) * spread
    return value * torch.exp2((size + torch.arange(value.numel()) // GROUP - 105).clamp(-125, 120))


def scale_of(value: Tensor, scales: Tensor) -> Tensor:
    return scales.double().repeat_interleave(GROUP)[: value.numel()]


@pytest.mark.parametrize("step", [None, 1, 1000])
@pytest.mark.parametrize("spread", [0.0, 2.0, 12.0])
def test_a_first_moment_errs_within_its_bound(spread: float, step: int | None) -> None:
    m = states(0, spread)
    codes, scales = encode(m, torch.int8, step)
    s, size = scale_of(m, scales), m.double().abs()
    error = (decode(codes, scales).double() - m.double()).abs()
    bound = (2 * 127 * (s * size).sqrt() + s) / 127**2
    if step is None:  # to nearest
        bound = (127 * (s * size).sqrt() + s / 4) / 127**2
    assert (error <= bound + ROUNDING * (size + bound) + 2.0**-100).all()
    assert scales.shape == (groups(m),)
    rows = m[: GROUP * (m.numel() // GROUP)].view(-1, GROUP)
    whole = rows.abs().amax(1)
    assert same_bits(scales[: rows.shape[0]], whole.where(whole >= 2.0**-100, 0.0))


@pytest.mark.parametrize("step", [None, 1, 1000])
@pytest.mark.parametrize("spread", [0.0, 2.0, 12.0])
def test_a_second_moment_errs_within_its_bound(spread: float, step: int | None) -> None:
    v = states(1, spread).clamp(-(2.0**60), 2.0**60).square()
    codes, scales = encode(v, torch.uint8, step)
    s, root = scale_of(v, scales), v.double().sqrt()
    error = (decode(codes, scales).double().sqrt() - root).abs()
    bound = (2 * 255 * (s * root).sqrt() + s) / 255**2
    assert (error <= bound + ROUNDING * (root + bound) + 2.0**-74).all()
    kept = s > 0
    assert ((codes > 0) == (v > 0))[kept].all(), "an update would be divided by 0"


@given(
    st.lists(finite.filter(lambda x: abs(x) < 2.0**60), min_size=1, max_size=3 * GROUP),
    st.sampled_from((torch.int8, torch.uint8)),
)
def test_what_is_encoded_again_stays(values: list[float], codes_dtype: torch.dtype) -> None:
    value = torch.tensor(values, dtype=torch.float32)
    value = value.square() if codes_dtype == torch.uint8 else value
    codes, scales = encode(value, codes_dtype)
    again = encode(decode(codes, scales), codes_dtype)
    assert same_bits(again[0], codes)
    assert same_bits(again[1], scales)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_group_that_is_not_finite_is_nan_and_the_others_stay(bad: float) -> None:
    m = states(2, 1.0)[: 4 * GROUP]
    wanted = decode(*encode(m, torch.int8))
    m[GROUP + 3] = bad
    got = decode(*encode(m, torch.int8))
    assert got[GROUP : 2 * GROUP].isnan().all()
    rest = torch.ones(m.shape, dtype=torch.bool)
    rest[GROUP : 2 * GROUP] = False
    assert same_bits(got[rest], wanted[rest])


def decayed(codes_dtype: torch.dtype, beta: float, steps: int, *, nearest: bool) -> Tensor:
    """States after `steps` steps in which all gradients but the largest's were 0."""
    value = torch.linspace(0.01, 1.0, GROUP)
    value = value.square() if codes_dtype == torch.uint8 else value
    held, codes, scales = value[-1].clone(), *encode(value, codes_dtype)
    for step in range(steps):
        value = beta * decode(codes, scales)
        value[-1] = held  # its gradient keeps it
        codes, scales = encode(value, codes_dtype, None if nearest else step)
    return decode(codes, scales)


@pytest.mark.parametrize(
    ("codes_dtype", "beta", "steps"), [(torch.uint8, 0.999, 700), (torch.int8, 0.99, 70)]
)
def test_states_decay_although_each_step_is_less_than_a_code(
    codes_dtype: torch.dtype, beta: float, steps: int
) -> None:
    start = torch.linspace(0.01, 1.0, GROUP)
    exact = beta**steps * (start.square() if codes_dtype == torch.uint8 else start)
    got = decayed(codes_dtype, beta, steps, nearest=False)
    nearest = decayed(codes_dtype, beta, steps, nearest=True)
    small = slice(4, GROUP - 1)  # the first ones are within a code of 0, the last one is held
    assert ((got - exact).abs() <= 0.2 * exact)[small].all()
    assert (nearest >= 1.2 * exact)[small].all(), "to nearest they stay"
