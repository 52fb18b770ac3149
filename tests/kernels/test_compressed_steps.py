"""Steps of compressed tensors: every backend has the bits of the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import backends
from cases import (
    ADAMW_DESCENTS,
    DESCENTS,
    SCALE,
    SEED,
    AdamWDescent,
    Descent,
    KernelBackend,
    same_bits,
)
from compressed import (
    CODES,
    FEW_PLACES,
    FORMATS,
    SOME_FORMATS,
    Format,
    Lists,
    extreme,
    lists_of,
    name_of,
    not_finite,
    usual,
)
from eigenfilter import kernels
from eigenfilter.kernels.compression import decode
from eigenfilter.kernels.triton.blocks import Blocks, forcing

Case = Descent | AdamWDescent


def on(device: str, value: float | bool) -> Any:
    """A number as a tensor of a device; a flag as it is."""
    if isinstance(value, bool):
        return value
    return torch.tensor(value, dtype=torch.float64, device=device)


def step(
    backend: KernelBackend,
    form: Format,
    case: Case,
    *,
    count: int = 2,
    on_device: bool = False,
    grad: torch.dtype | None = None,
    inputs: dict[str, Any] | None = None,
    **options: Any,
) -> Lists:
    """The lists after some steps.

    Args:
        count: how many steps.
        on_device: whether numbers are float64 tensors on the device.
        grad, inputs: see `lists_of`.
        options: of the operation.
    """
    states = 2 if isinstance(case, AdamWDescent) else int(case.momentum != "none")
    lists = lists_of(form, states, backend.device, grad=grad, **inputs or {})
    is_adamw = isinstance(case, AdamWDescent)
    kernel = kernels.adamw_step if is_adamw else kernels.sgd_step
    for i in range(count):
        numbers = case.options()
        if is_adamw:
            numbers["step"] += i
        if on_device:
            numbers = {name: on(backend.device, value) for name, value in numbers.items()}
        given = lists.arguments(backups=case.backups) | numbers | options
        kernel(**given, backend=backend.name)
    lists.assert_margins_untouched()
    return lists


def assert_alike(actual: Lists, expected: Lists) -> None:
    """Fail unless all tensors agree bit for bit, but for what kind of NaN they have."""
    for i, (a, b) in enumerate(zip(actual.whole, expected.whole, strict=True)):
        is_nan = a.isnan()
        assert torch.equal(is_nan, b.isnan()), f"tensor {i}: {a.dtype} [{a.numel()}]"
        assert same_bits(a[~is_nan], b[~is_nan]), f"tensor {i}: {a.dtype} [{a.numel()}]"


def reference(backend: KernelBackend) -> KernelBackend:
    return KernelBackend("reference", backend.device)


CASES: list[Case] = [*DESCENTS[::3], *ADAMW_DESCENTS[::3]]
if backends.INTERPRETED:
    CASES = [DESCENTS[7], DESCENTS[21], ADAMW_DESCENTS[11]]
# Without momenta, corrections are all that there is to compress.
STEPS = [
    pytest.param(form, case, id=f"{case}-{name_of(form)}")
    for form, case in itertools.product(FORMATS, CASES)
    if getattr(case, "momentum", "") != "none" or (form[1] is not None and form[2] == CODES)
]


@pytest.mark.parametrize(("form", "case"), STEPS)
def test_steps(fast_backend: KernelBackend, form: Format, case: Case) -> None:
    assert_alike(step(fast_backend, form, case), step(reference(fast_backend), form, case))


some_formats = pytest.mark.parametrize("form", SOME_FORMATS, ids=name_of)
some_cases = pytest.mark.parametrize(
    "case",
    [
        Descent("heavy", backups=True, decay=True, maximize=False),
        Descent("ahead", backups=False, decay=True, maximize=False),
        AdamWDescent(ahead=False, backups=True, decay=True, maximize=False, step=9),
        AdamWDescent(ahead=True, backups=True, decay=True, maximize=True, step=1),
    ],
    ids=lambda case: f"{'adamw' if isinstance(case, AdamWDescent) else 'sgd'}-{case}",
)


@pytest.mark.parametrize("values", [extreme, not_finite])
@some_cases
@some_formats
def test_values_of_every_kind(
    fast_backend: KernelBackend, form: Format, case: Case, values: Any
) -> None:
    inputs = {"places": FEW_PLACES, "values": values}
    actual = step(fast_backend, form, case, grad=torch.float32, inputs=inputs)
    expected = step(reference(fast_backend), form, case, grad=torch.float32, inputs=inputs)
    assert_alike(actual, expected)


@pytest.mark.parametrize("grad", [None, torch.float32], ids=["usual", "wide"])
@some_cases
@some_formats
def test_options(
    fast_backend: KernelBackend, form: Format, case: Case, grad: torch.dtype | None
) -> None:
    """Numbers on the device, a seed, a scale, a flag that is not set, and gradients of float32."""
    device = fast_backend.device
    given: dict[str, Any] = {
        "grad": grad,
        "inputs": {"places": FEW_PLACES},
        "grad_scale": torch.tensor(SCALE, device=device),
        "found_inf": torch.zeros((), device=device),
        "rounding_seed": SEED,
    }
    actual = step(fast_backend, form, case, on_device=True, **given)
    assert_alike(actual, step(reference(fast_backend), form, case, **given))


@some_cases
@some_formats
def test_a_stopped_step_restores_x_and_leaves_the_rest(
    backend: KernelBackend, form: Format, case: Case
) -> None:
    inputs = {"places": FEW_PLACES}
    flag = torch.ones((), device=backend.device)
    stopped = step(backend, form, case, found_inf=flag, inputs=inputs)
    before = step(backend, form, case, count=0, inputs=inputs)
    if case.backups:
        for p, b in zip(before.params, before.backups, strict=True):
            p.copy_(b)
    assert_alike(stopped, before)


def channels_last(t: Tensor) -> Tensor:
    return t.view(2, 3, 5, 7).permute(0, 3, 1, 2)


@some_cases
@some_formats
def test_groups_are_those_of_memory(backend: KernelBackend, form: Format, case: Case) -> None:
    results = [
        step(backend, form, case, inputs={"places": ((210, 0),)} | shaped, rounding_seed=SEED)
        for shaped in ({}, {"shaped": channels_last})
    ]
    assert_alike(*results)


@some_formats
def test_blocks_of_few_groups(fast_backend: KernelBackend, form: Format) -> None:
    """Triton's least blocks, which have two groups of float32 elements."""
    case = AdamWDescent(ahead=True, backups=False, decay=True, maximize=False, step=2)
    inputs = {"places": ((65, 3), (1100, 0))}
    with forcing(Blocks(bytes=512, warps=1)):
        actual = step(fast_backend, form, case, inputs=inputs)
    assert_alike(actual, step(reference(fast_backend), form, case, inputs=inputs))


def move(
    backend: KernelBackend,
    form: Format,
    *,
    adaptive: bool = False,
    on_device: bool = False,
    inputs: dict[str, Any] | None = None,
    **options: Any,
) -> Lists:
    """The lists after `perturb` has moved the parameters along momenta.

    Args:
        adaptive: of the operation.
        on_device: whether the step size is a float64 tensor on the device.
        inputs: see `lists_of`.
        options: of the operation.
    """
    lists = lists_of(form, 1, backend.device, **inputs or {})
    alpha = 0.37 if adaptive else -0.37
    kernels.perturb(
        lists.params,
        lists.states[0],
        None,
        on(backend.device, alpha) if on_device else alpha,
        corrections=lists.corrections,
        momentum_scales=lists.scales[0],
        save=False,
        adaptive=adaptive,
        **options,
        backend=backend.name,
    )
    lists.assert_margins_untouched()
    return lists


@pytest.mark.parametrize("form", FORMATS, ids=name_of)
def test_moves_along_momenta(fast_backend: KernelBackend, form: Format) -> None:
    assert_alike(move(fast_backend, form), move(reference(fast_backend), form))


@pytest.mark.parametrize("values", [extreme, not_finite])
@some_formats
def test_moves_of_values_of_every_kind(
    fast_backend: KernelBackend, form: Format, values: Any
) -> None:
    inputs = {"places": FEW_PLACES, "values": values}
    actual = move(fast_backend, form, inputs=inputs)
    assert_alike(actual, move(reference(fast_backend), form, inputs=inputs))


@pytest.mark.parametrize("adaptive", [False, True])
@some_formats
def test_options_of_moves(fast_backend: KernelBackend, form: Format, adaptive: bool) -> None:
    device = fast_backend.device
    given: dict[str, Any] = {
        "adaptive": adaptive,
        "inputs": {"places": FEW_PLACES},
        "grad_scale": torch.tensor(SCALE, device=device),
        "found_inf": torch.zeros((), device=device),
    }
    actual = move(fast_backend, form, on_device=True, **given)
    assert_alike(actual, move(reference(fast_backend), form, **given))


@some_formats
def test_a_stopped_move_leaves_all(backend: KernelBackend, form: Format) -> None:
    inputs = {"places": FEW_PLACES}
    stopped = move(backend, form, inputs=inputs, found_inf=torch.ones((), device=backend.device))
    assert_alike(stopped, lists_of(form, 1, backend.device, **inputs))


@some_formats
def test_moves_by_groups_of_memory(backend: KernelBackend, form: Format) -> None:
    results = [
        move(backend, form, inputs={"places": ((210, 0),)} | shaped)
        for shaped in ({}, {"shaped": channels_last})
    ]
    assert_alike(*results)


def test_a_move_there_and_back_restores_master_weights(backend: KernelBackend) -> None:
    """Sums of whole numbers in 24 bits are exact; the parameters alone could not hold them."""
    params = torch.arange(128.0, 256.0, device=backend.device).bfloat16()
    corrections = torch.zeros_like(params, dtype=torch.int8)
    codes = torch.full_like(params, 127, dtype=torch.int8)
    scales = torch.full((2,), 1 / 64, device=backend.device)
    given = {"corrections": [corrections], "momentum_scales": [scales], "save": False}
    before = params.clone()
    for alpha in (1.0, -1.0):
        kernels.perturb([params], [codes], None, alpha, **given, backend=backend.name)
        assert same_bits(params, before)
        assert bool((corrections == 0).all()) == (alpha < 0)


@pytest.mark.parametrize("values", [usual, extreme, not_finite])
def test_norm_of_codes(backend: KernelBackend, values: Any) -> None:
    device = backend.device
    lists = lists_of((torch.float32, None, CODES), 1, device, values=values)
    [codes], [scales] = lists.states, lists.scales
    assert scales is not None
    scale = torch.tensor(SCALE, device=device)
    out = torch.empty((), dtype=torch.float64, device=device)
    options = {"momentum_scales": scales, "grad_scale": scale, "backend": backend.name}
    actual = kernels.norm(codes, out=out, **options)
    numbers = [decode(c, s) for c, s in zip(codes, scales, strict=True)]
    expected = torch.cat(numbers).double().norm() / scale.double()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0, equal_nan=True)
    assert kernels.norm(codes, **options).dtype == torch.float32
    if backend.name == "native" and device == "cpu":
        of_numbers = kernels.norm(numbers, grad_scale=scale, out=torch.empty_like(out))
        assert same_bits(actual, of_numbers) or bool(actual.isnan() & of_numbers.isnan())
