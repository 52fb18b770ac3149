"""Perturbations: how a method leaves x before the gradient of the descent is taken."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from eigenfilter.filters import ASCENTS, AscentFilter
from eigenfilter.optimizers.amp import AmpState
from eigenfilter.optimizers.buckets import BucketSlice, Gradients

TINY = 1e-12
"""Added to a norm that divides, as the common implementations of SAM do: 0 / 0 is then 0."""


class Landscape(Protocol):
    """f over all data, near the present parameters."""

    def gradient(self, x: Tensor) -> Tensor:
        """Return grad f(x) [n] for x [n]."""

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v [n] at the present parameters for v [n]."""

    def norm(self, v: Tensor) -> float:
        """Return the length of v [n]."""


class Perturbation:
    """The ascents of a method; this base class has none, as plain gradient descent.

    One object serves one optimizer and keeps no tensor from one step to the next.

    Attributes:
        method: name of the method.
        count: number of ascents in a step.
        needs_norm: whether an ascent divides by a norm over all gradients or parameters.
        needs_zero_gradients: whether a parameter whose gradient is zero affects the first ascent.
        is_elementwise: whether the ascents of a parameter need its own gradient alone, so that they
            can be taken while backward runs.
        repeats_random_numbers: whether the evaluation after the first ascent must draw the random
            numbers of the one before it.
        accesses: how often the ascents of a step read or write every element of a list of tensors;
            benchmarks derive bandwidths from it.
    """

    method = "sgd"
    count = 0
    needs_norm = False
    needs_zero_gradients = False
    is_elementwise = False
    repeats_random_numbers = False
    accesses = 0

    @property
    def title(self) -> str:
        """The method's name in text."""
        return self.method if self.theory is None else self.theory.title

    @property
    def theory(self) -> type[AscentFilter] | None:
        """The class of the method's filter; None where none is known, or there is no ascent."""
        return ASCENTS.get(self.method)

    @property
    def filter_options(self) -> dict[str, Any]:
        """The arguments of the filter that the ascents decide."""
        return {}

    def end(self, f: Landscape, x: Tensor, g: Tensor, rho: Tensor, sign: Tensor) -> Tensor:
        """Return the point [n] to which the ascents lead, where the gradient is taken.

        Args:
            f: the function.
            x: parameters [n].
            g: grad f(x) [n].
            rho: radius of each parameter [n].
            sign: -1 where f is maximized, else 1 [n].

        Raises:
            TypeError: it is not known.
        """
        raise TypeError(f"no direction is known for an ascent of {self.title}")

    def prepare(
        self, index: int, gradients: Gradients, padded: Gradients, amp: AmpState
    ) -> Gradients:
        """Compute what depends on all gradients; return the direction of the ascent.

        Args:
            index: number of the ascent in the step, from 0.
            gradients: the buckets that ascend, with their gradients.
            padded: the same; in a first ascent with `needs_zero_gradients` also the parameters
                without a gradient, with zeros.
            amp: the loss scale that the gradients carry.
        """
        return gradients

    def perturb(self, index: int, bucket_slice: BucketSlice) -> None:
        """Perturb a bucket slice. If it is not perturbed yet, this call also saves its backups."""
        raise AssertionError(f"{self.method} has no ascent")

    def starts_from_x(self, index: int) -> bool:
        """Whether ascent `index` starts from x, so that a zero gradient leads back to x."""
        return False

    def record_loss(self, loss: Any) -> None:
        """Record what the closure has returned, before `prepare` gets its gradients."""

    def forget(self) -> None:
        """Drop the tensors of the step that has ended."""

    def needs_graph(self, index: int) -> bool:
        """Whether the gradient for ascent `index` has to be differentiable itself."""
        return False

    def evaluation_context(
        self, index: int, params: Sequence[Tensor]
    ) -> AbstractContextManager[None]:
        """A context for the evaluation whose gradient ascent `index` uses."""
        return nullcontext()
