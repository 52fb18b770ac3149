"""The common recipe for sharpness-aware minimisation around any torch optimizer.

A loop over the parameters that clones each, adds its perturbation, later puts the clone back, and
hands over to the base optimizer: the pattern that is widely copied into training code. That is
usually *normalised* SAM; this one leaves the gradient's norm away, in its favour, because it is
compared with USAM and has to do the same work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter


class CommonUSAM(torch.optim.Optimizer):
    """USAM with momentum SGD, as the common recipe writes it.

    `first_step` moves to x + rho grad f(x), `second_step` goes back to x and takes SGD's step.
    """

    def __init__(self, params: Iterable[Parameter], *, rho: float, **sgd: Any) -> None:
        super().__init__(params, {"rho": rho, **sgd})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **sgd)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        """Save the parameters, move them, clear the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["old_p"] = p.data.clone()
                e_w = group["rho"] * p.grad
                p.add_(e_w)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Put the parameters back and step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
