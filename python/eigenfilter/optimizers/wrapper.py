"""Any torch optimizer, made sharpness-aware."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.optimizers._groups import fill_missing_keys
from eigenfilter.optimizers._step_state import through_owner
from eigenfilter.optimizers.amp import drop_scaler_attributes
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.buckets import Gradients, conform_if_needed
from eigenfilter.optimizers.hyperparameters import (
    OWN_RHO,
    check_hyperparameters,
    remember_lrs,
)
from eigenfilter.optimizers.layers import layers_of
from eigenfilter.optimizers.registry import perturbation_of
from eigenfilter.optimizers.updates import Update

_SHARED = ("state", "defaults")
_FORWARDED = ("train", "eval")  # methods of schedule-free optimizers
_OF_METHOD = ("adaptive", "ascent")  # options of "sam" and "two_step_usam"


class SharpnessAware(EigenfilterOptimizer):
    r"""The update of any torch optimizer, with its gradient taken after an ascent.

        y = the point that `method` reaches from x
        x <- the base optimizer's step from x with the gradient grad f(y)

    The ascent is fused; the base takes its own step. `param_groups`, `state` and `state_dict()` are
    the base's, so schedulers may be given either optimizer. The groups also hold rho, under the
    name `ascent_rho` where the base has a hyperparameter `rho` of its own, as Adadelta has.

    Memory: one backup of the parameters, beside the base's state.

    Args:
        base_optimizer: optimizer that steps at x. Its groups get `rho` where they have none.
        method: how to ascend: "usam", "sam", "two_step_usam" or "hessian_usam".
        rho: radius of the ascent, at least 0; see the optimizer of the method. It lives in
            param_groups; a group that has one already keeps it.
        skip_nonfinite, set_to_none, backend: see `Options`. The base has its own other ones.
        options: further arguments of the method: `adaptive` ("sam"), `ascent` ("two_step_usam"),
            `hvp` and `fd_step` ("hessian_usam").

    Raises:
        TypeError: `base_optimizer` is no optimizer, a parameter is unsupported, or an option is
            unknown.
        ValueError: rho is out of its range, the method is unknown, or the base needs a closure, as
            LBFGS does, takes ascents itself, or is one that Accelerate prepared with a GradScaler
            or for accumulation: prepare this optimizer instead.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> base = torch.optim.AdamW([x], lr=0.1)
        >>> opt = eigenfilter.SharpnessAware(base, method="sam", rho=0.05)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(5.)
        >>> x.data
        tensor([ 0.8990, -1.8980])

    Source: P. Foret et al., 2021, arXiv 2010.01412; the methods' own.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        method: str = "usam",
        rho: float | Tensor = 0.05,
        *,
        skip_nonfinite: bool = False,
        set_to_none: bool = True,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                "SharpnessAware wraps an optimizer, as in SharpnessAware(torch.optim.AdamW("
                f"model.parameters())), and was given {type(base_optimizer).__name__}"
            )
        _refuse_base(base_optimizer)
        self.base_optimizer = base_optimizer
        shared = {"skip_nonfinite": skip_nonfinite, "set_to_none": set_to_none, "backend": backend}
        perturbation = perturbation_of(method, **options)
        self._rho_key = OWN_RHO if "rho" in base_optimizer.defaults else "rho"
        groups = [{self._rho_key: rho} | group for group in base_optimizer.param_groups]
        super().__init__(groups, {}, perturbation, Update(), shared)
        for group in base_optimizer.param_groups:
            group.setdefault(self._rho_key, rho)
        for name in ("param_groups", *_SHARED):  # __getattr__ returns the base's from now on
            del vars(self)[name]
        self._rho = rho
        self._rhos: list[float | Tensor] = []
        self._remember_lrs()

    def _remember_lrs(self) -> None:
        for optimizer in (self, self.base_optimizer):  # schedulers may be given either
            remember_lrs(optimizer)

    _mode: str | None = None  # the last one that was chosen here

    def __getattr__(self, name: str) -> Any:
        if name == "param_groups":
            return self._groups_with_rho()
        if name in _SHARED:
            return getattr(self.base_optimizer, name)
        if name in _FORWARDED and hasattr(self.base_optimizer, name):
            return functools.partial(self._switch, name)
        if name in _OF_METHOD and hasattr(self.perturbation, name):
            return getattr(self.perturbation, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _switch(self, mode: str) -> None:
        if self.perturbed and mode == self._mode:
            return  # frameworks call train() before every evaluation
        self._refuse_perturbed(f"{mode}()")
        getattr(self.base_optimizer, mode)()
        self._mode = mode

    def _groups_with_rho(self) -> list[dict[str, Any]]:
        """The base's groups, each with rho.

        A group that was loaded or added without rho gets its earlier one, or the constructor's.
        """
        groups: list[dict[str, Any]] = self.base_optimizer.param_groups
        key, rhos = self._rho_key, self._rhos
        for i, group in enumerate(groups):
            if key not in group:
                group[key] = rhos[i] if i < len(rhos) else self._rho
        self._rhos = [group[key] for group in groups]
        return groups

    @property
    def method(self) -> str:
        """The method of the ascent."""
        return self.perturbation.method

    @through_owner
    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict.

        Raises:
            RuntimeError: the parameters are perturbed, as the model's own state_dict would be.
        """
        self._refuse_perturbed("state_dict()")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._groups_with_rho()
        saved = self.base_optimizer.state_dict()
        return self._through_hooks(self._optimizer_state_dict_post_hooks, saved)

    @through_owner
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of the base.

        Groups that hold no rho in it keep their own.

        Raises:
            RuntimeError: the parameters are perturbed.
            ValueError: the groups do not match.
        """
        self._refuse_perturbed("load_state_dict()")
        given = state_dict.copy()  # as torch does, for hooks that change it
        given = self._through_hooks(self._optimizer_load_state_dict_pre_hooks, given)
        self._groups_with_rho()
        self.base_optimizer.load_state_dict(fill_missing_keys(self.base_optimizer, given))
        self._remember_lrs()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _through_hooks(self, hooks: dict[int, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """A state_dict as hooks leave it, which change it or return another one."""
        for hook in hooks.values():
            changed = hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    def _add_group(self, param_group: dict[str, Any]) -> None:
        if "param_groups" in vars(self):  # under construction
            super()._add_group(param_group)
        else:
            self._groups_with_rho()
            self.base_optimizer.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        names = ("base_optimizer", "_rho_key", "_rho", "_rhos")
        return {k: v for k, v in state.items() if k not in ("param_groups", *_SHARED)} | {
            name: vars(self)[name] for name in names
        }

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        checked = {self._rho_key: group[self._rho_key]}
        if self.defaults.get("lr") is not None and "lr" in group:
            # The base checks its other hyperparameters itself.
            checked["lr"] = group["lr"]
        check_hyperparameters(checked)

    def _initialize_state(self, gradients: Gradients) -> None:
        self.base_optimizer.step()

    def _apply(self, gradients: Gradients) -> None:
        if self.skip_nonfinite:
            self._amp.check_finite(conform_if_needed(gradients), self._buckets.devices)
        self._buckets.restore()
        self._buckets.store.has_written = True
        self._end()  # x is restored, whatever the base does
        if not gradients:
            return
        base = self.base_optimizer
        flag = self._amp.flag(gradients[0][0].device)  # on all devices the same
        if flag is not None and getattr(base, "_step_supports_amp_scaling", False):
            scale = self._amp.scalars(flag.device)["grad_scale"]
            vars(base).update(grad_scale=scale, found_inf=(flag != 0).float())
            try:
                base.step()
            finally:
                drop_scaler_attributes(base)
        elif flag is None or not flag:
            for bucket, grads in gradients:
                scale = self._amp.scalars(bucket.device)["grad_scale"]
                if scale is not None:
                    torch._foreach_div_([_distributed.local(g) for g in grads], scale)
            base.step()


def _refuse_base(base: torch.optim.Optimizer) -> None:
    """Raise ValueError for a base whose step() cannot apply a given gradient."""
    for each in layers_of(base):
        name = type(each).__name__
        closure = inspect.signature(each.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{name} evaluates the loss itself, in a closure that its step() requires, and "
                "would leave the gradient of the ascent unused: wrap an optimizer that steps "
                "without a closure, as SGD or AdamW"
            )
        _refuse_prepared(each)
        ascends = isinstance(each, EigenfilterOptimizer) and each.perturbation.count > 0
        if ascends or callable(getattr(each, "first_step", None)):
            raise ValueError(
                f"{name} takes ascents itself: use it alone (set its own rho), or wrap an "
                "optimizer that takes none, as SGD"
            )


def _refuse_prepared(base: torch.optim.Optimizer) -> None:
    """Raise ValueError for an optimizer of Accelerate that scales or skips steps itself."""
    accumulation = vars(base).get("gradient_state")
    if accumulation is None or "scaler" not in vars(base):
        return
    scales = vars(base)["scaler"] is not None
    if scales or accumulation.num_steps > 1:
        when = "through a GradScaler" if scales else "only where an accumulation ends"
        raise ValueError(
            f"{type(base).__name__} steps {when}, which the ascents around it would not follow: "
            "wrap the optimizer before Accelerate prepares it, "
            "accelerator.prepare(SharpnessAware(optimizer))"
        )
