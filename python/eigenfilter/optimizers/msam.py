"""Momentum-SAM: the gradient is taken ahead along the momentum buffer, at a given distance."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import torch
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
from eigenfilter.optimizers.updates import EXTRAPOLATED_RHO, MOMENTUM, SGDUpdate

NORM = "momentum_norm"  # in a group: the |m| by which its rho is divided
MOST_AHEAD = 1000  # times lr: then a step's update errs by as many roundings of itself


class MSAMUpdate(SGDUpdate):
    """Heavy ball whose gradient is taken at y = x - e m with e = rho / |m|.

    The parameters of a group hold y, with the rho that the group has as `extrapolated_rho` and the
    |m| that it has as `momentum_norm`. The kernel of a step goes on by that e to x - e m with the
    new x and m, and with the norm of the new m they are moved along it to the next y.
    """

    extrapolated_key = EXTRAPOLATED_RHO
    needs_norm = True

    def __init__(self) -> None:
        self._start(None)

    def _start(self, amp: AmpState | None) -> None:
        self._amp = amp
        # Parameters that this step or move has reached, with the e that they have now.
        self._reached: list[tuple[ParamBucket, float | Tensor]] = []

    def begin(self) -> None:
        self._start(None)

    def writes_first(self, bucket_slice: BucketSlice) -> bool:
        return True  # `factors` may go to x

    def factors(self, bucket_slice: BucketSlice) -> tuple[float | Tensor, float | Tensor]:
        """The factor of m and the e of the kernel, which is 0 where the step has to start from x.

        Between kernel and norm the parameters are e times the new m ahead of x. Where e is so much
        larger than lr that they would lose digits of the update, they go back to x first. A decay
        that the kernel takes there acts at y by the factor of m, because wd y = wd x - wd e m.
        """
        bucket, self._amp = bucket_slice.bucket, bucket_slice.amp
        group, e = bucket.group, _present(bucket)
        momentum: float | Tensor = group["momentum"]
        if isinstance(e, Tensor):
            is_far = e > MOST_AHEAD * _in_float64(group["lr"])
            back = e * is_far  # not torch.where, which copies a number to the device
            e = e - back
            self._move(bucket, back, ~is_far)
            if not is_zero(group["weight_decay"]):
                momentum, keep = _in_float64(momentum), 1 - _in_float64(group["dampening"])
                momentum = momentum - keep * _in_float64(group["weight_decay"]) * back
        self._reached.append((bucket, e))
        return momentum, e

    def end(self, buckets: ParamBuckets, amp: AmpState) -> None:
        """Go on to the next y, unless the step is skipped."""
        super().end(buckets, amp)
        self._amp = amp
        changed = any(g["rho"] != g[EXTRAPOLATED_RHO] for g in buckets.groups)
        if not changed or not any(map(amp.is_skipped, buckets.devices)):
            self._go_to(buckets, [(g, g["rho"]) for g in buckets.groups])

    def cancel(self) -> None:
        """Bring all parameters to the y by the rho and the norm of the step before."""
        done: set[int] = set()
        for bucket, e in reversed(self._reached):
            rest = [i for i, p in enumerate(bucket.params) if id(p) not in done]
            if rest:
                self._move(bucket.subset(rest), e - _present(bucket))
                done.update(map(id, bucket.params))
        self._start(None)

    def extrapolate(
        self, buckets: ParamBuckets, wanted: Sequence[tuple[dict[str, Any], float]]
    ) -> None:
        """Change y = x - rho m / |m| of groups from their present rho to the one that is wanted."""
        self._start(None)
        for bucket, has_momentum in buckets.by_state():  # errors come before the first write
            if has_momentum:
                lists = bucket.tensors, bucket.like_params(MOMENTUM)
                _core.check(("params", MOMENTUM), lists, (True, False))
        try:
            self._go_to(buckets, wanted)
        except BaseException:
            self.cancel()
            raise
        buckets.store.has_written = True

    def _go_to(self, buckets: ParamBuckets, wanted: Sequence[tuple[dict[str, Any], float]]) -> None:
        """Bring all parameters from where they are to the y that is wanted."""
        rho_of = {id(group): rho for group, rho in wanted}
        parts = [bucket for bucket, has_momentum in buckets.by_state() if has_momentum]
        ahead = [bucket for bucket in parts if rho_of[id(bucket.group)] != 0]
        norms = total_norms([(b, b.buffers(MOMENTUM)) for b in ahead], key=MOMENTUM)
        norm = next(iter(norms.values()), None)
        reached = {id(p): e for bucket, e in self._reached for p in bucket.params}
        for bucket in parts:
            present, after = _present(bucket), _factor(bucket, rho_of[id(bucket.group)], norm)
            before = [reached.get(id(p), present) for p in bucket.params]
            by_e = {id(e): e for e in before}
            for key, (part, _) in bucket.split(bucket.params, list(map(id, before))).items():
                self._move(part, by_e[key] - after)
                self._reached.append((part, after))
                if by_e[key] is present:  # the others were marked by their step
                    buckets.mark_written([part])
        for group, rho in wanted:
            group[EXTRAPOLATED_RHO] = rho
            if norm is not None:
                self._keep_norm(group, norm)
        self._start(None)

    def _keep_norm(self, group: dict[str, Any], norm: Tensor) -> None:
        """Write the norm where a CUDA graph has read it; a skipped step leaves it as it was."""
        kept = group[NORM]
        if not isinstance(kept, Tensor) or kept.device != norm.device:
            group[NORM] = norm.clone()
            return
        flag = None if self._amp is None else self._amp.flag(norm.device)
        kept.copy_(norm if flag is None else torch.where(flag.reshape(()) != 0, kept, norm))

    def _move(
        self, bucket: ParamBucket, alpha: float | Tensor, stays: Tensor | None = None
    ) -> None:
        """Move by alpha m, unless the step is skipped or the flag `stays` is set."""
        if is_zero(alpha):
            return
        stop = None if self._amp is None else self._amp.flag(bucket.device)
        if stays is not None:
            stop = stays.float() if stop is None else stop.reshape(()).maximum(stays)
        bucket.move(bucket.along(MOMENTUM), alpha, found_inf=stop)


def _present(bucket: ParamBucket) -> float | Tensor:
    """The e in y = x - e m that the parameters of a bucket have."""
    return _factor(bucket, bucket.group[EXTRAPOLATED_RHO], bucket.group[NORM])


def _factor(bucket: ParamBucket, rho: float, norm: Tensor | float | None) -> float | Tensor:
    """e = rho / |m|, float64 on the bucket's device; the number 0 for none."""
    if rho == 0 or not isinstance(norm, Tensor):
        return 0.0
    return rho / (norm.to(bucket.device) + TINY)


def _in_float64(value: float | Tensor) -> float | Tensor:
    return value.double().reshape(()) if isinstance(value, Tensor) else value


@register("msam")
class MSAM(ExtrapolatedOptimizer):
    r"""Momentum-SAM: one gradient a step, taken ahead along the normalized momentum buffer.

    With g = grad f (-g with `maximize`) and the norm |m| over all groups whose rho is not 0:

        y = x - rho m / |m|
        m <- momentum m + (1 - dampening) (g(y) + wd y)        (first step: m <- g(y) + wd y)
        x <- x - lr m

    Between steps the parameters hold y, so that no closure and no further memory is needed; a step
    costs one gradient, heavy ball's accesses, a norm, and a perturbation. Nothing waits for the
    device. Evaluate and save x: call `eval()` before, and `train()` to go on. Parameters of 16 bits
    are rounded twice in a step: set `master_weight_bits`, so that small updates count.

    It is `SGD(extrapolation=e)` with e = rho / |m|: as |m| falls, e and with it the pull to flat
    regions grow, as SAM's does with the gradient. The filter at a given |m| is
    `eigenfilter.filters.MSAM`. Where its iterates stay, every eigenvalue lambda of the Hessian
    satisfies 0 <= (lr + 2 rho / |m|) (1 - dampening) (lambda + wd) <= 2 (1 + momentum).

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate, at least 0; a number or a 0-dim tensor.
        momentum: decay rate of the momentum buffer, in (0, 1).
        dampening: share of each gradient, in [0, 1], that stays out of the momentum buffer.
        weight_decay: coefficient wd of the L2 penalty, at least 0. It acts at y, as the loss does.
        rho: distance from x to y over all parameters, a number, at least 0; 0 is heavy ball. 1e-12
            is added to |m|. It lives in param_groups, and a change of it takes effect at the end
            of the next step, or with `train()`.
        options: the keyword arguments of `Options`.

    Raises:
        TypeError: a parameter is sparse or complex; rho is no number.
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
        group |= {EXTRAPOLATED_RHO: None, NORM: 0.0}
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
            raise TypeError(
                f"rho must be a number, and is {rho!r}: MSAM compares it, which would wait for a "
                'device. A RhoScheduler of kind "lr" gives a number where lr is one'
            )
        if is_zero(group["momentum"]) or group["nesterov"]:
            raise ValueError("MSAM follows the buffer of heavy ball: set momentum > 0, no nesterov")

    def _wanted(self, group: dict[str, Any]) -> float:
        rho: float = group["rho"]
        return rho
