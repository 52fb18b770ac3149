"""AdamW, plain and sharpness-aware."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from eigenfilter.filters import design
from eigenfilter.optimizers.extrapolation import ExtrapolatedOptimizer
from eigenfilter.optimizers.hyperparameters import MethodOptions, split_options
from eigenfilter.optimizers.registry import perturbation_of, register
from eigenfilter.optimizers.updates import EXTRAPOLATION, STEP, AdamWUpdate


@register("adamw")
class AdamW(ExtrapolatedOptimizer):
    r"""AdamW with its gradient taken after an ascent; plain AdamW at rho = 0, the default.

        g = grad f at the point that `method` ascends to from x
        m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
        x <- (1 - lr wd) x - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    with t the number of the step. Where the method converges with P = sqrt(v / (1 - beta2^t)) + eps
    as it is then, every eigenvalue mu of P^-1/2 H P^-1/2 satisfies -wd <= mu <= (1 + beta1) (2 -
    lr wd) / ((1 - beta1) lr): see `eigenfilter.filters.AdamW`.

    With an extrapolation e the gradient and the decay are taken at y = x - e u, where u is the
    update m / (1 - beta1^t) / P that the last step took times lr (0 before the first). Between
    steps the parameters hold y, so that a step costs what AdamW's costs: one gradient, no closure,
    no further memory. For e >= 0 the edge is then (1 + beta1) (2 - lr wd) / ((1 - beta1) (lr + 2
    e)), anywhere below AdamW's. Evaluate and save x: call `eval()` before, and `train()` to go on.
    The point from which a `method` ascends is y, too.

    One kernel call updates all tensors of a group that share a device and a dtype. The state is
    torch.optim.AdamW's.

    Memory: two moments, and one backup of the parameters if there is an ascent.

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate, at least 0; a number or a 0-dim tensor.
        betas: decay rates (beta1, beta2) of the two moments, each in [0, 1).
        eps: term that keeps the quotient finite, at least 0.
        weight_decay: coefficient wd of the decoupled weight decay, at least 0.
        amsgrad: must be False; see `Options`.
        method: how to ascend: "usam", "sam", "two_step_usam" or "hessian_usam".
        rho: radius of that method's ascent, at least 0; see the optimizer of the method. It
            lives in param_groups, as lr does.
        extrapolation: how far e along -u the gradient is taken; a number, by default 0. It lives in
            param_groups, and a change of it takes effect with the next gradient. u is that of the
            present betas and eps: to change these shifts x by e times the change of u. It is
            refused for float16 parameters without `state_bits`: their second moments underflow.
        max_eigenvalue: the edge that is wanted, in place of `extrapolation`: each group gets the e
            that puts its edge, of the preconditioned Hessian, there at its present lr.
        adaptive: option of the method "sam", see `SAM`.
        ascent: option of the method "two_step_usam", see `TwoStepUSAM`.
        hvp, fd_step: options of the method "hessian_usam", see `HessianUSAM`.
        options: the keyword arguments of `Options`.

    Raises:
        TypeError: a parameter is sparse, complex or of an unsupported dtype, or float16 with an
            extrapolation and no `state_bits`; an option is unknown.
        ValueError: a hyperparameter is out of its range; the method is unknown.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = eigenfilter.AdamW([x], lr=0.1, method="sam", rho=0.05)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(5.)
        >>> x.data
        tensor([ 0.8990, -1.8980])

    Source: I. Loshchilov and F. Hutter, 2019, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        method: str = "usam",
        rho: float | Tensor = 0.0,
        extrapolation: float | None = None,
        max_eigenvalue: float | None = None,
        **options: Unpack[MethodOptions],
    ) -> None:
        shared, own = split_options(options)
        group: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        group |= {"weight_decay": weight_decay, "rho": rho}
        group |= self._extrapolation_options(extrapolation, max_eigenvalue)
        perturbation = perturbation_of(method, **own)
        super().__init__(params, group, perturbation, AdamWUpdate(), shared | {"amsgrad": amsgrad})

    def _check_extrapolation(self, group: dict[str, Any]) -> None:
        super()._check_extrapolation(group)
        halves = any(p.dtype == torch.float16 for p in group["params"])
        if group[EXTRAPOLATION] != 0 and halves and self.state_bits is None:
            raise TypeError(
                "an extrapolation of AdamW with float16 parameters: squared gradients below 6e-8 "
                "vanish in their second moment, and the update along which it goes is then far too "
                "long. Use bfloat16 or float32 parameters, state_bits=32, or extrapolation=0"
            )

    def _extrapolation_for(self, group: dict[str, Any], max_eigenvalue: float) -> float:
        values: dict[str, Any] = {name: float(group[name]) for name in ("lr", "weight_decay")}
        return float(design("adamw", max_eigenvalue, beta1=float(group["betas"][0]), **values))

    def compressed_state_dict(self) -> dict[str, Any]:
        saved = super().compressed_state_dict()
        saved["state"] = {
            key: entry | {STEP: entry[STEP].clone()} if STEP in entry else entry
            for key, entry in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict.get("param_groups", ()):
            if group.get("decoupled_weight_decay") is False and group.get("weight_decay", 0) != 0:
                raise ValueError(
                    "this state is of torch.optim.Adam, which adds weight decay to the gradient, "
                    "as AdamW does not: load it into torch.optim.Adam, or set weight_decay to 0 "
                    "in its param_groups first"
                )
        super().load_state_dict(state_dict)
