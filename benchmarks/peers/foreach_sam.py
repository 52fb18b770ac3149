"""Sharpness-aware minimization with torch's multi-tensor functions, written to be fast.

Backups are allocated once, every operation takes all tensors at once, nothing waits for the device,
and the base optimizer is fused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.peers.common_sam import FD_STEP, METHODS, TINY


class ForeachSAM:
    """The ascents of a method in torch._foreach functions.

    Args:
        params: the parameters.
        method: see `CommonSAM`.
        rho: the method's rho, as for the library's optimizers.
        base: the base optimizer.
    """

    def __init__(
        self, params: Sequence[Parameter], method: str, rho: float, base: torch.optim.Optimizer
    ) -> None:
        self.base_optimizer = base
        self.params: list[Tensor] = [p.detach() for p in params]
        self.owners = params
        self.recipe, self.rho = METHODS[method], rho
        self.backups = [torch.empty_like(p) for p in self.params]
        self.first_grads: list[Tensor] = []
        self._ascents = 0
        self._eps: Tensor | float = 1.0

    @torch.no_grad()
    def ascend(self) -> None:
        """Perturb the parameters and clear the gradients."""
        grads = [p.grad for p in self.owners if p.grad is not None]
        if self._ascents == 0:
            torch._foreach_copy_(self.backups, self.params)
            self._first_ascent(grads)
        elif self.recipe.again:
            torch._foreach_add_(self.params, grads, alpha=self.rho)
        else:
            torch._foreach_sub_(grads, self.first_grads)
            torch._foreach_mul_(grads, self.rho / self._eps)
            torch._foreach_copy_(self.params, self.backups)
            torch._foreach_add_(self.params, grads)
        self._ascents += 1
        for p in self.owners:
            p.grad = None

    @torch.no_grad()
    def restore_and_step(self) -> None:
        """Restore the parameters and step the base optimizer."""
        torch._foreach_copy_(self.params, self.backups)
        self.base_optimizer.step()
        self._ascents = 0

    def _first_ascent(self, grads: list[Tensor]) -> None:
        if not (self.recipe.normalized or self.recipe.difference):
            torch._foreach_add_(self.params, grads, alpha=self.rho)
            return
        if self.recipe.adaptive:
            grads = list(torch._foreach_mul(grads, self.params))
        norm = torch.nn.utils.get_total_norm(grads)
        scale = self.rho / (norm + TINY)
        if self.recipe.difference:
            self.first_grads = grads
            length = torch.nn.utils.get_total_norm(self.params)
            self._eps = scale = FD_STEP * (1 + length) / (norm + TINY)
            torch._foreach_add_(self.params, torch._foreach_mul(grads, scale))
            return
        torch._foreach_mul_(grads, scale)
        if self.recipe.adaptive:
            torch._foreach_mul_(grads, self.params)
        torch._foreach_add_(self.params, grads)
