"""Descents: what happens at x with the gradient that was taken elsewhere."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.optimizers._ascents import Run
from eigenfilter.optimizers._guard import Guard
from eigenfilter.optimizers._parts import Part, Piece

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
    """AdamW. Parameters that have taken equally many steps share one tensor that counts them.

    A step then costs one addition, on the device, and not one for every parameter.
    """

    keys = (EXP_AVG, EXP_AVG_SQ, STEP)

    def past(self, state: dict[str, Any]) -> Hashable:
        return id(state[STEP]) if STEP in state else None

    def unify(self, state: dict[Tensor, dict[str, Any]]) -> None:
        counted = [(p, s) for p, s in state.items() if STEP in s]
        shared: dict[tuple[torch.device, float], Tensor] = {}
        for p, s in counted:
            count = torch.as_tensor(s[STEP], dtype=torch.float32, device=p.device).reshape(())
            s[STEP] = shared.setdefault((p.device, float(count)), count.clone())

    def step(self, run: Run, piece: Piece, guard: Guard) -> None:
        part, group = piece.part, piece.part.group
        taken = self._steps_taken(piece)
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
            step=taken + 1,
            maximize=group["maximize"],
            rounding_seed=rounding_seed(part),
        )
        flag = guard.flag(part.device)
        taken.add_(1 if flag is None else flag == 0)

    def _steps_taken(self, piece: Piece) -> Tensor:
        """The tensor that counts the steps of this piece, and of no other parameter."""
        part = piece.part
        state = part.store.state
        if piece.past is None:
            taken = torch.zeros((), dtype=torch.float32, device=part.device)
        else:
            taken = cast(Tensor, state[part.params[0]][STEP])
            if part.store.holders(taken) == len(part.params):
                return taken
            taken = taken.clone()
        part.store.share(part.params, STEP, taken)
        return taken
