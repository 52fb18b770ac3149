"""Ascents: how a method gets from x to where the descent's gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.kernels.conventions import power_of_two
from eigenfilter.optimizers._guard import Guard
from eigenfilter.optimizers._hyperparameters import rho_of
from eigenfilter.optimizers._parts import Gradients, Part, Piece
from eigenfilter.optimizers._shards import FLAT_NORM

Run = Callable[..., None]
"""Calls a kernel on a piece: (kernel, piece, further arguments)."""

TINY = 1e-12
"""Added to a norm that divides, as the common implementations of SAM do: 0 / 0 is then 0."""


class Ascent:
    """A method's ascents; this one, plain gradient descent's, has none.

    An ascent keeps no tensor from one step to the next, and one object serves one optimizer.

    Attributes:
        method: the method's name.
        count: its ascents a step.
        takes_norm: whether it divides by a norm of all gradients or parameters.
        takes_zeros: whether a gradient of zero at x does something to its first ascent.
    """

    method = "sgd"
    count = 0
    takes_norm = False
    takes_zeros = False

    def prepare(self, index: int, found: Gradients, whole: Gradients, guard: Guard) -> Gradients:
        """Do what takes all gradients at once; return them, or what is to move along instead.

        Args:
            index: which ascent of the step, from 0.
            found: the parts that ascend, with their gradients.
            whole: the same, in a first ascent that `takes_zeros` with zeros where there is none.
            guard: the scale the gradients carry.
        """
        return found

    def move(self, run: Run, index: int, piece: Piece) -> None:
        """Move a piece; its backups hold x if it has moved before, else this call saves it."""
        raise AssertionError(f"{self.method} has no ascent")

    def from_x(self, index: int) -> bool:
        """Whether ascent `index` starts from x, so that a gradient of zero leads back there."""
        return False

    def note(self, loss: Any) -> None:
        """Take note of what the closure has returned, before `prepare` gets its gradients."""

    def forget(self) -> None:
        """Drop what was kept for the step that has ended."""

    def needs_graph(self, index: int) -> bool:
        """Whether the gradient for ascent `index` has to be differentiable itself."""
        return False

    def watch(self, index: int, params: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A context for the evaluation whose gradient ascent `index` takes."""
        return nullcontext()

    def replays(self, index: int) -> bool | None:
        """Whether evaluation `index` draws the random numbers of the one before it (False, True).

        None where they are not looked after.
        """
        return None


def signed(group: dict[str, Any]) -> float | Tensor:
    """The length of an ascent: rho, or -rho where f is maximised."""
    rho = rho_of(group)
    return -rho if group.get("maximize") else rho


def total_norms(
    lists: Sequence[tuple[Part, Sequence[Tensor]]], *, weights: bool = False
) -> dict[torch.device, Tensor]:
    """Euclidean norm of all tensors of all parts together, a 0-dim float64 tensor on each device.

    Args:
        lists: parts, with tensors like their parameters.
        weights: multiply the tensors by the parameters before, elementwise.
    """
    if any(part.is_flat for part, _ in lists):
        raise RuntimeError(FLAT_NORM)
    norms: dict[torch.device, list[Tensor]] = {part.device: [] for part, _ in lists}
    for part, tensors in lists:
        for placing, indices in part.placings:
            whole = len(part.placings) == 1
            # Of float32 gradients it may exceed what float32 holds.
            norm = torch.empty((), dtype=torch.float64, device=part.device)
            factors = part.tensors if whole else [part.tensors[i] for i in indices]
            part.kernels.norm(
                tensors if whole else [tensors[i] for i in indices],
                norm,
                weights=factors if weights else None,
            )
            norms[part.device].append(_distributed.of_all_shards(norm, placing))
    sums = {device: combined_norm(terms) for device, terms in norms.items()}
    return {device: combined_norm([s.to(device) for s in sums.values()]) for device in sums}


def combined_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of what has these norms, whose squares float64 need not hold."""
    if len(norms) == 1 and norms[0].numel() == 1:
        return norms[0].reshape(())
    together = torch.cat([n.reshape(-1) for n in norms])
    scale = power_of_two(together.amax())
    return (together / scale).square().sum().sqrt() * scale
