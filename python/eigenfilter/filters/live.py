"""The filters of a live optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from eigenfilter.filters.adamw import AdamW
from eigenfilter.filters.methods import ASCENTS, AscentFilter, HeavyBall, Nesterov
from eigenfilter.filters.stability import Filter


class _Optimizer(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def of(opt: _Optimizer, *, grad_norm: float | None = None) -> list[Filter]:
    """The filters of a live optimizer at its present hyperparameters, one per param group.

    Each is the filter of its group trained alone. If several groups differ, the filter of the whole
    model composes them and is not their union. A group with rho = 0 is heavy ball or Nesterov. The
    filter of a group with `maximize` is in eigenvalues of f, which are those of -f negated.

    Args:
        opt: an optimizer of eigenfilter, torch.optim.SGD, AdamW, or Adam without decay, or
            `SharpnessAware` around one of torch's. AdamW's filters concern the preconditioned
            Hessian, with its ascent if it takes one: see `AdamW`.
        grad_norm: gradient norm for which SAM's edge is computed, greater than 0; see `SAM`.

    Raises:
        TypeError: the optimizer has no known filter, as ASAM, or is SAM without grad_norm.
        ValueError: a group holds a value outside its range.
    """
    method = _method(opt)
    if method == "adamw":
        return [_adamw(group) for group in opt.param_groups]
    if method == "sgd":
        return [_sgd(group) for group in opt.param_groups]
    theory = ASCENTS.get(method)
    if theory is None:
        inner = type(getattr(opt, "base_optimizer", None))
        around = "" if inner is type(None) else f" around {inner.__name__}"
        raise TypeError(
            f"no filter is known for {type(opt).__name__}{around}; supported are torch.optim's "
            "SGD, AdamW and Adam without decay, SharpnessAware around these, and eigenfilter's "
            f"optimizers with method {', '.join(map(repr, ('sgd', *ASCENTS)))}"
        )
    options = _options(theory, opt, grad_norm)
    return [
        _sgd(group)
        if float(group["rho"]) == 0.0
        else theory(**_common(group), rho=group["rho"], nesterov=group["nesterov"], **options)
        for group in opt.param_groups
    ]


def _method(opt: _Optimizer) -> str:
    """Name of the method, or "" if unknown.

    The class states it. A `SharpnessAware` around torch's SGD has the name of its ascent.
    """
    for cls in type(opt).__mro__:
        known = _BY_CLASS.get((cls.__module__, cls.__name__))
        if known == "wrapper":
            base = _method(opt.base_optimizer)  # type: ignore[attr-defined]
            ascent: str = opt.method  # type: ignore[attr-defined]
            return {"sgd": ascent, "adamw": "adamw"}.get(base, "")
        if known is not None:
            return known
    method: str = getattr(type(opt), "method", "")
    return method if method == "sgd" or method in ASCENTS else ""


def _options(
    theory: type[AscentFilter], opt: _Optimizer, grad_norm: float | None
) -> dict[str, Any]:
    """Return the arguments of a filter that are the optimizer's, not its groups'."""
    if getattr(opt, "adaptive", False):
        raise TypeError("no filter is known for ASAM, whose ascent is scaled by the parameters")
    if not theory.takes("grad_norm"):
        return {"ascent": opt.ascent} if theory.forms else {}  # type: ignore[attr-defined]
    if grad_norm is None:
        raise TypeError(
            "SAM has no filter without a gradient norm, with which its edge moves: give grad_norm, "
            "or use filters.SAM(lr, ..., rho=rho, grad_norm=norm)"
        )
    return {"grad_norm": grad_norm}


def _adamw(group: Mapping[str, Any]) -> Filter:
    if group.get("amsgrad"):
        raise TypeError("no filter is known for AMSGrad, whose preconditioner differs")
    if float(group["weight_decay"]) != 0.0 and not group.get("decoupled_weight_decay", True):
        raise TypeError("no filter is known for Adam whose gradient has the decay: use AdamW")
    names = ("lr", "weight_decay", "maximize")
    return AdamW(beta1=group["betas"][0], **{name: group[name] for name in names})


def _sgd(group: Mapping[str, Any]) -> Filter:
    return Nesterov(**_common(group)) if group["nesterov"] else HeavyBall(**_common(group))


def _common(group: Mapping[str, Any]) -> dict[str, Any]:
    names = ("lr", "momentum", "dampening", "weight_decay", "maximize")
    return {name: group[name] for name in names}


_BY_CLASS: Mapping[tuple[str, str], str] = {
    ("torch.optim.sgd", "SGD"): "sgd",
    ("torch.optim.adam", "Adam"): "adamw",
    ("torch.optim.adamw", "AdamW"): "adamw",
    ("eigenfilter.optimizers.adamw", "AdamW"): "adamw",
    ("eigenfilter.optimizers.wrapper", "SharpnessAware"): "wrapper",
}
