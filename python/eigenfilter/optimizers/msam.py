"""Momentum-SAM: the gradient is taken ahead along the momentum buffer, at a given distance."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

from torch import Tensor

from eigenfilter import _core
from eigenfilter.optimizers._norms import total_norms
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.buckets import BucketSlice, ParamBucket, ParamBuckets
from eigenfilter.optimizers.extrapolation import ExtrapolatedOptimizer
from eigenfilter.optimizers.hyperparameters import Options, is_zero
from eigenfilter.optimizers.perturbation import TINY, Perturbation
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import EXTRAPOLATED, EXTRAPOLATION, MOMENTUM, SGDUpdate

NORM = "momentum_norm"  # in a group: the |m| by which its parameters' extrapolation is divided


class MSAMUpdate(SGDUpdate):
    """Heavy ball whose gradient is taken at y = x - rho m / |m|.

    The parameters of a group hold y, with the rho that the group has as `extrapolated` and the |m|
    that it has as `momentum_norm`. A step brings them to x, and with the norm of the new m they go
    on to the next y.
    """

    needs_norm = True

    def __init__(self) -> None:
        self._updated: list[ParamBucket] = []  # in this step: they are at x

    def begin(self) -> None:
        self._updated.clear()

    def step(self, bucket_slice: BucketSlice) -> None:
        super().step(bucket_slice)
        self._updated.append(bucket_slice.bucket)

    def cancel(self) -> None:
        """Bring what the step has updated from x to a y by the norm of the step before."""
        for bucket in self._updated:
            e = _factor(bucket, bucket.group[EXTRAPOLATED], bucket.group[NORM])
            _perturb(bucket, -e, None)
        self._updated.clear()

    def extrapolation(self, bucket: ParamBucket) -> dict[str, Any]:
        e = _factor(bucket, bucket.group[EXTRAPOLATED], bucket.group[NORM])
        return {EXTRAPOLATION: e, "to_iterate": not is_zero(e)}

    def end(self, buckets: ParamBuckets, amp: AmpState) -> None:
        """Go on from x to the next y, unless the step is skipped."""
        updated, self._updated = self._updated, []
        changed = any(g["rho"] != g[EXTRAPOLATED] for g in buckets.groups)
        if not changed or not any(map(amp.is_skipped, buckets.devices)):
            self._move(buckets, [(g, g["rho"]) for g in buckets.groups], updated, amp)

    def extrapolate(
        self, buckets: ParamBuckets, wanted: Sequence[tuple[dict[str, Any], float]]
    ) -> None:
        """Change y = x - rho m / |m| of groups from their present rho to the one that is wanted."""
        self._move(buckets, wanted, [], None)

    def _move(
        self,
        buckets: ParamBuckets,
        wanted: Sequence[tuple[dict[str, Any], float]],
        at_x: Sequence[ParamBucket],
        amp: AmpState | None,
    ) -> None:
        """Bring all parameters from the present y, or from x, to the y that is wanted."""
        rho_of = {id(group): rho for group, rho in wanted}
        parts = [bucket for bucket, has_momentum in buckets.by_state() if has_momentum]
        if amp is None:
            for bucket in parts:  # errors come before the first write; a step has checked them
                lists = bucket.tensors, bucket.buffers(MOMENTUM)
                _core.check(("params", MOMENTUM), lists, (True, False))
        ahead = [bucket for bucket in parts if rho_of[id(bucket.group)] != 0]
        norms = total_norms([(bucket, bucket.buffers(MOMENTUM)) for bucket in ahead])
        norm = next(iter(norms.values()), None)
        ids = {id(p) for bucket in at_x for p in bucket.params}
        for bucket in parts:
            e = _factor(bucket, bucket.group[EXTRAPOLATED], bucket.group[NORM])
            after = _factor(bucket, rho_of[id(bucket.group)], norm)
            if bucket in at_x:
                _perturb(bucket, -after, amp)
                continue
            moved = [id(p) in ids for p in bucket.params]
            for is_at_x, (part, _) in bucket.split(bucket.params, moved).items():
                _perturb(part, -after if is_at_x else e - after, amp)
                buckets.store.has_written = True
                buckets.mark_written([part])
        for group, rho in wanted:
            group[EXTRAPOLATED] = rho
            group[NORM] = group[NORM] if norm is None else norm


def _factor(bucket: ParamBucket, rho: float, norm: Tensor | float | None) -> float | Tensor:
    """e = rho / |m| in y = x - e m, float64 on the bucket's device; the number 0 for none."""
    if rho == 0 or not isinstance(norm, Tensor):
        return 0.0
    return rho / (norm.to(bucket.device) + TINY)


def _perturb(bucket: ParamBucket, alpha: float | Tensor, amp: AmpState | None) -> None:
    if not is_zero(alpha):
        momenta = bucket.buffers(MOMENTUM)
        found_inf = None if amp is None else amp.flag(bucket.device)
        bucket.kernels.perturb(
            bucket.tensors, momenta, None, alpha, save=False, found_inf=found_inf
        )


@register("msam")
class MSAM(ExtrapolatedOptimizer):
    r"""Momentum-SAM: one gradient a step, taken ahead along the normalized momentum buffer.

    With g = grad f (-g with `maximize`) and the norm |m| over all groups whose rho is not 0:

        y = x - rho m / |m|
        m <- momentum m + (1 - dampening) (g(y) + wd y)        (first step: m <- g(y) + wd y)
        x <- x - lr m

    Between steps the parameters hold y, so that no closure and no further memory is needed; a step
    costs one gradient, heavy ball's accesses, a norm, and a perturbation. Nothing waits for the
    device. Evaluate and save x: call `eval()` before, and `train()` to go on.

    It is `SGD(extrapolation=e)` with e = rho / |m|: as |m| falls, e and with it the pull to flat
    regions grow, as SAM's does with the gradient. The filter at a given |m| is
    `eigenfilter.filters.MSAM`. Where the method settles, every eigenvalue lambda of the Hessian
    satisfies 0 <= (lr + 2 rho / |m|) (1 - dampening) (lambda + wd) <= 2 (1 + momentum).

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate, at least 0; a number or a 0-dim tensor.
        momentum: decay rate of the momentum buffer, in (0, 1).
        dampening: share of each gradient, in [0, 1], that stays out of the momentum buffer.
        weight_decay: coefficient wd of the L2 penalty, at least 0.
        rho: distance from x to y over all parameters, a number, at least 0; 0 is heavy ball. It
            lives in param_groups, and a change of it takes effect with the next gradient.
        options: the keyword arguments of `Options`.

    Raises:
        TypeError: a parameter is sparse, complex or of an unsupported dtype; rho is no number.
        ValueError: a hyperparameter is out of its range, or `release_gradients` is set.
        RuntimeError: the parameters are flat shards of FSDP1, or those of one rank of a
            ZeroRedundancyOptimizer, over which no norm is taken.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = eigenfilter.MSAM([x], lr=0.1, momentum=0.9, rho=0.05)
        >>> for _ in range(100):
        ...     opt.zero_grad()
        ...     x.square().sum().backward()
        ...     opt.step()
        >>> opt.eval()
        >>> bool(x.detach().norm() < 0.1)
        True

    Source: M. Becker, F. Altrock and B. Risse, 2024, arXiv 2401.12033; the edge is ours.
    """

    method = "msam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        *,
        rho: float = 0.05,
        **options: Unpack[Options],
    ) -> None:
        group: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening}
        group |= {"weight_decay": weight_decay, "nesterov": False, "rho": rho}
        group |= {EXTRAPOLATED: None, NORM: 0.0}
        if options.get("release_gradients"):
            raise ValueError(
                "release_gradients=True updates each parameter by itself, and MSAM goes on to the "
                "next y by the norm of all momentum buffers: leave it False, or use "
                "SGD(extrapolation=...)"
            )
        super().__init__(params, group, Perturbation(), MSAMUpdate(), options)

    def _check_extrapolation(self, group: dict[str, Any]) -> None:
        EigenfilterOptimizer._check_extrapolation(self, group)
        rho = group["rho"]
        if isinstance(rho, bool) or not isinstance(rho, numbers.Real):
            raise TypeError(f"rho must be a number, and is {rho!r}")
        if is_zero(group["momentum"]) or group["nesterov"]:
            raise ValueError("MSAM follows the buffer of heavy ball: set momentum > 0, no nesterov")

    def _wanted(self, group: dict[str, Any]) -> float:
        rho: float = group["rho"]
        return rho
