"""What batches weigh, and whether their loss averages over just that."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eigenfilter.curvature.loss.axes import other_dimension, turned
from eigenfilter.curvature.loss.batch_sources import copied, divisible, joinable, joined, sliced

_logger = logging.getLogger(__name__)

_ELEMENTS = 1 << 22  # of outputs that a loss is taken of at a time
_ROWS = 8  # samples that batches are compared with
# What a loss may raise on other samples than a batch's own: it has the number of samples fixed.
_UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

_REMEDY = (
    "Pass weight=, a function from a batch to what its loss averages over, such as lambda batch: "
    "(batch[1] != -100).sum() where targets are ignored, or the sum of its targets' class weights; "
    "or reduction='sum', where loss_fn adds up over samples. Where the loss is of whole batches, "
    "or no mean at all, as the root or logarithm of one, weight=lambda batch: 1.0 takes the plain "
    "mean over batches"
)


class Part(NamedTuple):
    """Samples: what the model makes of them, and their targets."""

    output: Tensor
    target: Any

    def rows(self, start: int, end: int) -> Part:
        """Return the samples [start, end)."""
        part = slice(start, end)
        return Part(self.output[part], sliced(self.target, part, len(self.output)))

    def few(self, most: int) -> int:
        """Return how many samples, `most` at most, have outputs of up to `_ELEMENTS` elements."""
        fit = _ELEMENTS // max(self.output[0].numel(), 1)
        return max(1, min(most, len(self.output), fit))


Loss = Callable[[Any, Any], Tensor]


class Weights:
    """Checks what batches are taken to weigh against the loss itself.

    Let a loss be the mean of l_i(z_i), weighted with w_i, over the samples i of a batch. Then for
    samples A and B, with W_A and W_B the sums of their weights and z_A the outputs of A,

        d loss(A and B) / d z_A = c d loss(A) / d z_A,    c = W_A / (W_A + W_B)

    for a sum c = 1. So the loss tells by its derivative what samples weigh. The model takes no
    part, and neither do batch statistics and dropout in it. All batches are compared with a few
    samples A of the first that weighs anything: what they are taken to weigh must be in proportion
    to W_B. Where their outputs cannot be joined with A, or weights were given, the parts of a batch
    are compared with each other.

    Nothing is said where the derivatives are not in proportion, as for a loss that couples samples:
    it is no mean of samples, whatever they weigh. Neither where weights that were given are not the
    sum of those of a batch's parts: they do not count anything, and are meant so.
    """

    def __init__(
        self, given: Callable[[Any], float] | None, loss: Loss, *, alone: bool = True
    ) -> None:
        """Say what batches are taken to weigh.

        Args:
            given: batch -> weight, or None for the number of samples.
            loss: output, target -> f.
            alone: whether there are no batches elsewhere. Of those nothing is known here: so all
                batches must weigh what their number of samples says beside A's.
        """
        self._given = given
        self._alone = alone
        self._loss = loss
        self._reference: Part | None = None
        self._gradient_alone: Tensor | None = None  # d loss / dz of it
        self._undivided: Part | None = None  # a first batch whose rows are no samples
        self._hollow: int | None = None  # a batch whose loss was no number
        self._told = False  # that a batch cannot be checked
        self._unit: float | None = None  # W_B of a batch, relative to A's, over what it weighs

    def of(self, batch: Any, output: Any) -> float:
        """Return what a batch weighs.

        Raises:
            ValueError: it is not known, negative or not finite.
        """
        if self._given is not None:
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
                f"a batch weighs {value}; weights must be at least 0 and finite, and a batch that "
                "weighs 0 is left out"
            )
        return value

    def _number(self, batch: Any) -> float:
        assert self._given is not None
        try:
            return float(self._given(batch))
        except Exception as error:  # any: it is the caller's function, and no engine is at fault
            raise ValueError(
                f"weight= gave no number for a batch ({type(error).__name__}: {error}): it must "
                "be a function from a batch to a number, such as lambda batch: len(batch[1])"
            ) from error

    def check(self, index: int, batch: Any, output: Any, target: Any, eps: float) -> bool:
        """Check what a batch weighs, by its loss; return whether that told anything.

        eps: the unit of rounding in the loss.

        Raises:
            ValueError: it weighs something else.
        """
        if not (isinstance(output, Tensor) and output.is_floating_point() and output.ndim):
            return False
        whole, tol = Part(output.detach(), target), math.sqrt(eps)
        if not len(output) or not divisible(target, len(output)):
            return self._compare_undivided(index, whole, tol)
        if self._given is None and self._joins(index, whole):
            return self._compare(index, whole, tol)
        if self._given is None and self._reference is not None:
            rows = min(len(output), len(self._reference.output))
            one, other = self._reference.rows(0, rows), whole.rows(0, rows)
            if self._compare_along(index, one, other, tol):
                return True
            self._tell_rows(index, whole)
        return self._divide(index, batch, whole, tol)

    def tell_unchecked(self, index: int, samples: int) -> None:
        """Log once that a batch beside others weighs what is said, unchecked."""
        if self._told or samples == 1 or (self._alone and not index) or self._given is not None:
            return
        self._told = True
        _logger.warning(
            "batch %d weighs as much as its number of samples, which cannot be checked, because "
            "its parts cannot be told: if loss_fn is not their mean, pass weight=",
            index,
        )

    def _tell_rows(self, index: int, whole: Part) -> None:
        """Log once that rows count as samples, where outputs differ in other dimensions too."""
        if self._reference is None or self._told:
            return
        here, first = whole.output.shape, self._reference.output.shape
        if here[1:] != first[1:]:
            self._told = True
            _logger.warning(
                "the outputs of batch %d, %s, and of one before, [..., %s], differ in more than "
                "their first dimension, whose rows are counted as samples: if samples are in "
                "another, as in [time, samples, ...], or tokens count, pass weight=",
                index,
                list(here),
                ", ".join(map(str, first[1:])),
            )

    def _compare_undivided(self, index: int, whole: Part, tol: float) -> bool:
        """Compare a batch whose target has other rows than its output with one before."""
        if self._given is not None or not len(whole.output):
            return False
        first = self._undivided or self._reference
        if first is not None:
            return self._compare_along(index, first, whole, tol)
        if whole.output.numel() <= _ELEMENTS:
            self._undivided = Part(*copied(tuple(whole)))
        return False

    def _compare_along(self, index: int, first: Part, here: Part, tol: float) -> bool:
        """Compare parts of two batches, of as many rows, along another dimension if they differ
        in one: do they weigh the same? Return whether that tells anything."""
        dimension = other_dimension(first.output, here.output)
        if dimension is None:
            return False
        both = turned(tuple(first), tuple(here), dimension, self._loss)
        if both is None:
            return False
        one, other, loss = both
        share = Weights(None, loss)._share(Part(*one), Part(*other), tol)
        if share is None or math.isnan(share):
            return False
        if abs(share - 0.5) > tol:
            sizes = first.output.shape[dimension], here.output.shape[dimension]
            raise ValueError(
                f"the outputs of batch {index} and of one before have sizes {sizes[1]} and "
                f"{sizes[0]} in dimension {dimension}. Their rows are counted as samples, but by "
                f"its derivative loss_fn averages over dimension {dimension} too, as where samples "
                "are in it ([time, samples, ...]) or tokens count: so pass weight=lambda batch: "
                "float(batch[0].shape[1]), or whatever that size is of a batch; or, if rows "
                f"are the samples, weight=lambda batch: float(len(batch[0])). {_REMEDY}"
            )
        return True

    def _joins(self, index: int, whole: Part) -> bool:
        """Whether there are samples to compare a batch with; they may be its own."""
        if self._reference is None:
            for part in (whole.rows(0, whole.few(_ROWS)), whole):
                alone = self._gradient(part, None)
                if alone is not None and bool(alone.isfinite().all() & alone.any()):
                    self._check_hollow()
                    self._reference, self._gradient_alone = Part(*copied(tuple(part))), alone
                    break
            else:
                value = self._value(whole)
                if value is not None and not bool(value.isfinite()):
                    self._hollow = index if self._hollow is None else self._hollow
                return False
        assert self._reference is not None
        sizes = len(self._reference.output), len(whole.output)
        return joinable(tuple(self._reference), tuple(whole), sizes)

    def _check_hollow(self) -> None:
        """Refuse a batch without a finite loss, now that another has one."""
        if self._hollow is not None:
            raise ValueError(
                f"the loss on batch {self._hollow} is not finite, as that of a mean over nothing, "
                f"but it weighs as much as its number of samples. {_REMEDY}"
            )

    def _compare(self, index: int, whole: Part, tol: float) -> bool:
        """Compare a batch with the reference, and with the batches before; whether that tells."""
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

    def _adds_up(self, whole: Part, tol: float) -> bool:
        """Whether half a batch has the same derivative with the other half as without."""
        rows = whole.few(len(whole.output))
        if rows < 2:
            return False
        share = self._share(whole.rows(0, rows // 2), whole.rows(rows // 2, rows), tol)
        return share is not None and abs(share - 1.0) <= tol

    def _divide(self, index: int, batch: Any, whole: Part, tol: float) -> bool:
        """Compare the halves of a batch with each other, and one sample with the rest.

        Returns whether that tells anything.
        """
        count = len(whole.output)
        if self._given is not None and not divisible(batch, count):
            return False
        rows, told = whole.few(count), False
        for at in {rows // 2, 1} if rows > 1 else ():
            spans = [(0, at), (at, rows)]
            weights = [self._claimed(batch, count, *span) for span in spans]
            together = self._claimed(batch, count, 0, rows)
            if not counts(weights, together):
                return math.isfinite(together)  # they count nothing, and are meant so
            first, rest = (0, 1) if weights[0] >= weights[1] else (1, 0)  # the heavier one tells
            share = self._share(whole.rows(*spans[first]), whole.rows(*spans[rest]), tol)
            told = told or share is not None
            if share is not None and abs(share - weights[first] / together) > tol:
                raise ValueError(
                    f"a part of batch {index} with {spans[first][1] - spans[first][0]} of {rows} "
                    f"samples weighs {weights[first]:g} of {together:g}, but loss_fn, by its "
                    f"derivative, gives it {share:.4g} of the whole (a sum gives each part 1). "
                    f"{_REMEDY}"
                )
        return told

    def _claimed(self, batch: Any, count: int, start: int, end: int) -> float:
        """Return what samples of a batch are taken to weigh; NaN where it cannot be told."""
        if self._given is None:
            return float(end - start)
        with attempt("a weight of a part of a batch"):
            return float(self._given(sliced(batch, slice(start, end), count)))
        return math.nan

    def _share(
        self, first: Part, rest: Part, tol: float, alone: Tensor | None = None
    ) -> float | None:
        """Return c, the share of samples in the loss of both.

        NaN where the derivatives are not in proportion, None where there are none that tell.

        alone: d loss(first) / dz, if it is known.
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
        off = (b - share * a).abs().amax()
        found = float(share)
        if not 0 < found < 1 + tol or float(off) > tol * float(b.abs().amax()):
            return math.nan
        return found

    def _gradient(self, first: Part, rest: Part | None) -> Tensor | None:
        """Return d loss / d z of the first samples, alone or with the rest beside them."""
        z = first.output.detach().requires_grad_()
        # A loss may change what it is given: so copies, as of samples that are joined.
        part = Part(z.clone(), copied(first.target))
        if rest is not None:
            sizes = len(z), len(rest.output)
            part = Part(*joined((z, first.target), tuple(rest), sizes))
        with attempt("the derivative of the loss of a part of a batch"):
            value = self._loss(part.output, part.target)
            if value.requires_grad:
                return torch.autograd.grad(value, z, allow_unused=True)[0]
        return None

    def _value(self, part: Part) -> Tensor | None:
        with attempt("the loss of a part of a batch"):
            return self._loss(*copied(tuple(part)))
        return None


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """Log that something cannot be had of a part of a batch, in place of raising: a model or a loss
    may well be for whole batches only. Without it a weight cannot be checked."""
    try:
        yield
    except _UNFIT as error:
        _logger.info("%s is not to be had, and weights are not checked: %s", what, error)


def counts(weights: Sequence[float], together: float) -> bool:
    """Whether the weights of parts add up to that of the whole: they count what is in it."""
    return together > 0 and abs(sum(weights) - together) <= 1e-6 * together


def check_values(index: int, values: Sequence[float], weights: Sequence[float], tol: float) -> None:
    """Check weights by losses alone, of a batch and its two halves, where outputs do not tell.

    For a mean over other weights the loss of the batch lies between those of its halves, for a sum
    it is their sum. Anything else couples samples. Weights that are off by 1% pass.

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
