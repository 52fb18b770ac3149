"""USAM along a Hessian-vector product."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor

from eigenfilter import _callers, _core, _distributed
from eigenfilter.optimizers._ascents import TINY, Ascent, Run, total_norms
from eigenfilter.optimizers._base import EigenfilterOptimizer
from eigenfilter.optimizers._descents import SGDDescent
from eigenfilter.optimizers._guard import Guard
from eigenfilter.optimizers._hyperparameters import rho_of
from eigenfilter.optimizers._options import Options
from eigenfilter.optimizers._parts import Gradients, Part, Piece, conforming
from eigenfilter.optimizers.sgd import sgd_defaults

WITHOUT_GRAPH = (
    'hvp="autograd" differentiates the gradient, and it came without a graph: call '
    "loss.backward(create_graph=opt.needs_graph) in the closure, for every micro-batch, and pass "
    "use_reentrant=False to torch.utils.checkpoint"
)

_SLICE = 2**16  # elements that are multiplied in float64 at a time


class DifferenceAscent(Ascent):
    """H g from two gradients: out along g by a small step, then from x by rho H g.

    The step is eps = c (1 + ||x||) / ||g||, with c the square root of the parameters' machine
    precision (the coarsest, if they differ): it balances the rounding of the gradients against the
    curvature's change along the way (J. Nocedal and S. Wright, 2006, section 8.1).

    Along the small step the loss rises by eps / 2 (||g||^2 + g . g_eps), but for terms in eps^3. A
    rise of another size says that the two sides are not those of one function.
    """

    method = "hessian_usam"
    count = 2
    takes_norm = True
    takes_zeros = True

    _JUDGED = 10  # steps at the beginning: reading a loss waits for its device
    _FACTOR = 10.0  # of that rise: far less than what another batch makes of it
    _ROUNDING = 2e-3  # of the loss: its own error under bfloat16 autocast

    def __init__(self, relative_step: float | None) -> None:
        if relative_step is not None and not relative_step > 0:
            raise ValueError(f"fd_step must be positive, and is {relative_step}")
        self.relative_step = relative_step
        self._judged = 0
        self.forget()

    def forget(self) -> None:
        self._eps: dict[torch.device, Tensor | float] = {}
        self._norms: dict[torch.device, Tensor] = {}
        self._losses: list[float | Tensor] = []  # of both sides; none in the explicit form
        self._first: dict[Part, Sequence[Tensor]] = {}  # the gradients at x

    def prepare(self, index: int, found: Gradients, whole: Gradients, guard: Guard) -> Gradients:
        if index > 0:
            found = conforming(self._beside_first(found))
            for part, grads in found:
                self._match_dtypes(part, grads)
            if len(self._losses) == self.count:
                self._judge(found)
            return found
        whole = conforming(whole)
        lengths = total_norms([(part, part.tensors) for part, _ in whole])
        self._norms = total_norms(whole)
        for device, norm in self._norms.items():
            step = self._relative_step(whole) * (1 + lengths[device])
            self._eps[device] = step / (guard.unscaled(norm, device) + TINY)
        found = conforming(found)
        for part, grads in found:  # a later backward pass may overwrite them: copy
            kept = part.first_gradients(grads)
            torch._foreach_copy_(list(kept), [_distributed.local(g) for g in grads])
            self._first[part] = kept
        return found

    def _beside_first(self, found: Gradients) -> Gradients:
        """Gradients on the second side for the parts of the first; none on a side is zero there."""
        if list(self._first) == [part for part, _ in found]:
            return found
        given = {id(p): g for part, grads in found for p, g in zip(part.params, grads, strict=True)}
        whole = [
            (part, part.with_zeros([given.pop(id(p), None) for p in part.params], kept))
            for part, kept in self._first.items()
        ]
        for part, grads in found:  # what has a gradient here only
            new = [i for i, p in enumerate(part.params) if id(p) in given]
            if new:
                some = part.subpart(new)
                here = some.conform([grads[i] for i in new])
                kept = some.first_gradients(here)
                torch._foreach_zero_(list(kept))
                self._first[some] = kept
                whole.append((some, here))
        return whole

    def _match_dtypes(self, part: Part, grads: list[Tensor]) -> None:
        """Raise RuntimeError where gradients of a parameter differ in dtype, unless one is zero."""
        if [g.dtype for g in grads] == part.first_dtypes:
            return
        first = list(self._first[part])
        for i, (a, b) in enumerate(zip(first, grads, strict=True)):
            if a.dtype != b.dtype:
                if bool(a.any()):
                    raise RuntimeError(
                        "a finite difference needs gradients of the same dtype on both sides, and "
                        "some have another on the second: leave grad_dtype as it is during a step"
                    )
                first[i] = torch.zeros_like(a, dtype=b.dtype)
        self._first[part] = first

    def move(self, run: Run, index: int, piece: Piece) -> None:
        part = piece.part
        eps, rho = self._eps[part.device], rho_of(part.group)
        if index == 0:
            run(part.kernels.ascend, piece, part.backups(), eps)
            return
        if not piece.moved:
            part.save()
        run(part.kernels.ascend_hvp, piece, self._first[part], part.backups(), rho, eps)

    def note(self, loss: Any) -> None:
        due = self._judged < self._JUDGED and len(self._losses) < self.count
        if due and (isinstance(loss, float) or (type(loss) is Tensor and loss.numel() == 1)):
            self._losses.append(loss)

    def _judge(self, found: Gradients) -> None:
        """Warn, in the first steps, if the losses of both sides do not go with their gradients.

        Not of sharded parameters: a rank's own loss decides nothing that all must do together.
        """
        if any(part.is_distributed for part, _ in found):
            return
        self._judged += 1
        first, second = (float(loss) for loss in self._losses)
        eps, norm = (float(next(iter(each.values()))) for each in (self._eps, self._norms))
        along, other = eps / 2 * norm * norm, eps / 2 * _dot(self._first, found)
        rise, expected = second - first, along + other
        allowed = self._FACTOR * (along + abs(other)) + self._ROUNDING * abs(first)
        if abs(rise - expected) > allowed:
            self._judged = self._JUDGED  # once is enough
            warnings.warn(
                f"an implausible finite difference: by its gradients the loss should have risen "
                f"from {first:.6g} by {expected:.2g}, and rose by {rise:.2g}. Both calls of the "
                "closure must see the same batch, compute the same function, and return the loss "
                "whose gradient they take",
                stacklevel=_callers.stacklevel(),
            )

    def replays(self, index: int) -> bool | None:
        return (False, True, None)[index]

    def _relative_step(self, found: Gradients) -> float:
        if self.relative_step is not None:
            return self.relative_step
        coarsest = max(torch.finfo(part.params[0].dtype).eps for part, _ in found)
        return float(coarsest**0.5)


class ProductAscent(Ascent):
    """H g by a second backward pass through the graph of the gradient."""

    method = "hessian_usam"
    count = 1
    takes_zeros = True

    def __init__(self) -> None:
        self._differentiable = False  # whether a graph was looked through
        self.forget()

    def forget(self) -> None:
        self._scales: dict[torch.device, Tensor | float] = {}

    def prepare(self, index: int, found: Gradients, whole: Gradients, guard: Guard) -> Gradients:
        for part, _ in whole:  # an error comes before the graph is used up: the step can be retried
            _core.check(("params", "backups"), (part.tensors, part.backups()), (True, True))
        params = [p for part, _ in whole for p in part.params]
        outputs = [g for _, given in whole for g in given if g.requires_grad]
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
        moving, rest = [], iter(products)
        for part, given in whole:
            own = [next(rest) for _ in given]
            some = [i for i, h in enumerate(own) if h is not None]  # the others' H g is 0
            if some:
                moving.append((part.subpart(some), [own[i] for i in some]))
        # The products carry the square of the loss scale; the kernel takes one away.
        self._scales = {part.device: guard.unscaled(1.0, part.device) for part, _ in moving}
        return moving

    def move(self, run: Run, index: int, piece: Piece) -> None:
        part = piece.part
        run(
            part.kernels.ascend,
            piece,
            part.backups(),
            rho_of(part.group) * self._scales[part.device],
        )

    def needs_graph(self, index: int) -> bool:
        return index == 0

    @contextmanager
    def watch(self, index: int, params: Sequence[Tensor]) -> Iterator[None]:
        """Refuse a gradient of which a part has no graph: that part of H g would be 0.

        A backward pass inside another, as reentrant checkpointing has, makes none.
        """
        without = False

        def arrive(_: Tensor) -> None:
            nonlocal without
            without |= not torch.is_grad_enabled()

        hooks = [
            p.register_hook(arrive)  # type: ignore[no-untyped-call]
            for p in params
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if without:
            raise RuntimeError(WITHOUT_GRAPH)


def _refuse_once_differentiable(outputs: list[Tensor]) -> None:
    """Raise RuntimeError if a graph has a node that refuses to be differentiated.

    torch.autograd.grad passes by such nodes without a word where no input lies behind them: that
    part of H g would be 0. Looked for once an optimizer, since it takes a walk through the graph.
    """
    seen: set[Any] = set()
    ahead = [g.grad_fn for g in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function in the graph can be differentiated once only")
        ahead.extend(following for following, _ in node.next_functions)


def _dot(first: Mapping[Part, Sequence[Tensor]], found: Gradients) -> float:
    """The dot product of gradients with those kept of the first side; waits for their devices."""
    total = 0.0
    for part, grads in found:
        product = torch.zeros((), dtype=torch.float64, device=part.device)
        for one, other in zip(list(first[part]), grads, strict=True):
            a, b = one.flatten(), other.flatten()
            for begin in range(0, len(a), _SLICE):
                some = slice(begin, begin + _SLICE)
                product += (a[some].double() * b[some].double()).sum()
        total += product.item()
    return total


class HessianUSAM(EigenfilterOptimizer):
    r"""Hessian USAM: SGD's update with the gradient taken at x + rho H(x) grad f(x).

        h = H(x) grad f(x)
        d = grad f(x + rho h) + wd x               (also with `maximize`: h keeps its sign)
        m <- momentum m + (1 - dampening) d        (first step: m <- d)
        x <- x - lr m                              (Nesterov: x - lr (d + momentum m))

    Where it converges, every eigenvalue lambda of the Hessian satisfies, with q = lambda (1 + rho
    lambda^2) + wd, 0 <= lr (1 - dampening) q <= 2 (1 + momentum), and with Nesterov 0 <= lr q <=
    (2 + 2 momentum) / (1 + 2 momentum) (exactly for wd = 0, else but for a term of order wd). At
    wd = 0 no negative eigenvalue passes.

    `hvp="finite_difference"` takes three gradients: h = (grad f(x + eps g) - g) / eps with g = grad
    f(x) and eps = fd_step (1 + ||x||) / ||g||. Both gradients must see the same batch and the same
    random numbers, unclipped: `step(closure)` replays torch's generators, in the explicit form
    `with opt.evaluation():` around the closure does; a second evaluation that draws random numbers
    without it warns. In its first ten calls `step(closure)` also warns where the loss does not
    change from one side to the other as the gradients say. It works where double backward does not:
    fused attention, FSDP2, compiled models. It keeps one more gradient.

    `hvp="autograd"` takes two gradients and one product. The closure has to call
    `loss.backward(create_graph=opt.needs_graph)`.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate, >= 0; a number or a 0-dim tensor.
        momentum: >= 0; convergence needs < 1.
        dampening: of the gradient in the momentum.
        weight_decay: wd, >= 0; enters after the ascent.
        nesterov: Nesterov's momentum; needs momentum > 0 and dampening 0.
        rho: of the ascent, >= 0. Groups with the float 0.0 take none.
        hvp: "finite_difference" or "autograd".
        fd_step: relative length of the finite difference; by default the square root of the
            parameters' machine precision. Gradients that are less exact, as under bfloat16
            autocast, want more, about 0.01, and drown in their rounding late in training all the
            same: docs/optimizers.md has the errors measured.
        maximize: ascend f.
        stochastic_rounding: round what is written to bfloat16 and float16 parameters and state up
            or down at random, right on average, so that small updates are not lost.
        skip_nonfinite: leave parameters and state as they were where a gradient is not finite.
        release_gradients: apply and drop each of the descent's gradients while backward runs, so
            that they never exist all at once. Takes step(closure), or the closure inside
            `with opt.evaluation():`, and no GradScaler, clipping, skip_nonfinite or several ranks.
        backend: None, "native", "triton" or "reference": see `eigenfilter.kernels`.
        options: `set_to_none=False` keeps the gradient tensors when an ascent clears them, and
            fills them with 0. Torch's `fused`, `foreach`, `capturable` change nothing;
            `differentiable` and `amsgrad` must be False.

    Raises:
        TypeError: sparse, complex or otherwise unsupported parameters.
        ValueError: a hyperparameter out of its range.

    Example:
        >>> opt = eigenfilter.HessianUSAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.01)
        >>> loss = opt.step(closure)

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
        maximize: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        release_gradients: bool = False,
        backend: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            sgd_defaults(
                lr, momentum, dampening, weight_decay, nesterov, maximize, stochastic_rounding
            )
            | {"rho": rho},
            hessian_usam_ascent(hvp=hvp, fd_step=fd_step),
            SGDDescent(),
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            backend=backend,
            options=options,
        )


def hessian_usam_ascent(
    *, hvp: str = "finite_difference", fd_step: float | None = None
) -> DifferenceAscent | ProductAscent:
    """The ascent for a way to take the product."""
    if hvp == "finite_difference":
        return DifferenceAscent(fd_step)
    if hvp != "autograd":
        raise ValueError(f'hvp must be "finite_difference" or "autograd", and is {hvp!r}')
    if fd_step is not None:
        raise ValueError('fd_step belongs to hvp="finite_difference"')
    return ProductAscent()
