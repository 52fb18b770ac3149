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


class MSAMUpdate(SGDUpdate):
    """Heavy ball whose gradient is taken at y = x - rho m / |m|.

    The parameters of a group hold y, with the rho that the group has as `extrapolated_rho` and the
    |m| that it has as `momentum_norm`. A step brings them to x, and with the norm of the new m they
    go on to the next y.
    """

    extrapolated_key = EXTRAPOLATED_RHO
    needs_norm = True

    def __init__(self) -> None:
        self._start(None)

    def _start(self, amp: AmpState | None) -> None:
        self._amp = amp
        self._updated: list[ParamBucket] = []  # in this step
        self._at_x: set[int] = set()  # ids of the parameters that are at x
        self._moved: list[tuple[ParamBucket, float | Tensor]] = []  # with what takes them back

    def begin(self) -> None:
        self._start(None)

    def writes_first(self, bucket_slice: BucketSlice) -> bool:
        return True  # `step` goes to x

    def momentum(self, bucket: ParamBucket) -> float | Tensor:
        """With this factor of m a decay that the kernel takes at x acts at y = x - e m.

        Because wd y = wd x - wd e m, it is momentum - (1 - dampening) wd e. A buffer that is new is
        0, so that its factor does not matter.
        """
        e, group = _present(bucket), bucket.group
        if is_zero(e) or is_zero(group["weight_decay"]):
            return super().momentum(bucket)
        names = ("momentum", "dampening", "weight_decay")
        momentum, dampening, decay = (_in_float64(group[name]) for name in names)
        return momentum - (1 - dampening) * decay * e

    def step(self, bucket_slice: BucketSlice) -> None:
        bucket, self._amp = bucket_slice.bucket, bucket_slice.amp
        if bucket_slice.state_signature:
            self._perturb(bucket, _present(bucket))
        self._updated.append(bucket)
        self._at_x.update(map(id, bucket.params))
        super().step(bucket_slice)

    def end(self, buckets: ParamBuckets, amp: AmpState) -> None:
        """Go on from x to the next y, unless the step is skipped."""
        self._amp = amp
        changed = any(g["rho"] != g[EXTRAPOLATED_RHO] for g in buckets.groups)
        if not changed or not any(map(amp.is_skipped, buckets.devices)):
            self._move(buckets, [(g, g["rho"]) for g in buckets.groups])

    def cancel(self) -> None:
        """Bring all parameters to the y by the rho and the norm of the step before."""
        while self._moved:
            self._perturb(*self._moved.pop())
        for bucket in self._updated:
            rest = [i for i, p in enumerate(bucket.params) if id(p) in self._at_x]
            if rest:
                self._perturb(bucket.subset(rest), -_present(bucket))
        self._start(None)

    def extrapolate(
        self, buckets: ParamBuckets, wanted: Sequence[tuple[dict[str, Any], float]]
    ) -> None:
        """Change y = x - rho m / |m| of groups from their present rho to the one that is wanted."""
        self._start(None)
        for bucket, has_momentum in buckets.by_state():  # errors come before the first write
            if has_momentum:
                lists = bucket.tensors, bucket.buffers(MOMENTUM)
                _core.check(("params", MOMENTUM), lists, (True, False))
        try:
            self._move(buckets, wanted)
        except BaseException:
            self.cancel()
            raise
        buckets.store.has_written = True

    def _move(self, buckets: ParamBuckets, wanted: Sequence[tuple[dict[str, Any], float]]) -> None:
        """Bring all parameters from the present y, or from x, to the y that is wanted."""
        rho_of = {id(group): rho for group, rho in wanted}
        parts = [bucket for bucket, has_momentum in buckets.by_state() if has_momentum]
        ahead = [bucket for bucket in parts if rho_of[id(bucket.group)] != 0]
        norms = total_norms([(bucket, bucket.buffers(MOMENTUM)) for bucket in ahead])
        norm = next(iter(norms.values()), None)
        for bucket in parts:
            before = _present(bucket)
            after = _factor(bucket, rho_of[id(bucket.group)], norm)
            for is_at_x, part in self._split(bucket):
                self._perturb(part, -after if is_at_x else before - after)
                self._moved.append((part, after - before))
                self._at_x.difference_update(map(id, part.params))
                if not is_at_x:
                    buckets.mark_written([part])
        for group, rho in wanted:
            group[EXTRAPOLATED_RHO] = rho
            if norm is not None:
                self._keep_norm(group, norm)
        self._start(None)

    def _split(self, bucket: ParamBucket) -> list[tuple[bool, ParamBucket]]:
        """The parameters of a bucket that are at x, and the others."""
        is_at_x = [id(p) in self._at_x for p in bucket.params]
        if len(set(is_at_x)) == 1:
            return [(is_at_x[0], bucket)]
        parts = bucket.split(bucket.params, is_at_x).items()
        return [(key, part) for key, (part, _) in parts]

    def _keep_norm(self, group: dict[str, Any], norm: Tensor) -> None:
        """Write the norm where a CUDA graph has read it; a skipped step leaves it as it was."""
        kept = group[NORM]
        if not isinstance(kept, Tensor) or kept.device != norm.device:
            group[NORM] = norm.clone()
            return
        flag = None if self._amp is None else self._amp.flag(norm.device)
        kept.copy_(norm if flag is None else torch.where(flag.reshape(()) != 0, kept, norm))

    def _perturb(self, bucket: ParamBucket, alpha: float | Tensor) -> None:
        if not is_zero(alpha):
            momenta = bucket.buffers(MOMENTUM)
            found_inf = None if self._amp is None else self._amp.flag(bucket.device)
            bucket.kernels.perturb(
                bucket.tensors, momenta, None, alpha, save=False, found_inf=found_inf
            )


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
    costs one gradient, heavy ball's accesses, a norm, and two perturbations. Nothing waits for the
    device. Evaluate and save x: call `eval()` before, and `train()` to go on.

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
        TypeError: a parameter is sparse, complex, or of another dtype than float32 and float64:
            16 bits would round each way between x and y, which took 0.43 of the way of x in 1,000
            steps in bfloat16, where `SGD(extrapolation=...)` lost 0.27; rho is no number.
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
        for name in ("master_weight_bits", "state_bits"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} compresses what a step reads once, and MSAM reads its momentum three "
                    "times: leave it None, or use SGD(extrapolation=...)"
                )
        super().__init__(params, group, Perturbation(), MSAMUpdate(), options)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        narrow = [p.dtype for p in group["params"] if p.dtype.itemsize < 4]
        if narrow:
            raise TypeError(
                f"MSAM goes to x and ahead again in every step, and {narrow[0]} would round both "
                "ways: keep float32 parameters, under autocast, or use SGD(extrapolation=...), "
                "which rounds once"
            )

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
