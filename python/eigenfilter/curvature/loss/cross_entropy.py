"""Cross-entropy whose second derivative is one fused kernel, in place of torch's function.

torch's own cross-entropy keeps three arrays of the size of the logits for a second derivative, and
a product with it makes several more. Here a graph keeps the logits and the gradient, and a product
reads logits and vectors once: see `kernels.cross_entropy_hvp`. Let row i have the logits z_i with
p_i = softmax(z_i), and the target distribution q_i, whatever options that comes from. Then the
loss, its gradient and a product with its Hessian are

    - sum_i q_i . log p_i,    s_i p_i - q_i,    s_i (p_i u_i - (p_i . u_i) p_i)

where s_i is the sum of q_i, and q_i consists of a_i for the target class and of b_i w_c for every
class c of weight w_c.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from eigenfilter import kernels

# Logits of fewer elements are left to torch: calls of functions written in Python would dominate.
LEAST = 1 << 16

_PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of rows that are taken at a time
_PLAIN = (Tensor, nn.Parameter)  # subclasses of these may mean something else
_NONE = (None,) * 5  # derivatives with respect to targets


class Targets(NamedTuple):
    """The target distributions of n rows over c classes.

    Attributes:
        classes: [n], int64; of an ignored row any class.
        sums: s [n], float64; 0 for an ignored row.
        picks: a [n], float64.
        spreads: b [n], float64; None for zeros.
        weights: w [c], of the logits' dtype; None for ones.
    """

    classes: Tensor
    sums: Tensor
    picks: Tensor
    spreads: Tensor | None
    weights: Tensor | None

    def along(self, u: Tensor) -> Tensor:
        """Return q_i . u_i [n], in float64, for u [n, c]."""
        result = self.picks * u.gather(1, self.classes[:, None])[:, 0]
        if self.spreads is not None:
            result = result + self.spreads * (u if self.weights is None else u * self.weights).sum(
                1
            )
        return result

    def rows(self, part: slice) -> Targets:
        """Return the targets of some rows."""
        spreads = None if self.spreads is None else self.spreads[part]
        picked = self.classes[part], self.sums[part], self.picks[part]
        return Targets(*picked, spreads, self.weights)


class CrossEntropy(Function):
    """The loss of logits z [n, c], a tensor []; the arguments are z and those of `Targets`."""

    is_recorded = True

    @staticmethod
    def forward(z: Tensor, *targets: Any) -> Tensor:
        own = Targets(*targets)
        losses = torch.empty_like(own.sums)
        for part in _pieces(z):
            piece = own.rows(part)
            loss = -piece.along(F.log_softmax(z[part], 1))
            losses[part] = loss.where(piece.sums != 0, 0)
        return losses.sum().to(z.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, seed: Tensor) -> Any:
        z, *targets = ctx.saved_tensors
        return CrossEntropyGradient.apply(z, seed, *targets), *_NONE

    @staticmethod
    def jvp(ctx: Any, along: Tensor, *_: Any) -> Any:
        z, *targets = ctx.saved_tensors
        own = Targets(*targets)
        _, means = _Product.apply(z, along.contiguous(), own.sums)
        return (own.sums * means - own.along(along)).sum().to(z.dtype)


class CrossEntropyGradient(Function):
    """The gradient [n, c] of seed [] times the loss with respect to the logits."""

    is_recorded = True

    @staticmethod
    def forward(z: Tensor, seed: Tensor, *targets: Any) -> Tensor:
        own = Targets(*targets)
        gradient = torch.empty_like(z)
        for part in _pieces(z):
            piece, rows = own.rows(part), gradient[part]
            torch.softmax(z[part], 1, out=rows)
            rows *= (seed * piece.sums)[:, None].to(z.dtype)
            if piece.spreads is not None:
                spread = (seed * piece.spreads)[:, None].to(z.dtype)
                rows -= spread if piece.weights is None else spread * piece.weights
            picks = (seed * piece.picks)[:, None].to(z.dtype)
            rows.scatter_add_(1, piece.classes[:, None], -picks)
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None) -> Any:
        if u is None:
            return None, None, *_NONE
        z, seed, *targets = ctx.saved_tensors
        own = Targets(*targets)
        # If this is differentiated again, it must be by operations that all have derivatives.
        multiply = _written_out if torch.is_grad_enabled() else _Product.apply
        product, means = multiply(z, u.contiguous(), seed * own.sums)
        along = None
        if ctx.needs_input_grad[1]:
            along = (own.sums * means - own.along(u)).sum().to(seed.dtype)
        return product, along, *_NONE

    @staticmethod
    def jvp(ctx: Any, along: Tensor | None, change: Tensor | None, *_: Any) -> Any:
        z, seed, *targets = ctx.saved_tensors
        result = None
        if along is not None:
            result, _means = _Product.apply(z, along.contiguous(), seed * targets[1])
        if change is not None:
            of_seed = CrossEntropyGradient.apply(z, change, *targets)
            result = of_seed if result is None else result + of_seed
        return result


# Where torch.autograd.grad(is_grads_batched=True) maps over vectors, an operator of torch is called
# for one after the other. A function would get them all in a tensor without memory.
torch.library.define(
    "eigenfilter::cross_entropy_product",
    "(Tensor logits, Tensor u, Tensor scales) -> (Tensor, Tensor)",
)


@torch.library.impl("eigenfilter::cross_entropy_product", "CompositeExplicitAutograd")
def _multiply(logits: Tensor, u: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.cross_entropy_hvp(logits, u.contiguous(), scales)


class _Product(Function):
    """The product of a fused kernel, and the means p_i . u_i; it has no derivative."""

    @staticmethod
    def forward(z: Tensor, u: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        product: tuple[Tensor, Tensor] = torch.ops.eigenfilter.cross_entropy_product(z, u, scales)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> Any:
        """Multiply vector by vector: of large logits each fills the kernel by itself."""
        each = [
            [t] * info.batch_size if dim is None else t.movedim(dim, 0).unbind()
            for t, dim in zip(inputs, in_dims, strict=True)
        ]
        results = [
            _Product.apply(*(t.contiguous() for t in one)) for one in zip(*each, strict=True)
        ]
        products, means = zip(*results, strict=True)
        return (torch.stack(products), torch.stack(means)), (0, 0)


def _written_out(z: Tensor, u: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_Product` does, by operations of torch."""
    p = z.softmax(1)
    product = p * u
    means = product.sum(1)
    result = scales[:, None].to(z.dtype) * (product - means[:, None] * p)
    return result.where(scales[:, None] != 0, 0), means.double()


def _pieces(z: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of z [n, c]."""
    rows = max(1, _PIECE[z.device.type] // z.shape[1])
    for first in range(0, len(z), rows):
        yield slice(first, first + rows)


class FusedCrossEntropy(TorchFunctionMode):
    """Replaces `torch.nn.functional.cross_entropy` by the same function with a fused product.

    Calls that `_fused` does not recognize run torch's function.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy:
            loss = _fused(*args, **(kwargs or {}))
            if loss is not None:
                return loss
        return func(*args, **(kwargs or {}))


def is_large(node: Any) -> bool:
    """Whether a node of a graph is a softmax of as many logits as make a fused product worth it."""
    if not node.name().startswith("LogSoftmax"):
        return False
    result = node._raw_saved_result.data
    return isinstance(result, Tensor) and result.numel() >= LEAST


def _fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Return the loss, or None where torch's own function is to compute it."""
    if size_average is not None or reduce is not None or not 0 <= label_smoothing <= 1:
        return None
    rows = _rows_of(input, target)
    if rows is None or reduction not in ("mean", "sum") or not _fits(weight, rows[0]):
        return None
    z, classes = rows
    counts = classes != ignore_index
    classes = classes.where(counts, 0)
    own = 1.0 if weight is None else weight.double()[classes]
    picks = (1 - label_smoothing) * own * counts.double()
    spreads = label_smoothing / z.shape[1] * counts.double() if label_smoothing else None
    total = z.shape[1] if weight is None else weight.double().sum()
    sums = picks if spreads is None else picks + spreads * total
    if reduction == "sum":
        return _apply(z, Targets(classes, sums, picks, spreads, weight))
    count = (own * counts).sum()
    divisor = count.where(count != 0, 1)
    spreads = None if spreads is None else spreads / divisor
    loss = _apply(z, Targets(classes, sums / divisor, picks / divisor, spreads, weight))
    return loss.where(count != 0, torch.nan)  # the mean of nothing


def _apply(z: Tensor, targets: Targets) -> Tensor:
    loss: Tensor = CrossEntropy.apply(z, *targets)
    return loss


def _rows_of(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return logits [n, c] and classes [n] without a copy; None if that is not what is given."""
    if type(logits) not in _PLAIN or type(target) not in _PLAIN or _is_batched(logits, target):
        return None
    device = logits.device.type
    if device not in _PIECE or target.device != logits.device or target.dtype != torch.int64:
        return None
    if logits.ndim < 2 or logits.numel() < LEAST:
        return None
    if logits.itemsize == 2 and torch.is_autocast_enabled(device):
        logits = logits.float()  # as autocast does for torch's function
    z = logits.movedim(1, -1)
    if z.dtype not in (torch.float32, torch.float64) or z.shape[:-1] != target.shape:
        return None
    if not z.is_contiguous():
        return None
    return z.reshape(-1, z.shape[-1]), target.reshape(-1)


def _is_batched(*tensors: Tensor) -> bool:
    """Whether `torch.vmap` maps over any of these tensors."""
    functorch = torch._C._functorch
    for t in tensors:
        while functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_batchedtensor(t):
                return True
            t = functorch.get_unwrapped(t)
    return False


def _fits(weight: Tensor | None, z: Tensor) -> bool:
    """Whether class weights are constants that torch's function takes with these logits."""
    return weight is None or (
        type(weight) in _PLAIN
        and not weight.requires_grad
        and weight.shape == z.shape[1:]
        and (weight.dtype, weight.device) == (z.dtype, z.device)
        and not _is_batched(weight)
    )
