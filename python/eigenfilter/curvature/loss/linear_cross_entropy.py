"""Cross-entropy of hidden states and an output matrix, whose logits never exist as a whole.

Let token i have the hidden state h_i, and let W and b be the output matrix and its bias. With the
soft cap c, its logits are y_i = c tanh(z_i / c) for z_i = W h_i + b, and without one y_i = z_i. Let
l_i = log sum exp(y_i) and p_i = softmax(y_i), let q_i be its target distribution as in
`cross_entropy`, of sum s_i, and t_i its share of the z-loss. Then the loss, its gradient in y_i and
the product of the Hessian in y_i with u_i are

    sum_i s_i l_i - q_i . y_i + t_i l_i^2,
    g_i = r_i p_i - q_i,    r_i = s_i + 2 t_i l_i,
    k_i = r_i (p_i u_i - m_i p_i) + 2 t_i m_i p_i,    m_i = p_i . u_i.

They go through y_i(z_i) by y' = 1 - (y / c)^2 and y'' = -2 y y' / c^2, and through z_i(h_i, W, b),
which is bilinear: in directions (h', W', b') it changes by W h_i' + W' h_i + b', and the product
with the Hessian is that of the transpose with k_i, and of its change with g_i. All this is done for
some tokens at a time, and their logits are computed again for each derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from eigenfilter import kernels
from eigenfilter.curvature.loss.cross_entropy import Product, Targets, distributions

_PIECE = {"cpu": 1 << 22, "cuda": 1 << 26}  # logits that exist at a time, if chunk is None

_REQUIRED = ("hidden", "weight")

_Optional = Sequence[Tensor | None]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Return the cross-entropy of the logits hidden @ weight.T + bias, some tokens at a time.

        y = c tanh((W h + b) / c),    loss = CE(y, targets) + z_loss mean (log sum exp y)^2

    It is `torch.nn.functional.cross_entropy` of y, and its derivatives of all orders are exact. The
    value, the gradient, and products with the Hessian never take the memory of all logits, but that
    of some arrays of `chunk` rows of them, and compute logits again instead: a training step takes
    four matrix products where it would take three, and a product with the Hessian seven in place of
    six. Third derivatives form all logits. Ignored tokens cost nothing.

    Args:
        hidden: H [..., d], floating; bfloat16 and float16 are widened to float32, as the output
            matrix is, so that logits are never rounded to less. Autocast does not apply.
        weight: W [V, d].
        targets: classes [...] in [0, V), or `ignore_index`; int64.
        bias: b [V]; None for zeros.
        ignore_index: target of tokens that do not count.
        label_smoothing: share of the uniform distribution in targets, in [0, 1].
        z_loss: coefficient of the square of log sum exp y, >= 0; its mean or sum is taken as the
            loss's own is.
        softcap: c > 0; None for y = W h + b.
        class_weights: weights of the classes [V] as in torch's function, constants; None for ones.
        reduction: "mean" over tokens that count, nan if there are none, or "sum".
        chunk: number of tokens whose logits exist at a time; None for about 4 million logits on the
            CPU, and 64 million on a GPU.

    Returns:
        The loss, a tensor [] of the dtype of `hidden`, or float32 where that is wider.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import linear_cross_entropy
        >>> hidden, weight = torch.eye(3, 4), torch.arange(20.0).view(5, 4) / 10
        >>> targets = torch.tensor([4, 0, -100])
        >>> print(f"{linear_cross_entropy(hidden, weight, targets, softcap=30.0):.4f}")
        1.7641
        >>> logits = 30 * torch.tanh(hidden @ weight.T / 30)
        >>> print(f"{torch.nn.functional.cross_entropy(logits, targets):.4f}")
        1.7641

    Sources: the derivatives are in the module's text; B. A. Pearlmutter, Neural Computation 6
    (1994), for products with a Hessian; the idea of taking logits in pieces is that of E. Wijmans
    et al., Cut your losses in large-vocabulary language models, arXiv 2411.09009. A. Chowdhery et
    al., PaLM, arXiv 2204.02311, section 5, for the z-loss; Gemma 2, arXiv 2408.00118, section 2,
    for the soft cap.
    """
    return LinearLogits(hidden, weight, bias, softcap).cross_entropy(
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        class_weights=class_weights,
        reduction=reduction,
        chunk=chunk,
    )


@dataclass(frozen=True)
class LinearLogits:
    """The logits of an output layer, which are not formed: `linear_cross_entropy` with its target.

    The `forward` of an operator returns them in place of logits, with its targets, and its loss_fn
    calls `cross_entropy`. A `GGNOperator` then has the Gauss-Newton matrix in these logits, after
    the soft cap. Since this is no tensor, several batches need `weight=`, what each averages over.

    Attributes:
        hidden: H [..., d], floating.
        weight: W [V, d].
        bias: b [V]; None for zeros.
        softcap: c > 0; None for logits W h + b.

    Example:
        >>> import torch
        >>> from eigenfilter.curvature import GGNOperator, LinearLogits
        >>> layer = torch.nn.Linear(1, 2, bias=False).double()
        >>> _ = torch.nn.init.zeros_(layer.weight)
        >>> batch = torch.ones(4, 1, dtype=torch.float64), torch.tensor([0, 1, 1, -100])
        >>> def forward(model, batch):
        ...     return LinearLogits(batch[0], model.weight), batch[1]
        >>> op = GGNOperator(layer, LinearLogits.cross_entropy, batch, forward=forward)
        >>> op.to_dense().tolist()
        [[0.25, -0.25], [-0.25, 0.25]]
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    # Whether derivatives of gradients are those of the Gauss-Newton matrix in the logits.
    _gauss_newton: bool = False

    def variables(self) -> Tensor:
        """Return H, W and b in one tensor [n], whose Jacobian a Gauss-Newton matrix has."""
        return torch.cat([t.flatten() for t in self._tensors()])

    def at(self, variables: Tensor) -> LinearLogits:
        """Return the logits at `variables` [n], with the curvature of a Gauss-Newton matrix."""
        own = self._tensors()
        parts = torch.split(variables, [t.numel() for t in own])
        h, w, *b = (p.view_as(t).to(t.dtype) for p, t in zip(parts, own, strict=True))
        return replace(self, hidden=h, weight=w, bias=b[0] if b else None, _gauss_newton=True)

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def cross_entropy(
        self,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        class_weights: Tensor | None = None,
        reduction: str = "mean",
        chunk: int | None = None,
    ) -> Tensor:
        """Return `linear_cross_entropy`, whose arguments these are."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        _check(hidden, weight, bias, targets, class_weights)
        _check_options(label_smoothing, z_loss, self.softcap, reduction, chunk)
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        h, classes = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        rows = (classes != ignore_index).nonzero()[:, 0]
        if len(rows) < len(classes):
            h, classes = h.index_select(0, rows), classes.index_select(0, rows)
        own, shares, count = distributions(
            classes,
            len(weight),
            None if class_weights is None else class_weights.to(dtype),
            ignore_index,
            reduction,
            label_smoothing,
        )
        if chunk is None:
            chunk = max(1, _PIECE.get(h.device.type, _PIECE["cuda"]) // len(weight))
        loss: Tensor = LinearCrossEntropy.apply(
            h.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            *own,
            z_loss * shares if z_loss else None,
            self.softcap,
            chunk,
            not self._gauss_newton,
        )
        return loss if reduction == "sum" else loss.where(count != 0, torch.nan)


def _check(hidden: Any, weight: Any, bias: Any, targets: Any, class_weights: Any) -> None:
    """Raise TypeError or ValueError if tensors do not fit."""
    floating = {"hidden": hidden, "weight": weight, "bias": bias, "class_weights": class_weights}
    given = {name: t for name, t in floating.items() if t is not None or name in _REQUIRED}
    for name, t in (given | {"targets": targets}).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
        if t.device != hidden.device:
            raise ValueError(
                f"{name} is on {t.device}, hidden on {hidden.device}: move them to one device"
            )
        if name != "targets" and not t.is_floating_point():
            raise TypeError(f"{name} must be floating, not {t.dtype}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be class indices of dtype int64, not {targets.dtype}")
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden must be [..., d] and weight [V, d], not {shapes}")
    expected = {"targets": hidden.shape[:-1], "bias": weight.shape[:1]}
    for name, shape in (expected | {"class_weights": weight.shape[:1]}).items():
        t = targets if name == "targets" else floating[name]
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(t.shape)}")
    if class_weights is not None and class_weights.requires_grad:
        raise ValueError("class_weights must be constants: pass class_weights.detach()")


def _check_options(
    label_smoothing: float, z_loss: float, softcap: float | None, reduction: str, chunk: int | None
) -> None:
    """Raise ValueError if an option is out of range."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], not {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be a number >= 0, not {z_loss}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be a number > 0, or None for no cap, not {softcap}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be a number of tokens >= 1, not {chunk}")


class _Fixed(NamedTuple):
    """What is no variable: the fields of `Targets`, t [n] or None for zeros, and options."""

    classes: Tensor
    sums: Tensor
    picks: Tensor
    spreads: Tensor | None
    weights: Tensor | None
    squares: Tensor | None
    softcap: float | None
    chunk: int
    curved: bool  # False leaves the terms of g_i out of products

    def pieces(self) -> Iterator[tuple[slice, Targets, Tensor | None]]:
        """Yield slices of the tokens, with their targets and shares of the z-loss."""
        for first in range(0, len(self.classes), self.chunk):
            part = slice(first, first + self.chunk)
            squares = None if self.squares is None else self.squares[part]
            yield part, Targets(*self[:5]).rows(part), squares


_NONE = (None,) * len(_Fixed._fields)  # derivatives with respect to what is fixed


class LinearCrossEntropy(Function):
    """The loss; the arguments are H [n, d], W [V, d], b [V] or None, and the fields of `_Fixed`."""

    is_recorded = True

    @staticmethod
    def forward(h: Tensor, weight: Tensor, bias: Tensor | None, *fixed: Any) -> Tensor:
        own = _Fixed(*fixed)
        total = own.sums.new_zeros(())
        with _no_autocast(h):
            for part, targets, squares in own.pieces():
                y = _logits(h[part], weight, bias, own.softcap)
                sizes = y.logsumexp(1).double()
                loss = targets.sums * sizes - targets.along(y)
                total += (loss if squares is None else loss + squares * sizes**2).sum()
        return total.to(h.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, seed: Tensor) -> Any:
        h, weight, bias, *fixed = _saved(ctx)
        needed = tuple(ctx.needs_input_grad[:3])
        return *LinearCrossEntropyGradient.apply(h, weight, bias, seed, needed, *fixed), *_NONE

    @staticmethod
    def jvp(ctx: Any, *along: Any) -> Any:
        h, weight, bias, *fixed = _saved(ctx)
        needed = tuple(u is not None for u in along[:3])
        seed = h.new_ones(())
        grads = LinearCrossEntropyGradient.apply(h, weight, bias, seed, needed, *fixed)
        pairs = zip(grads, along[:3], strict=True)
        return sum((g * u).sum() for g, u in pairs if g is not None)


class LinearCrossEntropyGradient(Function):
    """The gradient of seed [] times the loss: with respect to H, W and b, or None if not needed."""

    is_recorded = True

    @staticmethod
    def forward(
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor,
        needed: tuple[bool, ...],
        *fixed: Any,
    ) -> Any:
        own = _Fixed(*fixed)
        results = _zeros((h, weight, bias), needed)
        with _no_autocast(h):
            for part, targets, squares in own.pieces():
                y = _logits(h[part], weight, bias, own.softcap)
                rates = _rates(y, targets, squares)
                slope = None if own.softcap is None else _slope(y, own.softcap)
                g = _gradient(y, targets, rates)
                _add_transpose(results, part, g if slope is None else g.mul_(slope), h, weight)
        return tuple(None if r is None else r.mul_(seed) for r in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.needed = inputs[4]
        _save(ctx, inputs[:4] + inputs[5:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> Any:
        h, weight, bias, seed, *fixed = _saved(ctx)
        needed = ctx.needs_input_grad[:4]
        # If this is differentiated again, it must be by operations that all have derivatives.
        written_out = torch.is_grad_enabled() and _Fixed(*fixed).curved
        multiply: Any = _written_out if written_out else _product
        return *multiply(h, weight, bias, seed, *u, needed, *fixed), None, *_NONE

    @staticmethod
    def jvp(ctx: Any, *along: Any) -> Any:
        h, weight, bias, seed, *fixed = _saved(ctx)
        u, change = along[:3], along[3]
        needed = ctx.needed
        results = _product(h, weight, bias, seed, *u, (*needed, False), *fixed)[:3]
        if change is None:
            return results
        grads = LinearCrossEntropyGradient.apply(h, weight, bias, change, needed, *fixed)
        return tuple(None if r is None else r + g for r, g in zip(results, grads, strict=True))


# Where torch.autograd.grad(is_grads_batched=True) maps over vectors, an operator of torch is called
# for one after the other. A function would get them all in a tensor without memory.
torch.library.define(
    "eigenfilter::linear_cross_entropy_product",
    "(Tensor h, Tensor weight, Tensor? bias, Tensor seed, Tensor? h_along, Tensor? weight_along, "
    "Tensor? bias_along, bool[4] needed, Tensor classes, Tensor sums, Tensor picks, "
    "Tensor? spreads, Tensor? weights, Tensor? squares, float? softcap, int chunk, bool curved) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("eigenfilter::linear_cross_entropy_product", "CompositeExplicitAutograd")
def _multiply(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    h_along: Tensor | None,
    weight_along: Tensor | None,
    bias_along: Tensor | None,
    needed: Sequence[bool],
    *fixed: Any,
) -> tuple[Tensor, ...]:
    own = _Fixed(*fixed)
    results = _zeros((h, weight, bias), needed)
    of_seed = own.sums.new_zeros(())
    with _no_autocast(h):
        for part, targets, squares in own.pieces():
            y = _logits(h[part], weight, bias, own.softcap)
            u = torch.zeros_like(y)
            if h_along is not None:
                u.addmm_(h_along[part], weight.T)
            if weight_along is not None:
                u.addmm_(h[part], weight_along.T)
            if bias_along is not None:
                u += bias_along
            rates = _rates(y, targets, squares)
            if own.softcap is not None:
                slope = _slope(y, own.softcap)
                curve = y * slope * u * (-2 / own.softcap**2)
                u *= slope
            of_seed -= targets.along(u).sum()
            k, means = kernels.cross_entropy_hvp(y, u, rates, out=u)
            of_seed += (rates * means).sum()
            if squares is not None:
                k += (2 * squares * means).to(k.dtype)[:, None] * y.softmax(1)
            if own.softcap is not None:
                k *= slope
            if own.curved:
                g = _gradient(y, targets, rates)
                if own.softcap is not None:
                    k.addcmul_(g, curve)
                    g *= slope
                _add_transpose(results, part, g, h_along, weight_along, bias=False)
            _add_transpose(results, part, k, h, weight)
    products = [seed.new_empty(0) if r is None else r.mul_(seed) for r in results]
    return *products, of_seed.to(seed.dtype)


def _product(*args: Any) -> tuple[Tensor | None, ...]:
    """Return the product of the Hessian of seed times the loss, in H, W, b and seed, if needed."""
    results = Product.apply(torch.ops.eigenfilter.linear_cross_entropy_product, *args)
    return tuple(r if need else None for r, need in zip(results, args[7], strict=True))


def _written_out(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    h_along: Tensor | None,
    weight_along: Tensor | None,
    bias_along: Tensor | None,
    needed: tuple[bool, ...],
    *fixed: Any,
) -> Any:
    """Return what `_product` does, by torch's derivatives of the loss in one piece."""
    along = (h_along, weight_along, bias_along)
    own = zip((h, weight, bias), along, strict=True)
    at = [t for t, u in own if t is not None and u is not None]
    u = [u for u in along if u is not None]
    loss = seed * plain(h, weight, bias, _Fixed(*fixed))
    gradient = torch.autograd.grad(loss, at, create_graph=True)
    variables = (h, weight, bias, seed)
    inputs = [t for t, need in zip(variables, needed, strict=True) if need and t is not None]
    results = iter(torch.autograd.grad(gradient, inputs, u, create_graph=True))
    return tuple(next(results) if need else None for need in needed)


def plain(h: Tensor, weight: Tensor, bias: Tensor | None, fixed: _Fixed) -> Tensor:
    """The reference: the loss by operations of torch, of all logits."""
    y = F.linear(h, weight, bias)
    if fixed.softcap is not None:
        y = fixed.softcap * (y / fixed.softcap).tanh()
    sizes = y.logsumexp(1)
    loss = (fixed.sums * sizes).sum() - Targets(*fixed[:5]).along(y).sum()
    if fixed.squares is not None:
        loss = loss + (fixed.squares * sizes**2).sum()
    return loss.to(h.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Save the tensors, all but the last three arguments, for backward and forward mode."""
    ctx.options = inputs[-3:]
    ctx.save_for_backward(*inputs[:-3])
    ctx.save_for_forward(*inputs[:-3])


def _saved(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors, *ctx.options


def _no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _zeros(tensors: _Optional, needed: Sequence[bool]) -> list[Tensor | None]:
    pairs = zip(tensors, needed, strict=False)
    return [torch.zeros_like(t) if t is not None and need else None for t, need in pairs]


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Return y [n, V]."""
    z = F.linear(h, weight, bias)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _slope(y: Tensor, softcap: float) -> Tensor:
    """Return dy/dz [n, V]."""
    return 1 - (y / softcap) ** 2


def _rates(y: Tensor, targets: Targets, squares: Tensor | None) -> Tensor:
    """Return r [n], float64."""
    if squares is None:
        return targets.sums
    return targets.sums + 2 * squares * y.logsumexp(1).double()


def _gradient(y: Tensor, targets: Targets, rates: Tensor) -> Tensor:
    """Return r p - q [n, V]."""
    g = y.softmax(1).mul_(rates.to(y.dtype)[:, None])
    targets.subtract_from(g)
    return g


def _add_transpose(
    results: list[Tensor | None],
    part: slice,
    k: Tensor,
    h: Tensor | None,
    weight: Tensor | None,
    *,
    bias: bool = True,
) -> None:
    """Add k W to rows of the result of H, k^T h to that of W, and the sum of k to that of b."""
    of_h, of_weight, of_bias = results
    if of_h is not None and weight is not None:
        of_h[part].addmm_(k, weight)
    if of_weight is not None and h is not None:
        of_weight.addmm_(k.T, h[part])
    if of_bias is not None and bias:
        of_bias += k.sum(0)
