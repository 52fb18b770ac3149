"""AdamW, plain and sharpness-aware."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._descents import STEP, AdamWDescent
from eigenfilter.optimizers._methods import ascent_of
from eigenfilter.optimizers._options import split_options


class AdamW(EigenfilterOptimizer):
    r"""AdamW with its gradient taken where an ascent leads; plain AdamW at rho = 0, the default.

        g = grad f at the point that `method` ascends to from x
        m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2
        x <- (1 - lr wd) x - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

    with t the number of the step. The whole update is one kernel over all tensors of a device,
    dtype and group. The state is torch.optim.AdamW's.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, >= 0; a number or a 0-dim tensor.
        betas: (beta1, beta2), each in [0, 1).
        eps: >= 0.
        weight_decay: wd, >= 0; decoupled.
        method: how to ascend: "usam", "sam", "two_step_usam" or "hessian_usam".
        rho: of the ascent, >= 0; see the optimizer of that method. It lives in param_groups.
        maximize: ascend f.
        stochastic_rounding: round what is written to bfloat16 and float16 parameters and state up
            or down at random, right on average, so that small updates are not lost.
        skip_nonfinite: leave parameters and state as they were where a gradient is not finite.
        release_gradients: apply and drop each of the descent's gradients while backward runs, so
            that they never exist all at once. Takes step(closure), or the closure inside
            `with opt.evaluation():`, and no GradScaler, clipping, skip_nonfinite or several ranks.
        backend: None, "native", "triton" or "reference": see `eigenfilter.kernels`.
        options: further arguments of the method's ascent: `adaptive` ("sam"), `ascent`
            ("two_step_usam"), `hvp` and `fd_step` ("hessian_usam"). `set_to_none=False` keeps the
            gradient tensors when an ascent clears them, and fills them with 0. Torch's `fused`,
            `foreach`, `capturable` change nothing; `differentiable` and `amsgrad` must be False.

    Raises:
        TypeError: sparse, complex or otherwise unsupported parameters; an unknown option.
        ValueError: a hyperparameter out of its range; an unknown method.

    Example:
        >>> opt = eigenfilter.AdamW(model.parameters(), lr=1e-3, method="sam", rho=0.05)
        >>> loss = opt.step(closure)

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
        maximize: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        release_gradients: bool = False,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        torchs, options = split_options(options | {"amsgrad": amsgrad})
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "rho": rho,
        }
        super().__init__(
            params,
            defaults,
            ascent_of(method, **options),
            AdamWDescent(),
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            backend=backend,
            options=torchs,
        )

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
