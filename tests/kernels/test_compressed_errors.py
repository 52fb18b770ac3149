"""Compressed tensors that do not go together: an error with what to do, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import bits
from eigenfilter import _core, kernels

N = 130  # three groups


def sgd_call(param: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return {
        "params": [torch.ones(N).to(param)],
        "grads": [torch.ones(N).to(param)],
        "momenta": [torch.zeros(N, dtype=torch.int8)],
        "corrections": [torch.zeros(N, dtype=torch.int8)],
        "momentum_scales": [torch.zeros(3)],
        "lr": 0.1,
        "momentum": 0.9,
    }


def adamw_call() -> dict[str, Any]:
    return {
        "params": [torch.ones(N).bfloat16()],
        "grads": [torch.ones(N).bfloat16()],
        "exp_avgs": [torch.zeros(N, dtype=torch.int8)],
        "exp_avg_sqs": [torch.zeros(N, dtype=torch.uint8)],
        "corrections": [torch.zeros(N, dtype=torch.int16)],
        "exp_avg_scales": [torch.zeros(3)],
        "exp_avg_sq_scales": [torch.zeros(3)],
        "lr": 0.1,
        "step": 1,
    }


Change = Callable[[dict[str, Any]], None]


def put(name: str, value: Any) -> Change:
    return lambda call: call.__setitem__(name, value)


def shared(call: dict[str, Any]) -> None:
    memory = torch.zeros(N + 4, dtype=torch.int8)
    call["momenta"], call["corrections"] = [memory[:N]], [memory[4:]]


def scale_in_codes(call: dict[str, Any]) -> None:
    call["momentum_scales"] = [call["grads"][0][2:8].view(torch.float32)]


BAD_SGD: dict[str, tuple[Change, type[Exception], str]] = {
    "no scales": (
        put("momentum_scales", None),
        ValueError,
        r"momenta are codes of 8 bits, and there are no momentum_scales: pass a float32 tensor",
    ),
    "scales of numbers": (
        put("momenta", [torch.zeros(N)]),
        ValueError,
        r"momentum_scales go with momenta of 8 bits: pass None, or codes",
    ),
    "scales without momenta": (
        lambda call: call.update(momenta=None, momentum=0.0),
        ValueError,
        r"momentum_scales go with momenta of 8 bits",
    ),
    "too few scales": (
        put("momentum_scales", [torch.zeros(2)]),
        ValueError,
        r"momentum_scales\[0\] has shape \(2\) .*: pass a contiguous tensor \[3\], a scale for "
        r"every 64 elements of params\[0\]",
    ),
    "scales with gaps": (
        put("momentum_scales", [torch.zeros(6)[::2]]),
        ValueError,
        r"pass a contiguous tensor \[3\]",
    ),
    "wide scales": (
        put("momentum_scales", [torch.zeros(3).double()]),
        _core.LayoutError,
        r"momentum_scales\[0\] is float64",
    ),
    "codes without a sign": (
        put("momenta", [torch.zeros(N, dtype=torch.uint8)]),
        _core.LayoutError,
        r"momenta\[0\] is uint8",
    ),
    "words as codes": (
        put("momenta", [torch.zeros(N, dtype=torch.int16)]),
        _core.LayoutError,
        r"momenta\[0\] is int16",
    ),
    "float corrections": (
        put("corrections", [torch.zeros(N)]),
        _core.LayoutError,
        r"corrections\[0\] is float32",
    ),
    "wide corrections": (
        put("corrections", [torch.zeros(N, dtype=torch.int32)]),
        TypeError,
        r"corrections\[0\] is int32",
    ),
    "corrections of float32": (
        lambda call: call.update(params=[torch.ones(N)], grads=[torch.ones(N)]),
        _core.LayoutError,
        r"corrections\[0\] is int8",
    ),
    "short corrections": (
        put("corrections", [torch.zeros(N - 1, dtype=torch.int8)]),
        _core.LayoutError,
        r"corrections\[0\] has shape \(129\)",
    ),
    "gradients in double": (
        lambda call: call.update(
            params=[torch.ones(N)], grads=[torch.ones(N).double()], corrections=None
        ),
        TypeError,
        r"grads\[0\] is float64: a step of compressed tensors",
    ),
    "codes of float64": (
        lambda call: call.update(
            params=[torch.ones(N).double()], grads=[torch.ones(N).double()], corrections=None
        ),
        _core.LayoutError,
        r"momenta\[0\] is int8",
    ),
    "whole parameters": (
        put("params", [torch.ones(N, dtype=torch.int8)]),
        TypeError,
        r"params\[0\] is int8: supported are",
    ),
    "shared memory": (shared, ValueError, "corrections.* and momenta.* share memory"),
    "scales in gradients": (scale_in_codes, ValueError, "momentum_scales.* and grads.* share"),
}


def tensors(call: dict[str, Any]) -> list[Tensor]:
    return [t for value in call.values() if isinstance(value, list) for t in value]


def refuse(run: Any, call: dict[str, Any], error: type[Exception], message: str) -> None:
    before = [bits(t).clone() for t in tensors(call) if t.itemsize != 8 and t.dtype != torch.int32]
    with pytest.raises(error, match=message):
        run(**call)
    after = [bits(t) for t in tensors(call) if t.itemsize != 8 and t.dtype != torch.int32]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("name", BAD_SGD)
def test_sgd_step_refuses(host_backend: str, name: str) -> None:
    change, error, message = BAD_SGD[name]
    call = sgd_call()
    kernels.sgd_step(**call, backend=host_backend)  # it is right without the change
    call = sgd_call()
    change(call)
    refuse(kernels.sgd_step, call | {"backend": host_backend}, error, message)


BAD_ADAMW: dict[str, tuple[Change, type[Exception], str]] = {
    "no scales of v": (
        put("exp_avg_sq_scales", None),
        ValueError,
        "exp_avg_sqs are codes of 8 bits, and there are no exp_avg_sq_scales",
    ),
    "signed v": (
        put("exp_avg_sqs", [torch.zeros(N, dtype=torch.int8)]),
        _core.LayoutError,
        r"exp_avg_sqs\[0\] is int8",
    ),
    "v of numbers": (
        put("exp_avg_sqs", [torch.zeros(N)]),
        _core.LayoutError,
        r"exp_avg_sqs\[0\] is float32",
    ),
}


@pytest.mark.parametrize("name", BAD_ADAMW)
def test_adamw_step_refuses(host_backend: str, name: str) -> None:
    change, error, message = BAD_ADAMW[name]
    kernels.adamw_step(**adamw_call(), backend=host_backend)
    call = adamw_call()
    change(call)
    refuse(kernels.adamw_step, call | {"backend": host_backend}, error, message)


def move_call() -> dict[str, Any]:
    return {
        "params": [torch.ones(N).bfloat16()],
        "grads": [torch.ones(N, dtype=torch.int8)],
        "backups": None,
        "alpha": 0.1,
        "corrections": [torch.zeros(N, dtype=torch.int8)],
        "momentum_scales": [torch.ones(3)],
        "save": False,
    }


WITH_BACKUPS = "backups go without corrections and momentum_scales: pass backups=None and save=F"


def to_ascent(**changes: Any) -> Change:
    """The call of a plain ascent, with changes."""
    narrow = {"grads": [torch.ones(N).bfloat16()], "backups": [torch.ones(N).bfloat16()]}
    plain = narrow | {"corrections": None, "momentum_scales": None}
    return lambda call: call.update(plain | changes)


BAD_MOVES: dict[str, tuple[Change, type[Exception], str]] = {
    "backups and corrections": (
        to_ascent(corrections=[torch.zeros(N, dtype=torch.int8)]),
        ValueError,
        WITH_BACKUPS,
    ),
    "backups and scales": (
        to_ascent(momentum_scales=[torch.ones(3)]),
        ValueError,
        WITH_BACKUPS,
    ),
    "codes and backups": (
        to_ascent(grads=[torch.ones(N, dtype=torch.int8)]),
        TypeError,
        r"grads\[0\] is int8: supported are",
    ),
    "a narrow gradient and backups": (
        to_ascent(params=[torch.ones(N)], backups=[torch.ones(N)]),
        _core.LayoutError,
        r"grads\[0\] is bfloat16",
    ),
    "no scales": (
        put("momentum_scales", None),
        ValueError,
        "grads are codes of 8 bits, and there are no momentum_scales: pass a float32 tensor",
    ),
    "scales of numbers": (
        put("grads", [torch.ones(N)]),
        ValueError,
        "momentum_scales go with grads of 8 bits: pass None, or codes",
    ),
    "codes without a sign": (
        put("grads", [torch.ones(N, dtype=torch.uint8)]),
        TypeError,
        r"grads\[0\] is uint8: supported are",
    ),
    "float16 along bfloat16": (
        lambda call: call.update(grads=[torch.ones(N).half()], momentum_scales=None),
        _core.LayoutError,
        r"grads\[0\] is float16",
    ),
    "codes of float64": (
        lambda call: call.update(params=[torch.ones(N).double()], corrections=None),
        _core.LayoutError,
        r"grads\[0\] is int8",
    ),
}


@pytest.mark.parametrize("name", BAD_MOVES)
def test_perturb_refuses(host_backend: str, name: str) -> None:
    change, error, message = BAD_MOVES[name]
    kernels.perturb(**move_call(), backend=host_backend)
    call = move_call()
    change(call)
    refuse(kernels.perturb, call | {"backend": host_backend}, error, message)


def norm_call() -> dict[str, Any]:
    codes = [torch.ones(N, dtype=torch.int8)]
    return {"tensors": codes, "momentum_scales": [torch.ones(3)]}


BAD_NORMS: dict[str, tuple[Change, type[Exception], str]] = {
    "no scales": (
        put("momentum_scales", None),
        ValueError,
        "tensors are codes of 8 bits, and there are no momentum_scales",
    ),
    "scales of numbers": (
        put("tensors", [torch.ones(N)]),
        ValueError,
        "momentum_scales go with tensors of 8 bits",
    ),
    "codes and numbers": (
        lambda call: call.update(
            tensors=[torch.ones(N, dtype=torch.int8), torch.ones(N)],
            momentum_scales=[torch.ones(3), torch.ones(3)],
        ),
        ValueError,
        "momentum_scales go with tensors of 8 bits",
    ),
    "weights": (put("weights", [torch.ones(N)]), _core.LayoutError, r"tensors\[0\] is int8"),
}


@pytest.mark.parametrize("name", BAD_NORMS)
def test_norm_refuses(host_backend: str, name: str) -> None:
    change, error, message = BAD_NORMS[name]
    assert kernels.norm(**norm_call(), backend=host_backend) > 0
    call = norm_call()
    change(call)
    refuse(kernels.norm, call | {"backend": host_backend}, error, message)
