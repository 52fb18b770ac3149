"""The filters of a live optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from eigenfilter.filters.adamw import AdamW
from eigenfilter.filters.methods import ASCENTS, METHODS, AscentFilter, HeavyBall
from eigenfilter.filters.stability import Filter, PolynomialFilter


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
    theory = _theory(opt)
    if theory is None:
        inner = type(getattr(opt, "base_optimizer", None))
        around = "" if inner is type(None) else f" around {inner.__name__}"
        raise TypeError(
            f"no filter is known for {type(opt).__name__}{around}; supported are torch.optim's "
            "SGD, AdamW and Adam without decay, SharpnessAware around these, and eigenfilter's "
            f"optimizers with method {', '.join(map(repr, METHODS))}"
        )
    options = _options(theory, opt, grad_norm) if issubclass(theory, AscentFilter) else {}
    refresh = getattr(opt, "current_groups", None)  # torch's optimizers have no rho
    groups = opt.param_groups if refresh is None else refresh()
    return [theory.of_group(group, **options) for group in groups]


def _theory(opt: _Optimizer) -> type[AdamW | PolynomialFilter] | None:
    """The class of the filters, or None if unknown.

    The optimizer's class states it. `SharpnessAware` around torch's SGD has that of its ascent.
    """
    for cls in type(opt).__mro__:
        name = cls.__module__, cls.__name__
        if name == _WRAPPER:
            base = _theory(opt.base_optimizer)  # type: ignore[attr-defined]
            ascent: str = opt.method  # type: ignore[attr-defined]
            return ASCENTS.get(ascent) if base is HeavyBall else base if base is AdamW else None
        if name in _BY_CLASS:
            return _BY_CLASS[name]
    return METHODS.get(getattr(type(opt), "method", ""))


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


_WRAPPER = ("eigenfilter.optimizers.wrapper", "SharpnessAware")
_BY_CLASS: Mapping[tuple[str, str], type[AdamW | PolynomialFilter]] = {
    ("torch.optim.sgd", "SGD"): HeavyBall,
    ("torch.optim.adam", "Adam"): AdamW,
    ("torch.optim.adamw", "AdamW"): AdamW,
    ("eigenfilter.optimizers.adamw", "AdamW"): AdamW,
}
