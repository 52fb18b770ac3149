"""Hessian USAM: an ascent along a Hessian-vector product."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor

from eigenfilter import _callers, _core, _distributed
from eigenfilter.optimizers._norms import total_norms
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.base import EigenfilterOptimizer
from eigenfilter.optimizers.buckets import (
    BucketSlice,
    Gradients,
    ParamBucket,
    gradients_by_id,
)
from eigenfilter.optimizers.hyperparameters import Options
from eigenfilter.optimizers.perturbation import TINY, Landscape, Perturbation
from eigenfilter.optimizers.randomness import Replay
from eigenfilter.optimizers.registry import register
from eigenfilter.optimizers.updates import SGDUpdate

WITHOUT_GRAPH = (
    'hvp="autograd" differentiates the gradient, and it came without a graph: call '
    "loss.backward(create_graph=opt.needs_graph) in the closure, for every micro-batch, and pass "
    "use_reentrant=False to torch.utils.checkpoint"
)

_SLICE = 2**16  # elements that are multiplied in float64 at a time


class HessianUSAMPerturbation(Perturbation):
    """An ascent along rho H g, by either way to the product."""

    method = "hessian_usam"
    needs_zero_gradients = True

    def end(self, f: Landscape, x: Tensor, g: Tensor, rho: Tensor, sign: Tensor) -> Tensor:
        ascending = (rho != 0).to(g.dtype)
        return x + rho * (ascending * f.matvec(ascending * g))


class FiniteDifferencePerturbation(HessianUSAMPerturbation):
    """H g from two gradients: a small step along g first, then rho H g from x.

    The step is eps = c (1 + ||x||) / ||g||, with c the square root of the parameters' machine
    precision (the coarsest, if they differ): it balances the rounding of the gradients against the
    curvature's change along the way (J. Nocedal and S. Wright, 2006, section 8.1).

    Along the small step the loss rises by eps / 2 (||g||^2 + g . g_eps) + O(eps^3). A rise of
    another size shows that the two gradients do not belong to one function.
    """

    count = 2
    needs_norm = True
    repeats_random_numbers = True
    accesses = 12  # norms of x and g, a copy of g, USAM's; then reads b, g, g0, and writes x

    _CHECKED_STEPS = 10  # steps at the beginning: reading a loss waits for its device
    _FACTOR = 10.0  # times that rise is allowed: another batch changes the loss far more
    _ROUNDING = 2e-3  # of the loss: its own error under bfloat16 autocast

    def __init__(self, relative_step: float | None) -> None:
        if relative_step is not None and not relative_step > 0:
            raise ValueError(f"fd_step must be positive, and is {relative_step}")
        self.relative_step = relative_step
        self._steps_checked = 0
        self.forget()

    def forget(self) -> None:
        self._eps: dict[torch.device, Tensor | float] = {}
        self._norms: dict[torch.device, Tensor] = {}
        self._losses: list[float | Tensor] = []  # of both sides; none in the explicit form
        self._first_gradients: dict[ParamBucket, Sequence[Tensor]] = {}  # the gradients at x
        self._replay = Replay()

    def prepare(
        self, index: int, gradients: Gradients, padded: Gradients, amp: AmpState
    ) -> Gradients:
        if index > 0:
            self._replay.warn_of_others()
            gradients = self._pair_with_first(gradients)
            for bucket, grads in gradients:
                self._match_dtypes(bucket, grads)
            if len(self._losses) == self.count:
                self._check_plausibility(gradients)
            return gradients
        lengths = total_norms([(bucket, bucket.tensors) for bucket, _ in padded])
        self._norms = total_norms(padded)
        for device, norm in self._norms.items():
            step = self._relative_step(padded) * (1 + lengths[device])
            self._eps[device] = step / (amp.unscale(norm, device) + TINY)
        for bucket, grads in gradients:  # a later backward pass may overwrite them: copy
            first = bucket.first_gradients(grads)
            torch._foreach_copy_(list(first), [_distributed.local(g) for g in grads])
            self._first_gradients[bucket] = first
        self._replay.end_ascent([p for bucket, _ in padded for p in bucket.params])
        return gradients

    def _pair_with_first(self, gradients: Gradients) -> Gradients:
        """Gradients at the second point for the buckets of the first; a missing one counts as 0."""
        if list(self._first_gradients) == [bucket for bucket, _ in gradients]:
            return gradients
        by_id: dict[int, Tensor] = gradients_by_id(gradients)
        padded = [
            (bucket, bucket.with_zeros([by_id.pop(id(p), None) for p in bucket.params], first))
            for bucket, first in self._first_gradients.items()
        ]
        for bucket, grads in gradients:  # parameters whose only gradient is the second
            new = [i for i, p in enumerate(bucket.params) if id(p) in by_id]
            if new:
                some = bucket.subset(new)
                here = [grads[i] for i in new]
                first = some.first_gradients(here)
                torch._foreach_zero_(list(first))
                self._first_gradients[some] = first
                padded.append((some, here))
        return padded

    def _match_dtypes(self, bucket: ParamBucket, grads: list[Tensor]) -> None:
        """Raise RuntimeError if two gradients differ in dtype and the first one is not 0."""
        if [g.dtype for g in grads] == bucket.first_dtypes:
            return
        first = list(self._first_gradients[bucket])
        for i, (a, b) in enumerate(zip(first, grads, strict=True)):
            if a.dtype != b.dtype:
                # Of a shard no process can tell alone whether the whole is 0.
                if _distributed.is_dtensor(bucket.params[i]) or bool(a.any()):
                    raise RuntimeError(
                        "a finite difference needs gradients of the same dtype on both sides, and "
                        "some have another on the second: leave grad_dtype as it is during a step"
                    )
                first[i] = torch.zeros_like(a, dtype=b.dtype)
        self._first_gradients[bucket] = first

    def perturb(self, index: int, bucket_slice: BucketSlice) -> None:
        bucket = bucket_slice.bucket
        eps, rho = self._eps[bucket.device], bucket.rho
        if index == 0:
            bucket_slice.launch(bucket.kernels.perturb, bucket.backups(), eps)
            return
        if not bucket_slice.is_perturbed:
            bucket.save()
        first = self._first_gradients[bucket]
        bucket_slice.launch(bucket.kernels.perturb_hvp, first, bucket.backups(), rho, eps)

    def record_loss(self, loss: Any) -> None:
        due = self._steps_checked < self._CHECKED_STEPS and len(self._losses) < self.count
        if due and (isinstance(loss, float) or (type(loss) is Tensor and loss.numel() == 1)):
            self._losses.append(loss)

    def _check_plausibility(self, gradients: Gradients) -> None:
        """Warn, in the first steps, if the two losses contradict the two gradients.

        Sharded parameters are left out: one rank's loss must not decide what all ranks do.
        """
        if any(bucket.is_distributed for bucket, _ in gradients):
            return
        self._steps_checked += 1
        first, second = (float(loss) for loss in self._losses)
        eps, norm = (float(next(iter(each.values()))) for each in (self._eps, self._norms))
        along, other = eps / 2 * norm * norm, eps / 2 * _dot(self._first_gradients, gradients)
        rise, expected = second - first, along + other
        allowed = self._FACTOR * (along + abs(other)) + self._ROUNDING * abs(first)
        if abs(rise - expected) > allowed:
            self._steps_checked = self._CHECKED_STEPS  # once is enough
            warnings.warn(
                f"an implausible finite difference: by its gradients the loss should have risen "
                f"from {first:.6g} by {expected:.2g}, and rose by {rise:.2g}. Both calls of the "
                "closure must see the same batch, compute the same function, and return the loss "
                "whose gradient they take",
                stacklevel=_callers.stacklevel(),
            )

    def evaluation_context(
        self, index: int, params: Sequence[Tensor]
    ) -> AbstractContextManager[None]:
        self._replay.begin_evaluation(index, params)
        return nullcontext()

    def _relative_step(self, gradients: Gradients) -> float:
        if self.relative_step is not None:
            return self.relative_step
        coarsest = max(torch.finfo(bucket.params[0].dtype).eps for bucket, _ in gradients)
        return float(coarsest**0.5)


class AutogradPerturbation(HessianUSAMPerturbation):
    """H g by a second backward pass through the graph of the gradient."""

    count = 1
    accesses = 4  # USAM's, along the product that autograd has taken

    def __init__(self) -> None:
        self._differentiable = False  # whether a graph was searched for nodes without a derivative
        self.forget()

    def forget(self) -> None:
        self._scales: dict[torch.device, Tensor | float] = {}

    def prepare(
        self, index: int, gradients: Gradients, padded: Gradients, amp: AmpState
    ) -> Gradients:
        # Errors come before backward frees the graph, so that the step can be repeated.
        for bucket, _ in padded:
            _core.check(("params", "backups"), (bucket.tensors, bucket.backups()), (True, True))
        params = [p for bucket, _ in padded for p in bucket.params]
        outputs = [g for _, grads in padded for g in grads if g.requires_grad]
        if not outputs:
            raise RuntimeError(
                f"{WITHOUT_GRAPH} (with a loss that is linear in every parameter there is nothing "
                "to differentiate: use SGD)"
            )
        try:
            if not self._differentiable:
                _refuse_once_differentiable(outputs)
                self._differentiable = True
            products = torch.autograd.grad(
                outputs, params, [g.detach() for g in outputs], allow_unused=True
            )
        except RuntimeError as error:
            raise RuntimeError(
                "the gradient could not be differentiated: pass use_reentrant=False to "
                "torch.utils.checkpoint where the model uses it; where it has an operation without "
                'a second derivative, or is sharded by FSDP2, use hvp="finite_difference"'
            ) from error
        directions, rest = [], iter(products)
        for bucket, grads in padded:
            own = [next(rest) for _ in grads]
            some = [i for i, h in enumerate(own) if h is not None]  # H g is 0 for the others
            if some:
                directions.append((bucket.subset(some), [own[i] for i in some]))
        # The products carry the square of the loss scale; the kernel divides by it once.
        self._scales = {bucket.device: amp.unscale(1.0, bucket.device) for bucket, _ in directions}
        return directions

    def perturb(self, index: int, bucket_slice: BucketSlice) -> None:
        bucket = bucket_slice.bucket
        alpha = bucket.rho * self._scales[bucket.device]
        bucket_slice.launch(bucket.kernels.perturb, bucket.backups(), alpha)

    def needs_graph(self, index: int) -> bool:
        return index == 0

    @contextmanager
    def evaluation_context(self, index: int, params: Sequence[Tensor]) -> Iterator[None]:
        """Refuse a gradient that has no graph in part: that part of H g would silently be 0.

        A backward pass inside another one, as in reentrant checkpointing, makes no graph.
        """
        without = False

        def before_accumulation(_: Tensor) -> None:
            nonlocal without
            without |= not torch.is_grad_enabled()

        trained = [p for p in params if p.requires_grad]
        hooks = [p.register_hook(before_accumulation) for p in trained]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if without:
            raise RuntimeError(WITHOUT_GRAPH)


def _refuse_once_differentiable(outputs: list[Tensor]) -> None:
    """Raise RuntimeError if a graph has a node that cannot be differentiated.

    torch.autograd.grad ignores such a node silently if no input lies behind it, and that part of
    H g would be 0. An optimizer searches once, because it takes a walk through the graph.
    """
    visited: set[Any] = set()
    ahead = [g.grad_fn for g in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function in the graph can be differentiated once only")
        ahead.extend(following for following, _ in node.next_functions)


def _dot(first: Mapping[ParamBucket, Sequence[Tensor]], gradients: Gradients) -> float:
    """The dot product of the two points' gradients; waits for their devices."""
    total = 0.0
    for bucket, grads in gradients:
        product = torch.zeros((), dtype=torch.float64, device=bucket.device)
        for one, other in zip(list(first[bucket]), grads, strict=True):
            slices = (torch.split(t.flatten(), _SLICE) for t in (one, other))
            for a, b in zip(*slices, strict=True):
                product += (a.double() * b.double()).sum()
        total += product.item()
    return total


def hessian_usam_perturbation(
    *, hvp: str = "finite_difference", fd_step: float | None = None
) -> HessianUSAMPerturbation:
    """The ascent that takes the product in the way `hvp` names."""
    if hvp == "finite_difference":
        return FiniteDifferencePerturbation(fd_step)
    if hvp != "autograd":
        raise ValueError(f'hvp must be "finite_difference" or "autograd", and is {hvp!r}')
    if fd_step is not None:
        raise ValueError('fd_step belongs to hvp="finite_difference"')
    return AutogradPerturbation()


@register("hessian_usam", hessian_usam_perturbation)
class HessianUSAM(EigenfilterOptimizer):
    r"""Hessian USAM: SGD's update with the gradient taken at x + rho H(x) grad f(x).

        h = H(x) grad f(x)
        d = grad f(x + rho h) + wd x               (then as in `SGD`)

    The sign of rho h is the same with `maximize`. In the filter, p(lambda) = lambda (1 + rho
    lambda^2) takes the place of lambda. At wd = 0 it admits no negative eigenvalue.

    `hvp="finite_difference"` takes three gradients a step: h = (grad f(x + eps g) - g) / eps with
    g = grad f(x) and eps = fd_step (1 + ||x||) / ||g||. Both gradients must come from the same
    batch and the same random numbers: see docs/optimizers.md, "Finite differences". It works where
    double backward does not (fused attention, FSDP2, compiled models). `hvp="autograd"` takes two
    gradients and one product; the closure calls `loss.backward(create_graph=opt.needs_graph)`.

    Memory: one backup of the parameters, and one gradient more with "finite_difference". The errors
    are those of `SGD`.

    Args:
        params, lr, momentum, dampening, nesterov: those of `SGD`.
        weight_decay: coefficient wd of the L2 penalty at x, at least 0. It enters after the ascent.
        rho: step size of the ascent, at least 0, in param_groups; the float 0.0 takes none.
        hvp: how to take the Hessian-vector product: "finite_difference" or "autograd".
        fd_step: relative length of the finite difference, greater than 0. None stands for the
            square root of the parameters' machine precision. Gradients that are less exact, as
            under bfloat16 autocast, need about 0.01; docs/optimizers.md has the errors measured.
        options: the keyword arguments of `Options`.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> opt = eigenfilter.HessianUSAM([x], lr=0.1, momentum=0.9, rho=0.05)
        >>> x.square().sum().backward()
        >>> while opt.ascend():
        ...     x.square().sum().backward()
        >>> opt.step()
        >>> x.data
        tensor([ 0.7600, -1.5200])

    Source: arXiv 2510.09034; its exact form is our reading.
    """

    method = "hessian_usam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        rho: float | Tensor = 0.01,
        hvp: str = "finite_difference",
        fd_step: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        group |= {"weight_decay": weight_decay, "rho": rho}
        super().__init__(
            params, group, hessian_usam_perturbation(hvp=hvp, fd_step=fd_step), SGDUpdate(), options
        )
