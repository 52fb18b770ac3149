"""Descents: what happens at x with the gradient that was taken elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.optimizers._ascents import Run
from eigenfilter.optimizers._guard import Guard
from eigenfilter.optimizers._parts import Part, Piece
from eigenfilter.optimizers._step_counts import StepCounts

MOMENTUM = "momentum_buffer"
EXP_AVG, EXP_AVG_SQ, STEP = "exp_avg", "exp_avg_sq", "step"

SEED = "rounding_seed"  # of a group that rounds stochastically: counts its kernel calls
SEEDS = 2**24
SPREAD = 0x9E3779B1  # odd: groups and shards begin far from each other


def rounding_seed(part: Part) -> Tensor | None:
    """A seed of its own for each call, counted on the device; None rounds to nearest.

    All ranks count alike what they hold in common, so that it stays the same.
    """
    group, dtype = part.group, part.params[0].dtype
    if not group["stochastic_rounding"] or dtype not in (torch.bfloat16, torch.float16):
        return None
    seed = group.get(SEED)
    if seed is None:
        start = (part.number * 1024 + _distributed.shard_number(part.params[0])) * SPREAD % SEEDS
        seed = torch.tensor(float(start), dtype=torch.float32)
    group[SEED] = seed = seed.to(part.device)
    return cast(Tensor, seed.add_(1).remainder_(SEEDS))


class Descent:
    """The update of the parameters; one kernel call takes those that have the same past.

    Attributes:
        keys: what it keeps in a parameter's state, under torch's names.
    """

    keys: tuple[str, ...] = ()

    def past(self, state: dict[str, Any]) -> Hashable:
        """What parameters must have in common to be updated by one call."""
        raise NotImplementedError

    def prime(self, part: Part) -> None:
        """Make the state of a part's parameters, as it is before their first step."""

    def begin(self) -> None:
        """Begin a step, before its first piece."""

    def edited(self) -> bool:
        """Whether somebody else has edited in place what must be read again then."""
        return False

    def unify(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Bring a state that was loaded to the form in which it is kept here."""

    def step(self, run: Run, piece: Piece, guard: Guard) -> None:
        """Update a piece, from its backups if it has moved."""
        raise NotImplementedError


class SGDDescent(Descent):
    """Gradient descent, heavy ball, Nesterov."""

    keys = (MOMENTUM,)

    def past(self, state: dict[str, Any]) -> Hashable:
        return state.get(MOMENTUM) is not None

    def prime(self, part: Part) -> None:
        if part.group["momentum"] != 0:
            part.buffers(MOMENTUM)

    def step(self, run: Run, piece: Piece, guard: Guard) -> None:
        part, group = piece.part, piece.part.group
        momenta, dampening, undo = None, 0.0, False
        if group["momentum"] != 0:
            momenta = part.buffers(MOMENTUM)
            if piece.past:
                dampening = group["dampening"]
            elif group["dampening"] != 0:  # the first step is undamped; if skipped, it is to come
                undo = guard.skips(part.device)
        run(
            part.kernels.descend,
            piece,
            momenta,
            part.backups() if piece.moved else None,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=dampening,
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            rounding_seed=rounding_seed(part),
        )
        if undo:
            part.drop(MOMENTUM)


class AdamWDescent(Descent):
    """AdamW, in one call for the parameters that have taken equally many steps."""

    keys = (EXP_AVG, EXP_AVG_SQ, STEP)

    def __init__(self) -> None:
        self._counts = StepCounts()

    def past(self, state: dict[str, Any]) -> Hashable:
        return self._counts.key(state[STEP]) if STEP in state else None

    def edited(self) -> bool:
        return self._counts.edited()

    def unify(self, state: dict[Tensor, dict[str, Any]]) -> None:
        counted = [(p, s) for p, s in state.items() if STEP in s]
        counts = self._counts.read([s[STEP] for _, s in counted], [p.device for p, _ in counted])
        for (_, s), count in zip(counted, counts, strict=True):
            s[STEP] = count

    def begin(self) -> None:
        self._counts.new_step()

    def prime(self, part: Part) -> None:
        part.buffers(EXP_AVG)
        part.buffers(EXP_AVG_SQ)
        state = part.store.state
        self._start([p for p in part.params if STEP not in state[p]], part)

    def step(self, run: Run, piece: Piece, guard: Guard) -> None:
        part, group = piece.part, piece.part.group
        state = part.store.state
        if piece.past is None:
            self._start(part.params, part)
        if part.counted is None:
            part.counted = self._counts.together([state[p][STEP] for p in part.params])
        beta1, beta2 = group["betas"]
        run(
            part.kernels.descend_adamw,
            piece,
            part.buffers(EXP_AVG),
            part.buffers(EXP_AVG_SQ),
            part.backups() if piece.moved else None,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=part.counted.counts[0] + 1,
            maximize=group["maximize"],
            rounding_seed=rounding_seed(part),
        )
        if self._counts.advance(part.counted, guard.flag(part.device)):
            part.store.changed()

    def _start(self, params: Sequence[Tensor], part: Part) -> None:
        """Give parameters their first counts."""
        if params:
            for p, count in zip(params, self._counts.start(len(params), part.device), strict=True):
                part.store.state[p][STEP] = count
            part.store.changed()
