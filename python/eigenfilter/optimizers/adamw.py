"""AdamW, plain and sharpness-aware."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import Tensor

from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.hyperparameters import MethodOptions, split_options
from eigenfilter.optimizers.registry import perturbation_of, register
from eigenfilter.optimizers.updates import STEP, AdamWUpdate


@register("adamw")
class AdamW(EigenfilterOptimizer):
    r"""AdamW with its gradient taken after an ascent; plain AdamW at rho = 0, the default.

        g = grad f at the point that `method` ascends to from x
        m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
        x <- (1 - lr wd) x - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    with t the number of the step. One kernel call updates all tensors of a group that share a
    device and a dtype. The state is torch.optim.AdamW's.

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
        adaptive: option of the method "sam", see `SAM`.
        ascent: option of the method "two_step_usam", see `TwoStepUSAM`.
        hvp, fd_step: options of the method "hessian_usam", see `HessianUSAM`.
        options: the keyword arguments of `Options`.

    Raises:
        TypeError: a parameter is sparse, complex or of an unsupported dtype; an option is unknown.
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
        **options: Unpack[MethodOptions],
    ) -> None:
        shared, own = split_options(options)
        group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rho": rho}
        perturbation = perturbation_of(method, **own)
        super().__init__(params, group, perturbation, AdamWUpdate(), shared | {"amsgrad": amsgrad})

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
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
