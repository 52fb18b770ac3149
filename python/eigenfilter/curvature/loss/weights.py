"""The weights of batches, checked against what the loss averages over."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfilter.curvature.loss.batch_trees import (
    can_join,
    clone_tensors,
    is_divisible,
    join_rows,
    take_rows,
)
from eigenfilter.curvature.loss.sample_dimension import other_dimension, with_samples_first

_logger = logging.getLogger(__name__)

_ELEMENTS = 1 << 22  # elements of outputs on which a loss is evaluated at a time
_ROWS = 8  # samples that batches are compared with
# Errors of a loss on other samples than a batch's own, for example if their number is fixed.
_LOSS_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

_REMEDY = (
    "Pass weight=, a function from a batch to what its loss averages over, such as lambda batch: "
    "(batch[1] != -100).sum() where targets are ignored, or the sum of its targets' class weights; "
    "or reduction='sum', where loss_fn adds up over samples. Where the loss is of whole batches, "
    "or no mean at all, as the root or logarithm of one, weight=lambda batch: 1.0 takes the plain "
    "mean over batches"
)


class SampleBlock(NamedTuple):
    """Samples: the outputs of the model, and the targets."""

    output: Tensor
    target: Any

    def rows(self, start: int, end: int) -> SampleBlock:
        """Return the samples [start, end)."""
        part = slice(start, end)
        return SampleBlock(self.output[part], take_rows(self.target, part, len(self.output)))

    def few(self, most: int) -> int:
        """Return how many samples, at most `most`, have at most `_ELEMENTS` elements of outputs."""
        fit = _ELEMENTS // max(self.output[0].numel(), 1)
        return max(1, min(most, len(self.output), fit))


Loss = Callable[[Any, Any], Tensor]


class Weights:
    """The weights of batches, and checks of them against the loss.

    Let a loss be the mean of l_i(z_i) with weights w_i over the samples i of a batch. Then for
    samples A and B with total weights W_A and W_B, and the outputs z_A of A,

        d loss(A and B) / d z_A = c d loss(A) / d z_A,    c = W_A / (W_A + W_B)

    If the loss is a sum, c = 1. So the derivative of the loss shows the weights of samples. The
    model takes no part in this, nor do its batch statistics and dropout. All batches are compared
    with a few samples A of the first batch of positive weight: their weights must be in proportion
    to W_B. If their outputs cannot be joined with A, or `weight` was passed, the parts of a batch
    are compared with each other.

    There is no error if the derivatives are not in proportion, as for a loss that couples samples,
    because it is no mean over samples with any weights. Nor is there one if the weights that
    `weight` returns for parts of a batch do not add up to that of the batch: then they do not count
    anything, which is allowed.
    """

    def __init__(
        self, weight_fn: Callable[[Any], float] | None, loss: Loss, *, alone: bool = True
    ) -> None:
        """Prepare.

        Args:
            weight_fn: function batch -> weight, or None for the number of samples.
            loss: function (output, target) -> f.
            alone: whether no other process has batches. If others have, their weights are unknown
                here, so that each weight must be in proportion to that of A by itself.
        """
        self._weight_fn = weight_fn
        self._alone = alone
        self._loss = loss
        self._reference: SampleBlock | None = None
        self._gradient_alone: Tensor | None = None  # d loss / d z of the reference
        self._undivided_batch: SampleBlock | None = None  # a first batch whose rows are no samples
        self._nonfinite_batch: int | None = None  # a batch whose loss was no number
        self._warned = False  # that a batch cannot be checked
        self._unit: float | None = None  # W_B of a batch, relative to A's, over what it weighs

    def of(self, batch: Any, output: Any) -> float:
        """Return the weight of a batch.

        Raises:
            ValueError: it is unknown, negative or not finite.
        """
        if self._weight_fn is not None:
            value = self._number(batch)
        elif isinstance(output, Tensor) and output.ndim:
            value = float(output.shape[0])
        else:
            raise ValueError(
                "the number of samples is unknown, because the output is not a tensor with a "
                "leading dimension: pass weight, or reduction='sum'"
            )
        if not 0 <= value < math.inf:
            raise ValueError(
                f"a batch has the weight {value}; weights must be at least 0 and finite, and a "
                "batch of weight 0 is left out"
            )
        return value

    def _number(self, batch: Any) -> float:
        assert self._weight_fn is not None
        try:
            return float(self._weight_fn(batch))
        except Exception as error:  # any: it is the caller's function, and no engine is at fault
            raise ValueError(
                f"weight= gave no number for a batch ({type(error).__name__}: {error}): it must "
                "be a function from a batch to a number, such as lambda batch: len(batch[1])"
            ) from error

    def check(self, index: int, batch: Any, output: Any, target: Any, eps: float) -> bool:
        """Check the weight of a batch against its loss; return whether that was conclusive.

        eps: the unit of rounding in the loss.

        Raises:
            ValueError: the loss gives the batch another weight.
        """
        if not (isinstance(output, Tensor) and output.is_floating_point() and output.ndim):
            return False
        whole, tol = SampleBlock(output.detach(), target), math.sqrt(eps)
        if not len(output) or not is_divisible(target, len(output)):
            return self._compare_undivided(index, whole, tol)
        if self._weight_fn is None and self._has_reference(index, whole):
            return self._compare(index, whole, tol)
        if self._weight_fn is None and self._reference is not None:
            rows = min(len(output), len(self._reference.output))
            one, other = self._reference.rows(0, rows), whole.rows(0, rows)
            if self._compare_along(index, one, other, tol):
                return True
            self._warn_of_rows(index, whole)
        return self._compare_parts(index, batch, whole, tol)

    def warn_unchecked(self, index: int, samples: int) -> None:
        """Log once that the weight of a batch beside others is not checked."""
        expected = samples == 1 or (self._alone and not index) or self._weight_fn is not None
        if self._warned or expected:
            return
        self._warned = True
        _logger.warning(
            "batch %d weighs as much as its number of samples, which cannot be checked, because "
            "its parts cannot be told: if loss_fn is not their mean, pass weight=",
            index,
        )

    def _warn_of_rows(self, index: int, whole: SampleBlock) -> None:
        """Log once that rows count as samples, if outputs differ in other dimensions too."""
        if self._reference is None or self._warned:
            return
        here, first = whole.output.shape, self._reference.output.shape
        if here[1:] != first[1:]:
            self._warned = True
            _logger.warning(
                "the outputs of batch %d, %s, and of one before, [..., %s], differ in more than "
                "their first dimension, whose rows are counted as samples: if samples are in "
                "another, as in [time, samples, ...], or tokens count, pass weight=",
                index,
                list(here),
                ", ".join(map(str, first[1:])),
            )

    def _compare_undivided(self, index: int, whole: SampleBlock, tol: float) -> bool:
        """Compare a batch, whose target and output differ in their number of rows, with another."""
        if self._weight_fn is not None or not len(whole.output):
            return False
        first = self._undivided_batch or self._reference
        if first is not None:
            return self._compare_along(index, first, whole, tol)
        if whole.output.numel() <= _ELEMENTS:
            self._undivided_batch = SampleBlock(*clone_tensors(tuple(whole)))
        return False

    def _compare_along(self, index: int, first: SampleBlock, here: SampleBlock, tol: float) -> bool:
        """Compare parts of two batches, of as many rows, along another dimension if they differ
        in one: do they have the same weight? Return whether that is conclusive."""
        dimension = other_dimension(first.output, here.output)
        if dimension is None:
            return False
        both = with_samples_first(tuple(first), tuple(here), dimension, self._loss)
        if both is None:
            return False
        one, other, loss = both
        share = Weights(None, loss)._share(SampleBlock(*one), SampleBlock(*other), tol)
        if share is None or math.isnan(share):
            return False
        if abs(share - 0.5) > tol:
            sizes = first.output.shape[dimension], here.output.shape[dimension]
            of_batch = "batch[0].shape[1]" if dimension == 1 else "batch[1].numel()"
            raise ValueError(
                f"the outputs of batch {index} and of one before have sizes {sizes[1]} and "
                f"{sizes[0]} in dimension {dimension}. Their rows are counted as samples, but by "
                f"its derivative loss_fn averages over dimension {dimension} too, as where samples "
                "are in it ([time, samples, ...]) or tokens or pixels count: so pass weight=lambda "
                f"batch: float({of_batch}), or whatever a batch averages over; or, if rows are the "
                f"samples, weight=lambda batch: float(len(batch[0])). {_REMEDY}"
            )
        return True

    def _has_reference(self, index: int, whole: SampleBlock) -> bool:
        """Whether there are samples A to compare a batch with, which may be its own."""
        if self._reference is None:
            for part in (whole.rows(0, whole.few(_ROWS)), whole):
                alone = self._gradient(part, None)
                if alone is not None and bool(alone.isfinite().all() & alone.any()):
                    self._check_nonfinite()
                    self._reference = SampleBlock(*clone_tensors(tuple(part)))
                    self._gradient_alone = alone
                    break
            else:
                value = self._value(whole)
                nonfinite = value is not None and not bool(value.isfinite())
                if nonfinite and self._nonfinite_batch is None:
                    self._nonfinite_batch = index
                return False
        assert self._reference is not None
        sizes = len(self._reference.output), len(whole.output)
        return can_join(tuple(self._reference), tuple(whole), sizes)

    def _check_nonfinite(self) -> None:
        """Raise ValueError for an earlier batch without a finite loss, now that another has one."""
        if self._nonfinite_batch is not None:
            raise ValueError(
                f"the loss on batch {self._nonfinite_batch} is not finite, as that of a mean over "
                f"nothing, but it weighs as much as its number of samples. {_REMEDY}"
            )

    def _compare(self, index: int, whole: SampleBlock, tol: float) -> bool:
        """Compare a batch with A and with earlier batches; return whether that is conclusive."""
        assert self._reference is not None
        total, step = 0.0, whole.few(len(whole.output))
        for start in range(0, len(whole.output), step):
            rest = whole.rows(start, start + step)
            share = self._share(self._reference, rest, tol, self._gradient_alone)
            if share is None or math.isnan(share):
                return share is not None
            total += 1.0 / share - 1.0 if share < 1.0 - tol else 0.0
        unit = total / len(whole.output)
        if total and self._unit is None:
            self._unit = unit if self._alone else 1.0 / len(self._reference.output)
        if not total or abs(unit - self._unit) > tol * self._unit:  # type: ignore[operator]
            what = (
                f"{unit / self._unit:.3g} times as much a sample as others"
                if total and self._unit
                else "nothing beside others"
            )
            if not total and self._adds_up(whole, tol):
                what = "what makes it a sum: it adds up over samples, so pass reduction='sum'"
            raise ValueError(
                f"loss_fn does not average over the samples of a batch alone: by its derivative "
                f"batch {index}, of {len(whole.output)} samples, weighs {what}. {_REMEDY}"
            )
        return True

    def _adds_up(self, whole: SampleBlock, tol: float) -> bool:
        """Whether half a batch has the same derivative with and without the other half."""
        rows = whole.few(len(whole.output))
        if rows < 2:
            return False
        share = self._share(whole.rows(0, rows // 2), whole.rows(rows // 2, rows), tol)
        return share is not None and abs(share - 1.0) <= tol

    def _compare_parts(self, index: int, batch: Any, whole: SampleBlock, tol: float) -> bool:
        """Compare the halves of a batch with each other, and one sample with the rest.

        Returns whether that is conclusive.
        """
        count = len(whole.output)
        if self._weight_fn is not None and not is_divisible(batch, count):
            return False
        rows, conclusive = whole.few(count), False
        for at in {rows // 2, 1} if rows > 1 else ():
            spans = [(0, at), (at, rows)]
            weights = [self._unchecked_weight(batch, count, *span) for span in spans]
            together = self._unchecked_weight(batch, count, 0, rows)
            if not counts(weights, together):
                return math.isfinite(together)  # they count nothing, and are meant so
            first, rest = (0, 1) if weights[0] >= weights[1] else (1, 0)  # the heavier one tells
            share = self._share(whole.rows(*spans[first]), whole.rows(*spans[rest]), tol)
            conclusive = conclusive or share is not None
            if share is not None and abs(share - weights[first] / together) > tol:
                raise ValueError(
                    f"a part of batch {index} with {spans[first][1] - spans[first][0]} of {rows} "
                    f"samples weighs {weights[first]:g} of {together:g}, but loss_fn, by its "
                    f"derivative, gives it {share:.4g} of the whole (a sum gives each part 1). "
                    f"{_REMEDY}"
                )
        return conclusive

    def _unchecked_weight(self, batch: Any, count: int, start: int, end: int) -> float:
        """Return the weight that samples of a batch should have; NaN if it is unknown."""
        if self._weight_fn is None:
            return float(end - start)
        with logging_failures("a weight of a part of a batch"):
            return float(self._weight_fn(take_rows(batch, slice(start, end), count)))
        return math.nan

    def _share(
        self, first: SampleBlock, rest: SampleBlock, tol: float, alone: Tensor | None = None
    ) -> float | None:
        """Return c, the share of the first samples in the loss of both.

        It is NaN if the derivatives are not in proportion, and None if they are zero or not finite.

        alone: d loss(first) / d z, if it is known.
        """
        alone = self._gradient(first, None) if alone is None else alone
        within = self._gradient(first, rest)
        if alone is None or within is None:
            return None
        size = alone.abs().amax()
        if not bool((size > 0) & alone.isfinite().all() & within.isfinite().all()):
            return None
        a, b = ((g / size).double().flatten() for g in (alone, within))
        share = a.dot(b) / a.dot(a)
        error = (b - share * a).abs().amax()
        c = float(share)
        if not 0 < c < 1 + tol or float(error) > tol * float(b.abs().amax()):
            return math.nan
        return c

    def _gradient(self, first: SampleBlock, rest: SampleBlock | None) -> Tensor | None:
        """Return d loss / d z of the first samples, alone or together with the rest."""
        z = first.output.detach().requires_grad_()
        # Copies, because a loss may change its arguments; joining copies too.
        part = SampleBlock(z.clone(), clone_tensors(first.target))
        if rest is not None:
            sizes = len(z), len(rest.output)
            part = SampleBlock(*join_rows((z, first.target), tuple(rest), sizes))
        with logging_failures("the derivative of the loss of a part of a batch"):
            value = self._loss(part.output, part.target)
            if value.requires_grad:
                return torch.autograd.grad(value, z, allow_unused=True)[0]
        return None

    def _value(self, part: SampleBlock) -> Tensor | None:
        with logging_failures("the loss of a part of a batch"):
            return self._loss(*clone_tensors(tuple(part)))
        return None


@contextmanager
def logging_failures(what: str) -> Iterator[None]:
    """A context that logs errors of a model or a loss on part of a batch, instead of raising.

    They may work for whole batches only; then a weight cannot be checked.
    """
    try:
        yield
    except _LOSS_ERRORS as error:
        _logger.info("%s is not to be had, and weights are not checked: %s", what, error)


def counts(weights: Sequence[float], together: float) -> bool:
    """Whether the weights of parts add up to that of the whole, as counts of something do."""
    return together > 0 and abs(sum(weights) - together) <= 1e-6 * together


def check_values(index: int, values: Sequence[float], weights: Sequence[float], tol: float) -> None:
    """Check weights by the values of the loss on a batch and on its halves, without derivatives.

    For a mean with other weights, the loss of the batch lies between those of its halves; for a
    sum, it is their sum. Anything else couples samples and passes, as do weights that are off by
    1%.

    Args:
        index: index of the batch, for the message.
        values: the losses of the batch and of its halves.
        weights: their weights.
        tol: relative tolerance.

    Raises:
        ValueError: f on the batch is not the weighted mean of f on the halves.
    """
    whole, *halves = values
    together, *parts = weights
    if not math.isfinite(whole) or not counts(parts, together):
        return
    shares = [w * f for w, f in zip(parts, halves, strict=True) if w]
    expected = sum(shares) / together
    size = max(map(abs, values))
    slack = tol * size + 0.01 * abs(halves[0] - halves[1])
    if math.isfinite(expected):
        adds = abs(whole - sum(halves)) <= tol * size
        between = min(halves) <= whole <= max(halves)
        half_ignored = not all(map(math.isfinite, halves))
        if half_ignored or abs(whole - expected) <= slack or not (adds or between):
            return
    raise ValueError(
        f"the loss of batch {index} is {whole:.6g}, and those of its halves are {halves[0]:.6g} "
        f"and {halves[1]:.6g}, which weigh {parts[0]:g} and {parts[1]:g}: it is not their weighted "
        f"mean. {_REMEDY}"
    )
