"""The common recipe for sharpness-aware minimization around any torch optimizer.

A loop over the parameters that clones each, adds its perturbation, later puts the clone back, and
hands over to the base optimizer: the pattern that is widely copied into training code, for every
method of the library.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

TINY = 1e-12
FD_STEP = 2.0**-11.5  # square root of float32's machine precision


class CommonSAM(torch.optim.Optimizer):
    """A method's ascents as the common recipe writes them.

    `ascend` is called with each gradient but the last, `descend` with that.

    Args:
        params: parameters.
        method: "usam", "sam", "asam", "two_step_usam" or "hessian_usam" (finite differences).
        rho: of the ascents.
        base: class of the base optimizer.
        settings: the base's.
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
        self.method, self.rho = method, rho
        self._taken = 0
        self._eps: Tensor | float = 1.0

    @torch.no_grad()
    def ascend(self) -> None:
        """Move the parameters, clear the gradients."""
        scale = self._scale()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if self._taken == 0:
                    state["old_p"] = p.data.clone()
                    if self.method == "hessian_usam":
                        state["old_grad"] = p.grad.clone()
                    direction = p.grad
                    if self.method == "asam":
                        direction = torch.pow(p, 2) * p.grad
                    e_w = scale * direction
                    p.add_(e_w)
                elif self.method == "two_step_usam":
                    e_w = self.rho * p.grad
                    p.add_(e_w)
                else:
                    hessian_times_grad = (p.grad - state["old_grad"]) / self._eps
                    p.data = state["old_p"] + self.rho * hessian_times_grad
        self._taken += 1
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        """Put the parameters back and step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self._taken = 0

    def _scale(self) -> Tensor | float:
        """Length of the first move over that of the gradient."""
        if self._taken > 0 or self.method in ("usam", "two_step_usam"):
            return self.rho
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        if self.method == "asam":
            grads = [torch.abs(p) * g for p, g in zip(params, grads, strict=True)]
        norm = _norm(grads)
        if self.method in ("sam", "asam"):
            return self.rho / (norm + TINY)
        self._eps = FD_STEP * (1 + _norm([p.data for p in params])) / (norm + TINY)
        return self._eps


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(t) for t in tensors])
    return norms.square().sum().sqrt()
