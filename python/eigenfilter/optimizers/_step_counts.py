"""Step counts of the parameters, for optimizers whose update depends on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Place = slice | Tensor
"""Elements of a block; a slice if they are adjacent."""

_SLOTS = 64
"""Least size of a block, so that parameters that start one by one share one."""


class StepCounts:
    """A 0-dim float32 tensor for each parameter, as in torch; one addition updates a block of them.

    The tensors are elements of a few blocks on the device, and an edit of one changes no other. The
    host knows which parameters have taken the same number of steps, because comparing the tensors
    would wait for the device. After an edit the counts are read again. On the CPU it shows in the
    values, on a GPU in the version of the block, which an edit through `.data` does not change.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._places: dict[int, tuple[_Block, int]] = {}  # by id of a count
        self._peers: dict[int, _Peers] = {}
        self._history = 0
        self._after: dict[int, int] = {}  # this step's new history for each old one

    def __reduce__(self) -> tuple[type[StepCounts], tuple[()]]:
        return StepCounts, ()  # a copy reads the counts in its own state

    def read(
        self, counts: Sequence[Tensor | float], devices: Sequence[torch.device]
    ) -> list[Tensor]:
        """Replace all counts by these.

        Returns:
            The tensors that hold them from now on; elements of a block stay the same tensors.
        """
        tensors: list[Tensor | None] = [None] * len(counts)
        places: dict[int, tuple[_Block, int]] = {}
        for i, (c, device) in enumerate(zip(counts, devices, strict=True)):
            known = isinstance(c, Tensor) and id(c) in self._places and c.device == device
            if isinstance(c, Tensor) and known and id(c) not in places:
                tensors[i], places[id(c)] = c, self._places[id(c)]
        self._blocks = list({id(block): block for block, _ in places.values()}.values())
        self._places, self._peers = places, {}
        for device in dict.fromkeys(devices):
            new = [i for i, d in enumerate(devices) if d == device and tensors[i] is None]
            for i, count in zip(new, self._take(len(new), device), strict=True):
                tensors[i] = count.copy_(torch.as_tensor(counts[i]).reshape(()))
        result = [count for count in tensors if count is not None]
        for block in self._blocks:
            block.accept()
        by_steps: dict[tuple[torch.device, float], _Peers] = {}
        numbers = {id(block): block.values.tolist() for block in self._blocks}
        for count in result:
            block, i = self._places[id(count)]
            steps = numbers[id(block)][i]
            peers = by_steps.setdefault((count.device, steps), _Peers(steps, 0, 0))
            self._join(count, peers)
        return result

    def start(self, n: int, device: torch.device) -> list[Tensor]:
        """Create the counts of `n` parameters that have taken no step."""
        counts = self._take(n, device)
        peers = _Peers(0.0, 0, 0)
        for count in counts:
            self._join(count, peers)
        return counts

    def has_edits(self) -> bool:
        """Whether other code has changed a count."""
        return any(block.has_edits() for block in self._blocks)

    def key(self, count: Tensor) -> Hashable:
        """A key that is equal for parameters that have taken the same number of steps."""
        peers = self._peers[id(count)]
        return peers.steps, peers.history

    def count_group(self, counts: list[Tensor]) -> CountGroup:
        """Group the counts of parameters that step together, until they are read again."""
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
        return CountGroup(counts, runs)

    def advance(self, count_group: CountGroup, found_inf: Tensor | None) -> bool:
        """Count a step of parameters with equal counts, unless it was skipped.

        Returns:
            Whether the group of parameters with this count has changed.
        """
        skipped = None if found_inf is None else found_inf.reshape(()) != 0
        for run in count_group.runs:
            run.advance(skipped)
        old = self._peers[id(count_group.counts[0])]
        steps, history = old.steps, old.history
        if skipped is None:
            steps += 1
        elif skipped.device.type == "cpu":
            steps += 0 if bool(skipped) else 1
        else:
            history = self._next_history(history)
        peers = count_group.peers
        regrouped = peers is None or peers.size != len(count_group.counts)
        if peers is None or regrouped:
            peers = count_group.peers = _Peers(steps, history, 0)
            for count in count_group.counts:
                self._peers[id(count)].size -= 1
                self._join(count, peers)
        peers.steps, peers.history = steps, history
        return regrouped

    def new_step(self) -> None:
        """Begin a step, in which all skipped parameters get the same new history."""
        self._after.clear()

    def _next_history(self, history: int) -> int:
        """The history that follows this one after a step that the device may have skipped."""
        if history not in self._after:
            self._history += 1
            self._after[history] = self._history
        return self._after[history]

    def _join(self, count: Tensor, peers: _Peers) -> None:
        peers.size += 1
        self._peers[id(count)] = peers

    def _take(self, n: int, device: torch.device) -> list[Tensor]:
        """Take `n` adjacent counts of 0 from a block."""
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
    """Parameters that have taken the same number of steps.

    Attributes:
        steps: number of steps that the host knows of.
        history: equal for parameters whose steps that the device may have skipped are the same.
        size: number of parameters. None joins after the group was formed, and those that step
            without the others leave; so an equal size means an unchanged group.
    """

    steps: float
    history: int
    size: int


class _Block:
    """Adjacent counts in one tensor.

    Attributes:
        values: all counts, [n], 0 where unused.
        mirror: on the CPU, a copy that no other code can edit; else None.
        version: version of `values` after the last write of this class.
        counts: the counts in use, 0-dim views that live as long as the block.
        used: number of counts in use.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.counts: list[Tensor] = []
        self.used = 0
        self.mirror = values.clone() if values.device.type == "cpu" else None
        self.accept()

    @property
    def free(self) -> int:
        """The number of unused counts."""
        return len(self.values) - self.used

    def accept(self) -> None:
        """Accept the present values as unedited."""
        if self.mirror is not None:
            self.mirror.copy_(self.values)
        self.version = self.values._version

    def has_edits(self) -> bool:
        """Whether anything except a `_Run` has changed the values."""
        if self.mirror is not None:
            return not torch.equal(self.values, self.mirror)
        return self.values._version != self.version


class _Run:
    """Counts of one block that step together."""

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
class CountGroup:
    """Counts of parameters that step together.

    Attributes:
        counts: a 0-dim tensor for each parameter.
        runs: the elements of blocks that they are.
        peers: the group of these parameters after their first common step.
    """

    counts: list[Tensor]
    runs: list[_Run]
    peers: _Peers | None = None
