"""How many steps each parameter has taken, for optimizers whose update depends on it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Place = slice | Tensor
"""Which elements of a block; a slice where they lie side by side."""

_SLOTS = 64
"""Counts in a block, at least: parameters that begin one by one do not have a block each."""


class StepCounts:
    """A 0-dim float32 tensor for each parameter, as torch keeps it, counted up a block at a time.

    The tensors are elements of a few blocks, so that a step costs one addition, on the device, and
    an edit of one changes no other. Which parameters have taken equally many steps is kept on the
    host: to compare the tensors would wait for the device. An edit is noticed, and the counts are
    then read again: on the CPU by the values, on a GPU by the version of the block, which an edit
    through `.data` does not change.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._places: dict[int, tuple[_Block, int]] = {}  # by the id of the count
        self._peers: dict[int, _Peers] = {}
        self._history = 0
        self._after: dict[int, int] = {}  # histories that the present step has made of others

    def __reduce__(self) -> tuple[type[StepCounts], tuple[()]]:
        return StepCounts, ()  # a copy reads the counts of its own state

    def read(
        self, counts: Sequence[Tensor | float], devices: Sequence[torch.device]
    ) -> list[Tensor]:
        """Start again from these counts.

        Returns:
            The tensors that stand for them from now on: the same ones, where they are of a block.
        """
        made: list[Tensor | None] = [None] * len(counts)
        kept: dict[int, tuple[_Block, int]] = {}
        for i, (c, device) in enumerate(zip(counts, devices, strict=True)):
            known = isinstance(c, Tensor) and id(c) in self._places and c.device == device
            if isinstance(c, Tensor) and known and id(c) not in kept:
                made[i], kept[id(c)] = c, self._places[id(c)]
        self._blocks = list({id(block): block for block, _ in kept.values()}.values())
        self._places, self._peers = kept, {}
        for device in dict.fromkeys(devices):
            new = [i for i, d in enumerate(devices) if d == device and made[i] is None]
            for i, count in zip(new, self._take(len(new), device), strict=True):
                made[i] = count.copy_(torch.as_tensor(counts[i]).reshape(()))
        found = [count for count in made if count is not None]
        for block in self._blocks:
            block.accept()
        by_steps: dict[tuple[torch.device, float], _Peers] = {}
        numbers = {id(block): block.values.tolist() for block in self._blocks}
        for count in found:
            block, i = self._places[id(count)]
            steps = numbers[id(block)][i]
            peers = by_steps.setdefault((count.device, steps), _Peers(steps, 0, 0))
            self._join(count, peers)
        return found

    def start(self, n: int, device: torch.device) -> list[Tensor]:
        """The counts of `n` parameters that have taken no step."""
        counts = self._take(n, device)
        peers = _Peers(0.0, 0, 0)
        for count in counts:
            self._join(count, peers)
        return counts

    def edited(self) -> bool:
        """Whether somebody else has changed a count."""
        return any(block.edited() for block in self._blocks)

    def key(self, count: Tensor) -> Hashable:
        """Equal for parameters that have taken equally many steps."""
        peers = self._peers[id(count)]
        return peers.steps, peers.history

    def together(self, counts: list[Tensor]) -> Counted:
        """The counts of parameters that step together, until they are read again."""
        at: dict[int, tuple[_Block, list[int]]] = {}
        for count in counts:
            block, i = self._places[id(count)]
            at.setdefault(id(block), (block, []))[1].append(i)
        runs = []
        for block, indices in at.values():
            run = slice(indices[0], indices[-1] + 1)
            in_a_row = indices == list(range(run.start, run.stop))
            place = run if in_a_row else torch.tensor(indices, device=block.values.device)
            runs.append(_Run(block, place))
        return Counted(counts, runs)

    def advance(self, counted: Counted, found_inf: Tensor | None) -> bool:
        """Count a step of parameters that have taken equally many, unless it was skipped.

        Returns:
            Whether they part from others that had taken equally many, or join some.
        """
        skipped = None if found_inf is None else found_inf.reshape(()) != 0
        for run in counted.runs:
            run.advance(skipped)
        old = self._peers[id(counted.counts[0])]
        steps, history = old.steps, old.history
        if skipped is None:
            steps += 1
        elif skipped.device.type == "cpu":
            steps += 0 if bool(skipped) else 1
        else:
            history = self._next_history(history)
        peers = counted.peers
        regrouped = peers is None or peers.size != len(counted.counts)
        if peers is None or regrouped:
            peers = counted.peers = _Peers(steps, history, 0)
            for count in counted.counts:
                self._peers[id(count)].size -= 1
                self._join(count, peers)
        peers.steps, peers.history = steps, history
        return regrouped

    def new_step(self) -> None:
        """Begin a step: what is skipped from now on is skipped together."""
        self._after.clear()

    def _next_history(self, history: int) -> int:
        """The history of those with this one after a step of which the device alone knows more."""
        if history not in self._after:
            self._history += 1
            self._after[history] = self._history
        return self._after[history]

    def _join(self, count: Tensor, peers: _Peers) -> None:
        peers.size += 1
        self._peers[id(count)] = peers

    def _take(self, n: int, device: torch.device) -> list[Tensor]:
        """`n` counts of 0 side by side."""
        block = next((b for b in self._blocks if b.values.device == device and b.free >= n), None)
        if block is None:
            block = _Block(torch.zeros(max(n, _SLOTS), dtype=torch.float32, device=device))
            self._blocks.append(block)
        begin = block.used
        block.used += n
        counts = [block.values.select(0, i) for i in range(begin, block.used)]
        for i, count in enumerate(counts, begin):
            self._places[id(count)] = block, i
            block.counts.append(count)
        return counts


@dataclass
class _Peers:
    """Parameters that have taken equally many steps.

    Attributes:
        steps: how many, as far as the host knows.
        history: equal where the steps that the device may have skipped were the same.
        size: how many parameters. None joins after they were brought together, and those that step
            without the others leave: as long as the size is the same, so are they.
    """

    steps: float
    history: int
    size: int


class _Block:
    """Counts side by side in one tensor.

    Attributes:
        values: all of them, [n], 0 where they are not used yet.
        mirror: on the CPU, what they should be.
        version: of the values, when they were that.
        counts: those in use, 0-dim views, which live as long as the block.
        used: how many these are.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.counts: list[Tensor] = []
        self.used = 0
        self.mirror = values.clone() if values.device.type == "cpu" else None
        self.accept()

    @property
    def free(self) -> int:
        """How many are not used yet."""
        return len(self.values) - self.used

    def accept(self) -> None:
        """Take the values as they are."""
        if self.mirror is not None:
            self.mirror.copy_(self.values)
        self.version = self.values._version

    def edited(self) -> bool:
        """Whether they were changed since, other than by a `_Run`."""
        if self.mirror is not None:
            return not torch.equal(self.values, self.mirror)
        return self.values._version != self.version


class _Run:
    """Some counts of a block that step together."""

    def __init__(self, block: _Block, place: Place) -> None:
        self._block = block
        self._place = place
        tensors = [t for t in (block.values, block.mirror) if t is not None]
        self._parts = [(t, t[place] if isinstance(place, slice) else None) for t in tensors]

    def advance(self, skipped: Tensor | None) -> None:
        """Count one step, unless it was skipped."""
        for whole, part in self._parts:
            by = 1.0 if skipped is None else (~skipped).to(whole.device, torch.float32)
            if part is not None:
                part.add_(by)
            else:
                whole[self._place] += by
        self._block.version = self._block.values._version


@dataclass
class Counted:
    """Counts of parameters that step together.

    Attributes:
        counts: a 0-dim tensor for each.
        runs: where they lie.
        peers: those parameters, once they have stepped together.
    """

    counts: list[Tensor]
    runs: list[_Run]
    peers: _Peers | None = None
