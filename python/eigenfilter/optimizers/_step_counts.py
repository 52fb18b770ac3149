"""How many steps each parameter has taken, for optimizers whose update depends on it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Indices = Tensor | None
"""Which elements of a block; None for all."""


class StepCounts:
    """A 0-dim float32 tensor for each parameter, as torch keeps it, counted up a block at a time.

    The tensors are the elements of a few blocks, so that a step costs one addition, on the device,
    and an edit of one changes no other. Which parameters have taken equally many steps is kept on
    the host: to compare the tensors would wait for the device. An edit is noticed, on the CPU by
    its values and on a GPU by the block's version, and the counts are then read again.
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
        """Start again from these counts; return the tensors that stand for them from now on."""
        self._blocks, self._places, self._peers = [], {}, {}
        on_device: dict[torch.device, list[int]] = {}
        for i, device in enumerate(devices):
            on_device.setdefault(device, []).append(i)
        made: list[Tensor] = [torch.empty(0)] * len(counts)
        for device, indices in on_device.items():
            values = torch.stack(
                [
                    torch.as_tensor(counts[i], dtype=torch.float32, device=device).reshape(())
                    for i in indices
                ]
            )
            for i, count in zip(indices, self._add(values, values.tolist()), strict=True):
                made[i] = count
        return made

    def start(self, n: int, device: torch.device) -> list[Tensor]:
        """The counts of `n` parameters that have taken no step."""
        return self._add(torch.zeros(n, dtype=torch.float32, device=device), [0.0] * n)

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
        places: list[tuple[_Block, Indices]] = []
        for block, indices in at.values():
            whole = indices == list(range(len(block.counts)))
            device = block.values.device
            places.append((block, None if whole else torch.tensor(indices, device=device)))
        return Counted(counts, places)

    def advance(self, counted: Counted, found_inf: Tensor | None) -> bool:
        """Count a step of parameters that have taken equally many, unless it was skipped.

        Returns:
            Whether they part from others that had taken equally many, or join some.
        """
        skipped = None if found_inf is None else found_inf.reshape(()) != 0
        for block, indices in counted.places:
            block.advance(indices, skipped)
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
            peers = counted.peers = _Peers(steps, history, len(counted.counts))
            for count in counted.counts:
                self._peers[id(count)].size -= 1
                self._peers[id(count)] = peers
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

    def _add(self, values: Tensor, numbers: list[float]) -> list[Tensor]:
        block = _Block(values)
        self._blocks.append(block)
        by_steps: dict[float, _Peers] = {}
        for i, (count, steps) in enumerate(zip(block.counts, numbers, strict=True)):
            self._places[id(count)] = block, i
            peers = by_steps.setdefault(steps, _Peers(steps, 0, 0))
            peers.size += 1
            self._peers[id(count)] = peers
        return block.counts


@dataclass
class _Peers:
    """Parameters that have taken equally many steps.

    Attributes:
        steps: how many, as far as the host knows.
        history: equal where the steps that the device may have skipped were the same.
        size: how many parameters; none ever joins, those that step without the others leave.
    """

    steps: float
    history: int
    size: int


@dataclass
class _Block:
    """Counts side by side in one tensor.

    Attributes:
        values: all of them, [n].
        counts: its elements, 0-dim views of it.
    """

    values: Tensor
    counts: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [self.values.select(0, i) for i in range(len(self.values))]
        self._mirror = self.values.clone() if self.values.device.type == "cpu" else None
        self._version = self.values._version

    def edited(self) -> bool:
        if self._mirror is not None:
            return not torch.equal(self.values, self._mirror)
        return self.values._version != self._version

    def advance(self, indices: Indices, skipped: Tensor | None) -> None:
        for values in (self.values, self._mirror):
            if values is None:
                continue
            by = 1.0 if skipped is None else (~skipped).to(values.device, torch.float32)
            if indices is None:
                values.add_(by)
            else:
                values[indices] += by
        self._version = self.values._version


@dataclass
class Counted:
    """Counts of parameters that step together.

    Attributes:
        counts: a 0-dim tensor for each.
        places: where they lie.
        peers: those parameters, once they have stepped together.
    """

    counts: list[Tensor]
    places: list[tuple[_Block, Indices]]
    peers: _Peers | None = None
