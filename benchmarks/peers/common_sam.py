"""The common recipe for sharpness-aware minimization around any torch optimizer.

A loop over the parameters clones each one and adds its perturbation. A second loop restores the
clone, and then the base optimizer steps. This pattern is widely copied into training code; here it
serves every method of the library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

TINY = 1e-12
FD_STEP = 2.0**-11.5  # square root of float32's machine precision


@dataclass(frozen=True)
class Recipe:
    """The ascents of a method, in what sets them apart from USAM's one along the gradient.

    Attributes:
        normalized: whether the length of the first is rho.
        adaptive: whether the first is scaled by the parameters.
        again: whether a second one follows along the gradient.
        difference: whether the first is a finite difference, and a second along H g follows.
    """

    normalized: bool = False
    adaptive: bool = False
    again: bool = False
    difference: bool = False


METHODS: Mapping[str, Recipe] = {
    "usam": Recipe(),
    "sam": Recipe(normalized=True),
    "asam": Recipe(normalized=True, adaptive=True),
    "two_step_usam": Recipe(again=True),
    "hessian_usam": Recipe(difference=True),
}


class CommonSAM(torch.optim.Optimizer):
    """The ascents of a method, written as in the common recipe.

    Call `ascend` after each gradient except the last, and `restore_and_step` after the last.

    Args:
        params: the parameters.
        method: one of `METHODS`.
        rho: the method's rho, as for the library's optimizers.
        base: class of the base optimizer.
        settings: options of the base optimizer.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        method: str,
        rho: float,
        base: type[torch.optim.Optimizer],
        **settings: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups
        self.recipe, self.rho = METHODS[method], rho
        self._ascents = 0
        self._eps: Tensor | float = 1.0

    @torch.no_grad()
    def ascend(self) -> None:
        """Perturb the parameters and clear the gradients."""
        scale = self._scale()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if self._ascents == 0:
                    state["old_p"] = p.data.clone()
                    if self.recipe.difference:
                        state["old_grad"] = p.grad.clone()
                    direction = p.grad
                    if self.recipe.adaptive:
                        direction = torch.pow(p, 2) * p.grad
                    e_w = scale * direction
                    p.add_(e_w)
                elif self.recipe.again:
                    e_w = self.rho * p.grad
                    p.add_(e_w)
                else:
                    hessian_times_grad = (p.grad - state["old_grad"]) / self._eps
                    p.data = state["old_p"] + self.rho * hessian_times_grad
        self._ascents += 1
        self.zero_grad()

    @torch.no_grad()
    def restore_and_step(self) -> None:
        """Restore the parameters and step the base optimizer."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self._ascents = 0

    def _scale(self) -> Tensor | float:
        """The length of the first perturbation over that of its direction."""
        if self._ascents > 0 or not (self.recipe.normalized or self.recipe.difference):
            return self.rho
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        if self.recipe.adaptive:
            grads = [torch.abs(p) * g for p, g in zip(params, grads, strict=True)]
        norm = _norm(grads)
        if self.recipe.normalized:
            return self.rho / (norm + TINY)
        self._eps = FD_STEP * (1 + _norm([p.data for p in params])) / (norm + TINY)
        return self._eps


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(t) for t in tensors])
    return norms.square().sum().sqrt()
