"""Step counts of the parameters, for optimizers whose update depends on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        self._groups: dict[int, CountGroup] = {}  # by id of a count
        self._last_history = 0
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
        earlier, self._places, self._groups = self._places, {}, {}
        missing: dict[torch.device, list[int]] = {}
        for i, (count, device) in enumerate(zip(counts, devices, strict=True)):
            place = earlier.get(id(count))
            if place and place[0].values.device == device and id(count) not in self._places:
                self._places[id(count)] = place
            else:
                missing.setdefault(device, []).append(i)
        self._blocks = list(dict.fromkeys(block for block, _ in self._places.values()))
        tensors: list[Tensor] = [*counts]  # type: ignore[list-item]  # numbers are replaced below
        for device, indices in missing.items():
            for i, count in zip(indices, self._take(len(indices), device), strict=True):
                tensors[i] = count.copy_(torch.as_tensor(counts[i]).reshape(()))
        for block in self._blocks:
            block.accept()
        numbers = {block: block.values.tolist() for block in self._blocks}
        by_steps: dict[tuple[torch.device, float], list[Tensor]] = {}
        for count in tensors:
            block, i = self._places[id(count)]
            by_steps.setdefault((count.device, numbers[block][i]), []).append(count)
        for (_, steps), some in by_steps.items():
            self._form_group(some, steps, 0)
        return tensors

    def start(self, n: int, device: torch.device) -> list[Tensor]:
        """Create the counts of `n` parameters that have taken no step."""
        return self._form_group(self._take(n, device), 0.0, 0).counts

    def has_edits(self) -> bool:
        """Whether other code has changed a count."""
        return any(block.has_edits() for block in self._blocks)

    def key(self, count: Tensor) -> Hashable:
        """A key that is equal for parameters that have taken the same number of steps."""
        group = self._groups[id(count)]
        return group.steps, group.history

    def are_together(self, counts: Sequence[Tensor]) -> bool:
        """Whether all of the counts are of one group."""
        return len({id(self._groups[id(count)]) for count in counts}) <= 1

    def group(self, counts: list[Tensor]) -> tuple[CountGroup, bool]:
        """The group of counts with equal keys, and whether it had to be formed from others."""
        group = self._groups[id(counts[0])]
        is_whole = len(counts) == len(group.counts) == group.size
        if is_whole and all(self._groups[id(count)] is group for count in counts):
            return group, False
        return self._form_group(counts, group.steps, group.history), True

    def advance(self, group: CountGroup, found_inf: Tensor | None) -> None:
        """Count a step of a group, unless it was skipped."""
        ran = None if found_inf is None else found_inf.reshape(()) == 0
        for block, part, ones in group.parts:
            part.add_(ones if ran is None else ones * ran.to(ones.device))
            block.version = block.values._version
        if ran is None or ran.device.type == "cpu":
            group.steps += 1 if ran is None else int(ran)
        else:
            if group.history not in self._after:
                self._last_history += 1
                self._after[group.history] = self._last_history
            group.history = self._after[group.history]

    def new_step(self) -> None:
        """Begin a step, in which all skipped parameters get the same new history."""
        self._after.clear()

    def _form_group(self, counts: list[Tensor], steps: float, history: int) -> CountGroup:
        """Take counts out of their groups into a new one."""
        places: dict[_Block, list[int]] = {}
        for count in counts:
            block, i = self._places[id(count)]
            places.setdefault(block, []).append(i)
        parts = [block.part(indices) for block, indices in places.items()]
        group = CountGroup(counts, parts, steps, history, len(counts))
        for count in counts:
            if id(count) in self._groups:
                self._groups[id(count)].size -= 1
            self._groups[id(count)] = group
        return group

    def _take(self, n: int, device: torch.device) -> list[Tensor]:
        """Take `n` adjacent counts of 0 from a block."""
        for block in self._blocks:
            if block.values.device == device and len(block.values) - len(block.counts) >= n:
                break
        else:
            block = _Block(max(n, _SLOTS), device)
            self._blocks.append(block)
        begin = len(block.counts)
        for i in range(begin, begin + n):
            block.counts.append(block.values.select(0, i))
            self._places[id(block.counts[i])] = block, i
        return block.counts[begin:]


class _Block:
    """Adjacent counts in one tensor.

    Attributes:
        values: all counts, [n], 0 where unused.
        mirror: a copy that no other code can edit.
        version: version of `values` after the last write of this module.
        counts: the counts in use, 0-dim views that live as long as the block.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # steps outside of inference mode write to it too
            self._rows = torch.zeros(2, n, dtype=torch.float32, device=device)
            self.values, self.mirror = self._rows
        self.counts: list[Tensor] = []
        self.version: int = self.values._version

    def accept(self) -> None:
        """Accept the present values as unedited."""
        self.mirror.copy_(self.values)
        self.version = self.values._version

    def has_edits(self) -> bool:
        """Whether other code has changed the values."""
        if self.values.device.type == "cpu":
            return not torch.equal(self.values, self.mirror)
        return bool(self.values._version != self.version)

    def part(self, indices: list[int]) -> tuple[_Block, Tensor, Tensor]:
        """The block, a range of both rows around the indices, and 1 at these and 0 elsewhere."""
        begin, end = min(indices), max(indices) + 1
        ones = torch.zeros(end - begin)
        ones[[i - begin for i in indices]] = 1.0
        return self, self._rows[:, begin:end], ones.to(self.values.device)


@dataclass
class CountGroup:
    """Parameters that have taken the same number of steps, and step together.

    Attributes:
        counts: a 0-dim tensor for each parameter.
        parts: what `_Block.part` returns for them, by block.
        steps: number of steps that the host knows of.
        history: equal for parameters whose steps that the device may have skipped are the same.
        size: number of counts that no other group has taken since.
    """

    counts: list[Tensor]
    parts: list[tuple[_Block, Tensor, Tensor]]
    steps: float
    history: int
    size: int
