"""The arguments of the optimizers: options that all of them share, and ranges of numbers."""

from __future__ import annotations

import inspect
import math
import numbers
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from eigenfilter import kernels


class Options(TypedDict, total=False):
    """The keyword arguments that the optimizers share.

    The others are accepted for torch's sake. `fused`, `foreach` and `capturable` change nothing,
    because every step is fused, and CUDA graphs can capture it; `differentiable` and `amsgrad` must
    be False.

    Attributes:
        maximize: whether to maximize f instead of minimizing it. The default is False.
        stochastic_rounding: whether bfloat16 and float16 parameters and state are rounded up or
            down at random, without bias, so that small updates are not lost on average. The
            default is False.
        master_weight_bits: 24 or 32 for bfloat16 and float16 parameters that stand for master
            weights of so many bits, with a correction of 8 or 16 bits each in the state: updates
            down to 2^-17 of a bfloat16 weight count, or all of float32's. Ascents perturb the
            parameters, and leave the corrections. The default is None, for no corrections.
        state_bits: bits of each number of the momentum or of the moments: 32 (float32), 16
            (bfloat16), 8 (codes, with a scale for every 64), or None, the default, for the
            parameters' dtype. See `eigenfilter.kernels.compression` for how far they err.
        skip_nonfinite: whether a step with a gradient that is not finite leaves parameters and
            state unchanged; `opt.skipped` counts these steps. The check takes one more pass over
            the gradient. In a distributed job all ranks of the default process group share the
            flag, and must step together. The default is False.
        release_gradients: whether each gradient is used and freed while backward runs, so that they
            never exist all at once: those of the descent, and of the ascents of USAM, TwoStepUSAM,
            and AdamW with these methods. It needs step(closure), or every closure inside `with
            opt.evaluation():`, and excludes a second backward pass in it, a GradScaler, clipping,
            skip_nonfinite, and several ranks except under FSDP2. The default is False.
        backend: backend of the kernels: "native", "triton", "reference", or None, the default, to
            choose by device; see `eigenfilter.kernels`.
        set_to_none: whether an ascent sets the gradients to None, as `zero_grad` does. That is the
            default; False keeps the tensors and fills them with 0, for programs whose gradients
            are views of one buffer.
    """

    maximize: bool
    stochastic_rounding: bool
    master_weight_bits: int | None
    state_bits: int | None
    skip_nonfinite: bool
    release_gradients: bool
    backend: str | None
    set_to_none: bool
    fused: bool | None
    foreach: bool | None
    capturable: bool
    differentiable: bool


class MethodOptions(Options, total=False):
    """The keyword arguments of an optimizer whose ascent is an argument, `method`.

    Attributes:
        adaptive: see `SAM`.
        ascent: see `TwoStepUSAM`.
        hvp: see `HessianUSAM`.
        fd_step: see `HessianUSAM`.
    """

    adaptive: bool
    ascent: str
    hvp: str
    fd_step: float | None


_DEFAULTS = Options(
    maximize=False,
    stochastic_rounding=False,
    master_weight_bits=None,
    state_bits=None,
    skip_nonfinite=False,
    release_gradients=False,
    backend=None,
    set_to_none=True,
)
_BITS: dict[str, tuple[int | None, ...]] = {
    "master_weight_bits": (None, 24, 32),
    "state_bits": (None, 8, 16, 32),
}
_FOR_TORCH = ("fused", "foreach", "capturable", "differentiable", "amsgrad")
_KNOWN = frozenset((*Options.__annotations__, *_FOR_TORCH))  # AdamW names amsgrad itself
_REFUSED = {
    "amsgrad": "amsgrad=True is not supported: use torch.optim.AdamW(amsgrad=True), inside "
    "eigenfilter.SharpnessAware for an ascent",
    "differentiable": "differentiable=True is not supported, a fused step has no derivative: use "
    "the torch optimizer to differentiate through a step",
}
_OPTIONS_LINE = "    options: the keyword arguments of `Options`.\n"


def explain_options(docstring: str | None) -> str | None:
    """Put the documentation of `Options` in the place of the line that refers to it."""
    if docstring is None or _OPTIONS_LINE.strip() not in docstring:
        return docstring
    _, entries = inspect.cleandoc(Options.__doc__ or "").split("Attributes:\n")
    names = [name for name in _FOR_TORCH if name in Options.__annotations__]
    rest = f"    {', '.join(names)}: see `Options`.\n"
    return inspect.cleandoc(docstring).replace(_OPTIONS_LINE, f"{entries}\n{rest}")


def show_options(init: Callable[..., None]) -> None:
    """Let help() and inspect.signature() show what `**options: Unpack[Options]` stands for.

    An option that the constructor names itself is shown as it stands there.
    """
    signature = inspect.signature(init)
    *named, rest = signature.parameters.values()
    unpacked = (Unpack[Options], Unpack[MethodOptions])
    if rest.annotation not in ("Unpack[Options]", "Unpack[MethodOptions]", *unpacked):
        return
    kind, types = inspect.Parameter.KEYWORD_ONLY, Options.__annotations__
    shown = [
        inspect.Parameter(name, kind, default=default, annotation=types[name].__forward_arg__)
        for name, default in _DEFAULTS.items()
        if name not in signature.parameters
    ]
    vars(init)["__signature__"] = signature.replace(parameters=[*named, *shown, rest])


def complete_options(options: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Check the options of a constructor, and add the defaults of those that were not given.

    Raises:
        TypeError: no optimizer has the argument, or it is not a bool.
        ValueError: two options exclude each other, the backend is unknown, or torch's argument
            asks for a mode that a fused step does not have.
    """
    for name, value in options.items():
        if name not in _KNOWN:
            raise TypeError(f"{owner} got an unexpected keyword argument {name!r}")
        if name in _BITS:
            if isinstance(value, (bool, Tensor)) or value not in _BITS[name]:
                choices = ", ".join(map(str, _BITS[name]))
                raise ValueError(f"{name} must be one of {choices}, and is {value!r}")
            continue
        if name == "backend" or (value is None and name in ("fused", "foreach")):
            continue
        if isinstance(value, Tensor) or value not in (0, 1):
            raise TypeError(f"{name} must be True or False, and is {value!r}")
    refuse_modes(options)
    values: dict[str, Any] = {**_DEFAULTS, **options}
    if values["release_gradients"] and values["skip_nonfinite"]:
        raise ValueError(
            "release_gradients applies each gradient before the next is made, and skip_nonfinite "
            "needs all of them first: choose one"
        )
    if values["release_gradients"] and not values["set_to_none"]:
        raise ValueError(
            "release_gradients drops each gradient, and set_to_none=False keeps them: choose one"
        )
    if values["backend"] not in (None, *kernels.BACKENDS):
        raise ValueError(f"unknown backend {values['backend']!r}: choose one of {kernels.BACKENDS}")
    return values


def refuse_modes(group: Mapping[str, Any]) -> None:
    """Raise ValueError for options that ask for a mode that a fused step does not have."""
    for name, message in _REFUSED.items():
        if group.get(name):
            raise ValueError(message)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split `MethodOptions` into those that the optimizers share, and those of the method."""
    shared = {name: value for name, value in options.items() if name in _KNOWN}
    return shared, {name: value for name, value in options.items() if name not in _KNOWN}


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The parameters' dtypes."""

OWN_RHO = "ascent_rho"
"""Key of the ascent's radius in groups whose base optimizer has a `rho` of its own."""

_NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "eps", "rho", OWN_RHO)
CHECKED = (
    *(*_NOT_NEGATIVE, "dampening", "betas", "nesterov", "extrapolation"),
    *("amsgrad", "differentiable"),
)
"""The hyperparameters that are checked in every group."""


def rho_key(group: Mapping[str, Any]) -> str:
    """The key of the ascent's radius in a group."""
    return OWN_RHO if OWN_RHO in group else "rho"


def initial_rho_key(group: Mapping[str, Any]) -> str:
    """The key of the radius that a scheduler multiplies."""
    return f"initial_{rho_key(group)}"


_BASE_LRS = {"rho": "rho_base_lr", OWN_RHO: f"{OWN_RHO}_base_lr"}
_COMPUTED = {"rho": "rho_of_lr", OWN_RHO: f"{OWN_RHO}_of_lr"}


def base_lr_key(group: Mapping[str, Any]) -> str:
    """The key of the lr to which the initial radius belongs, where a scheduler binds it to lr."""
    return _BASE_LRS[rho_key(group)]


def bind_rho(group: dict[str, Any]) -> None:
    """Have `rho_of` compute the radius of a group from its lr, from its initial one and base lr."""
    key = rho_key(group)
    value = group[f"initial_{key}"] * (group["lr"] / group[_BASE_LRS[key]])
    if not isinstance(group[key], Tensor):
        group[key] = value
    elif isinstance(value, Tensor):  # in place, because a CUDA graph may read it
        group[key].copy_(value)
    else:
        group[key].fill_(value)
    group[_COMPUTED[key]] = _mark_of(group[key])


def unbind_rho(group: dict[str, Any]) -> None:
    """Leave the radius of a group as it is, whatever its lr."""
    group.pop(_BASE_LRS[rho_key(group)], None)
    group.pop(_COMPUTED[rho_key(group)], None)


def rho_of(group: dict[str, Any]) -> float | Tensor:
    """The radius of a group's ascent; 0 where it has none.

    Where a scheduler has bound it to lr, it is first set to initial rho * lr / base lr. If it is no
    longer what was computed last, someone else has set it, and it stays, until it is bound again.
    """
    key = rho_key(group)
    if _COMPUTED[key] in group:
        present, computed = _mark_of(group[key]), group[_COMPUTED[key]]
        both_nan = present != present and computed != computed  # of an lr that will be refused
        if present == computed or both_nan:
            bind_rho(group)
        else:
            del group[_COMPUTED[key]]
    rho: float | Tensor = group.get(key, 0.0)
    return rho


def _mark_of(rho: float | Tensor) -> float | str:
    """What tells a radius from another; a tensor on a device is not read, which would wait."""
    if not isinstance(rho, Tensor):
        return rho
    is_read = rho.device.type == "cpu" and rho.numel() == 1
    return float(rho) if is_read else "a tensor that is not read"


_Given = dict[int, tuple[dict[str, Any], "float | Tensor"]]
_given_lrs: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Given] = weakref.WeakKeyDictionary()


def remember_lrs(optimizer: torch.optim.Optimizer) -> None:
    """Remember the lr that new groups were given, unless a scheduler may have changed it."""
    known = _given_lrs.get(optimizer, {})
    given: _Given = {}
    for group in optimizer.param_groups:
        if given_lr(optimizer, group) is not None:
            given[id(group)] = known[id(group)]
        elif "lr" in group and "initial_lr" not in group:
            given[id(group)] = group, copy_of_value(group["lr"])
    _given_lrs[optimizer] = given


def given_lr(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float | Tensor | None:
    """The lr that a group was given; None if unknown."""
    known, lr = _given_lrs.get(optimizer, {}).get(id(group), (None, None))
    return lr if known is group else None


def copy_of_value(value: float | Tensor) -> float | Tensor:
    """A number, or a copy of a tensor that is changed in place."""
    return value.clone() if isinstance(value, Tensor) else value


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Check the hyperparameters of a group, except tensors on a GPU, which a check would wait for.

    Raises:
        TypeError: one is neither a number nor a float32 or float64 tensor.
        ValueError: one is out of its range, or a tensor of more than one element.
    """
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, and is {betas!r}")
    for name, given in _scalars(group):
        value = _number(name, given)
        if value is None:
            continue
        if name in _NOT_NEGATIVE and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, and is {value}")
        if name == "dampening" and not math.isfinite(value):
            raise ValueError(f"dampening must be finite, and is {value}")
        if name == "betas" and not 0 <= value < 1:
            raise ValueError(f"betas must be at least 0 and below 1, and one is {value}")
    if group.get("nesterov") and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs momentum > 0 and dampening 0")


def _scalars(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The names and the values of a group's hyperparameters that are numbers."""
    named = [(name, group[name]) for name in (*_NOT_NEGATIVE, "dampening") if name in group]
    return named + [("betas", beta) for beta in group.get("betas", ())]


def _number(name: str, value: Any) -> float | None:
    """The value of a hyperparameter, or None if reading it would wait for a device."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        _check_tensor(name, value)
        return value.item() if value.device.type == "cpu" else None
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a one-element tensor, and is {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, and is beyond every float") from None


def _check_tensor(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a one-element tensor")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be a number or a one-element float32 or float64 tensor, and is a "
            f"tensor of {value.dtype}"
        )


def check_scalars(group: dict[str, Any], device: torch.device) -> None:
    """Raise TypeError or ValueError for a hyperparameter that kernels on `device` cannot take.

    The kernels check this too. Checking before the first of several calls keeps a step atomic.
    """
    for name, value in _scalars(group):
        if isinstance(value, Tensor):
            _check_tensor(name, value)
            if value.device not in (device, torch.device("cpu")):
                raise ValueError(
                    f"{name} is on {value.device} and its parameters are on {device}: move it "
                    "there or to the CPU"
                )


def is_zero(value: float | Tensor) -> bool:
    """Whether a number is 0; a tensor never counts as 0."""
    return not isinstance(value, Tensor) and value == 0


def lr_is_zero(lr: float | Tensor) -> bool:
    """Whether lr is 0; a tensor on a device counts as not 0, because reading it would wait."""
    return (not isinstance(lr, Tensor) or lr.device.type == "cpu") and float(lr) == 0
