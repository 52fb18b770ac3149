"""Any torch optimizer, made sharpness-aware."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._descents import Descent
from eigenfilter.optimizers._groups import filled
from eigenfilter.optimizers._hyperparameters import check_hyperparameters
from eigenfilter.optimizers._methods import ascent_of
from eigenfilter.optimizers._parts import Gradients, conforming

_SHARED = ("param_groups", "state", "defaults")


class SharpnessAware(EigenfilterOptimizer):
    r"""The update of any torch optimizer, with its gradient taken where an ascent leads.

        y = where `method` ascends to from x
        x <- the base optimizer's step from x with the gradient grad f(y)

    The ascent is fused, the descent the base's own. `param_groups` and `state` are the base's:
    schedulers may be given either optimizer, and `state_dict()` is the base's (its groups hold rho
    too, which another optimizer ignores).

    Under a GradScaler, or with `skip_nonfinite`, a base without fused=True costs one
    synchronisation a step: it cannot be told on the device to skip.

    Args:
        base_optimizer: steps at x; its groups get `rho`, where they have none.
        method: how to ascend: "usam", "sam", "two_step_usam" or "hessian_usam".
        rho: of the ascent, >= 0; see the optimizer of that method. It lives in param_groups.
        skip_nonfinite: leave parameters and state as they were where a gradient is not finite.
        backend: None, "native", "triton" or "reference": see `eigenfilter.kernels`.
        options: further arguments of the method's ascent: `adaptive` ("sam"), `ascent`
            ("two_step_usam"), `hvp` and `fd_step` ("hessian_usam").

    Raises:
        TypeError: `base_optimizer` is none; unsupported parameters; an unknown option.
        ValueError: rho out of its range; an unknown method.

    Example:
        >>> base = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        >>> opt = eigenfilter.SharpnessAware(base, method="sam", rho=0.05)
        >>> loss = opt.step(closure)

    Source: P. Foret et al., 2021, arXiv 2010.01412; the methods' own.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        method: str = "usam",
        rho: float | Tensor = 0.05,
        *,
        skip_nonfinite: bool = False,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                "SharpnessAware wraps an optimizer, as in SharpnessAware(torch.optim.AdamW("
                f"model.parameters())), and was given {type(base_optimizer).__name__}"
            )
        self.base_optimizer = base_optimizer
        ascent = ascent_of(method, **options)
        groups = [{"rho": rho} | group for group in base_optimizer.param_groups]
        super().__init__(
            groups, {}, ascent, Descent(), skip_nonfinite=skip_nonfinite, backend=backend
        )
        for group in base_optimizer.param_groups:
            group.setdefault("rho", rho)
        base_optimizer.defaults.setdefault("rho", rho)
        for name in _SHARED:  # from now on the base's
            del vars(self)[name]
        self._keep_rho()

    def _keep_rho(self) -> None:
        """Have groups without rho, when they are loaded into the base, keep the present ones."""
        self.base_optimizer.register_load_state_dict_pre_hook(filled)

    def __getattr__(self, name: str) -> Any:
        if name in _SHARED:
            return getattr(self.base_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def method(self) -> str:
        """How it ascends."""
        return self._ascent.method

    @property
    def ascent(self) -> str:
        """Of "two_step_usam": "sequential" or "anchored"."""
        ascent: str = self._ascent.ascent  # type: ignore[attr-defined]
        return ascent

    @property
    def adaptive(self) -> bool:
        """Of "sam": whether it is ASAM."""
        adaptive: bool = self._ascent.adaptive  # type: ignore[attr-defined]
        return adaptive

    def state_dict(self) -> dict[str, Any]:
        """The base's.

        Raises:
            RuntimeError: the parameters are away from x, as the model's own state_dict would be.
        """
        self._refuse_perturbed("state_dict()")
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict`, this class's or the base's, returned.

        Groups without rho keep theirs.

        Raises:
            RuntimeError: the parameters are away from x.
            ValueError: the groups do not match.
        """
        self._refuse_perturbed("load_state_dict()")
        self.base_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base.

        Raises:
            TypeError: a parameter is sparse, complex or of an unsupported dtype.
            ValueError: rho is out of its range.
            RuntimeError: the parameters are away from x.
        """
        if "param_groups" in vars(self):  # under construction
            super().add_param_group(param_group)
            return
        self._refuse_perturbed("add_param_group()")
        groups = self.base_optimizer.param_groups
        self.base_optimizer.add_param_group(param_group)
        try:
            self._check_group(groups[-1])
        except BaseException:
            groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in _SHARED} | {
            "base_optimizer": self.base_optimizer
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_rho()  # an optimizer's hooks are not copied

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        check_hyperparameters({"rho": group["rho"]})  # the others are the base's affair

    def _update(self, found: Gradients) -> None:
        if self.skip_nonfinite and found:
            self._guard.look(conforming(found))
        moved, self._moved = self._moved, []
        for part in moved:
            part.restore()
        self._touched(moved)
        self._written = True
        self._end()  # at x again, whatever the base does
        if not found:
            return
        base = self.base_optimizer
        flags = [f for f in (self._guard.flag(part.device) for part, _ in found) if f is not None]
        if flags and getattr(base, "_step_supports_amp_scaling", False):
            scale = self._guard.scalars(flags[0].device)["grad_scale"]
            vars(base).update(grad_scale=scale, found_inf=(flags[0] != 0).float())
            try:
                base.step()
            finally:
                del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
        elif not flags or not flags[0]:
            for part, grads in found:
                scale = self._guard.scalars(part.device)["grad_scale"]
                if scale is not None:
                    torch._foreach_div_([_distributed.local(g) for g in grads], scale)
            base.step()
