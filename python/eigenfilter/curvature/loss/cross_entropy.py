"""Cross-entropy whose second derivative is one fused kernel, in place of torch's function.

torch's own cross-entropy keeps three arrays of the size of the logits for a second derivative, and
a product with it makes several more. Here a graph keeps the logits and the gradient, and a product
reads logits and vectors once: see `kernels.cross_entropy_hvp`. Let row i have the logits z_i with
p_i = softmax(z_i), and the target distribution q_i, whatever options that comes from. Then the
loss, its gradient and a product with its Hessian are

    - sum_i q_i . log p_i,    s_i p_i - q_i,    s_i (p_i u_i - (p_i . u_i) p_i)

where s_i is the sum of q_i, and q_i consists of a_i for the target class and of b_i w_c for every
class c of weight w_c. Logits in bfloat16 or float16 are widened to float32 in pieces.
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
        weights: w [c], of the logits' dtype, or float32; None for ones.
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
            weighted = u if self.weights is None else u * self.weights
            result = result + self.spreads * weighted.sum(1, dtype=_wide(u))
        return result

    def subtract_from(self, rows: Tensor, seed: Tensor | float = 1.0) -> None:
        """Subtract seed q_i from each row [n, c]."""
        if self.spreads is not None:
            spread = (seed * self.spreads)[:, None].to(rows.dtype)
            rows -= spread if self.weights is None else spread * self.weights
        picks = (seed * self.picks)[:, None].to(rows.dtype)
        rows.scatter_add_(1, self.classes[:, None], -picks)

    def rows(self, part: slice) -> Targets:
        """Return the targets of some rows."""
        spreads = None if self.spreads is None else self.spreads[part]
        picked = self.classes[part], self.sums[part], self.picks[part]
        return Targets(*picked, spreads, self.weights)


class CrossEntropy(Function):
    """The loss of logits z [n, c], a tensor [], float32 at least; z and the fields of `Targets`."""

    is_recorded = True

    @staticmethod
    def forward(z: Tensor, *targets: Any) -> Tensor:
        own = Targets(*targets)
        losses = torch.empty_like(own.sums)
        for part in _pieces(z):
            piece = own.rows(part)
            loss = -piece.along(F.log_softmax(z[part], 1, dtype=_wide(z)))
            losses[part] = loss.where(piece.sums != 0, 0)
        return losses.sum().to(_wide(z))

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
        means = _product(z, along.contiguous(), own.sums)[1]
        return (own.sums * means - own.along(along)).sum().to(_wide(z))


class CrossEntropyGradient(Function):
    """The gradient [n, c] of seed [] times the loss with respect to the logits."""

    is_recorded = True

    @staticmethod
    def forward(z: Tensor, seed: Tensor, *targets: Any) -> Tensor:
        own = Targets(*targets)
        gradient = torch.empty_like(z)
        for part in _pieces(z):
            piece = own.rows(part)
            rows = F.softmax(z[part], 1, dtype=_wide(z))
            rows *= (seed * piece.sums)[:, None].to(rows.dtype)
            piece.subtract_from(rows, seed)
            gradient[part] = rows
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
        multiply = _written_out if torch.is_grad_enabled() else _product
        # A row of scale 0 would be left out with its mean, which the derivative in the seed needs.
        scales = seed * own.sums
        scales = scales.where((scales != 0) | (own.sums == 0), torch.finfo(scales.dtype).tiny)
        product, means = multiply(z, u.contiguous(), scales)
        along = None
        if ctx.needs_input_grad[1]:
            along = (own.sums * means - own.along(u)).sum().to(seed.dtype)
        return product, along, *_NONE

    @staticmethod
    def jvp(ctx: Any, along: Tensor | None, change: Tensor | None, *_: Any) -> Any:
        z, seed, *targets = ctx.saved_tensors
        result = None
        if along is not None:
            result, _means = _product(z, along.contiguous(), seed * targets[1])
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
    if logits.dtype == _wide(logits):
        return kernels.cross_entropy_hvp(logits, u.contiguous(), scales)
    product, means = torch.empty_like(logits), torch.empty_like(scales)
    for part in _pieces(logits):
        z, v = logits[part].float(), u[part].float()
        product[part], means[part] = kernels.cross_entropy_hvp(z, v, scales[part], out=v)
    return product, means


class Product(Function):
    """The product of a Hessian with a vector, by an operator of torch; it has no derivative."""

    @staticmethod
    def forward(operator: Any, *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        """Multiply vector by vector: of large logits each fills the kernel by itself."""

        def one(index: int) -> Any:
            return Product.apply(
                *(
                    t.select(dim, index).contiguous() if isinstance(dim, int) else t
                    for t, dim in zip(inputs, in_dims, strict=True)
                )
            )

        each = zip(*map(one, range(info.batch_size)), strict=True)
        results = tuple(torch.stack(products) for products in each)
        return results, (0,) * len(results)


def _product(z: Tensor, u: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the product of a fused kernel, and the means p_i . u_i."""
    operator = torch.ops.eigenfilter.cross_entropy_product
    product: tuple[Tensor, Tensor] = Product.apply(operator, z, u, scales)
    return product


def _written_out(z: Tensor, u: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_product` does, by operations of torch."""
    p = z.softmax(1, dtype=_wide(z))
    product = p * u
    means = product.sum(1)
    result = scales[:, None].to(p.dtype) * (product - means[:, None] * p)
    return result.where(scales[:, None] != 0, 0).to(z.dtype), means.double()


def _wide(like: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic."""
    return torch.promote_types(like.dtype, torch.float32)


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
    if rows is None or reduction not in ("mean", "sum"):
        return None
    z, classes = rows
    wide = torch.is_autocast_enabled(z.device.type)  # then torch's function computes in float32
    if weight is not None and wide:
        weight = weight.to(_wide(z))
    if not _fits(weight, z, wide):
        return None
    targets, _, count = distributions(
        classes, z.shape[1], weight, ignore_index, reduction, label_smoothing
    )
    loss: Tensor = CrossEntropy.apply(z, *targets)
    loss = loss if wide else loss.to(z.dtype)
    return loss if reduction == "sum" else loss.where(count != 0, torch.nan)  # the mean of nothing


def distributions(
    classes: Tensor,
    columns: int,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> tuple[Targets, Tensor, Tensor]:
    """Return what options make of target classes [n], the shares of rows [n], and their number.

    The loss is the sum over rows of their shares times their negative log-likelihoods, if labels
    are not smoothed. The number of rows [], weighted, is what a mean divides by.
    """
    counts = classes != ignore_index
    classes = classes.where(counts, 0)
    kept = counts.double()
    shares = kept if weight is None else kept * weight.double()[classes]
    count = shares.sum()
    if reduction == "mean":
        divisor = count.where(count != 0, 1)
        kept, shares = kept / divisor, shares / divisor
    picks = (1 - label_smoothing) * shares
    spreads = label_smoothing / columns * kept if label_smoothing else None
    total = columns if weight is None else weight.double().sum()
    sums = picks if spreads is None else picks + spreads * total
    return Targets(classes, sums, picks, spreads, weight), shares, count


def _rows_of(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return logits [n, c] and classes [n] without a copy; None if that is not what is given."""
    if type(logits) not in _PLAIN or type(target) not in _PLAIN or _is_batched(logits, target):
        return None
    device = logits.device.type
    if device not in _PIECE or target.device != logits.device or target.dtype != torch.int64:
        return None
    if logits.ndim < 2 or logits.numel() < LEAST:
        return None
    z = logits.movedim(1, -1)
    if not z.is_floating_point() or z.itemsize < 2 or z.shape[:-1] != target.shape:
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


def _fits(weight: Tensor | None, z: Tensor, wide: bool) -> bool:
    """Whether class weights are constants that torch's function takes with these logits."""
    return weight is None or (
        type(weight) in _PLAIN
        and not weight.requires_grad
        and weight.shape == z.shape[1:]
        and (weight.dtype, weight.device) == (_wide(z) if wide else z.dtype, z.device)
        and not _is_batched(weight)
    )
