"""Which variables of a loss function are taken for changed, and which are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eigenfilter.integrations._loss_functions import Variables

seen = 0
of_the_loop: Any = None
Functions = Iterator[Callable[[], object]]


class Meter:
    val = 0.0

    def update(self, value: float) -> None:
        self.val = value


class Trainer:
    def __init__(self) -> None:
        self.x = torch.zeros(2)
        self.count, self.last, self.losses = 0, torch.zeros(2), []

    def counts(self) -> Tensor:
        self.count += 1
        self.last = self.x + self.count
        return self.last

    def appends(self) -> int:
        self.count += 1
        if self.count % 2 == 0:
            self.losses.append(1.0)
        return len(self.losses)

    def compute(self) -> Tensor:
        return self.x + 1

    def __call__(self) -> Tensor:
        return self.x + 1


def writes_a_nonlocal() -> Functions:
    out = None

    def function() -> object:
        nonlocal out
        out = torch.ones(2)
        return out

    yield from [function] * 3


def writes_a_global() -> Functions:
    def function() -> object:
        global seen
        seen += 1
        return seen

    yield from [function] * 3


def writes_attributes() -> Functions:
    yield from [Trainer().counts] * 3


def appends_to_an_attribute() -> Functions:
    yield from [Trainer().appends] * 3


def appends_now_and_then() -> Functions:
    losses: list[float] = []
    calls = 0

    def function() -> object:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            losses.append(1.0)
        return losses

    yield from [function] * 3


def updates_a_meter() -> Functions:
    meter = Meter()
    numbers = iter(range(10))

    def function() -> object:
        meter.update(next(numbers) + 1.0)
        return meter.val > 100

    yield from [function] * 3


def writes_to_a_dict() -> Functions:
    logs: dict[str, float] = {"loss": 0.0}
    numbers = iter(range(10))

    def function() -> object:
        logs["loss"] = next(numbers) + 1.0
        return logs["loss"]

    yield from [function] * 3


def reads_equal_lists() -> Functions:
    x = torch.ones(2)
    for _ in range(2):
        batch = [x, 1]
        yield lambda: batch[0]  # noqa: B023


KEPT = [
    writes_a_nonlocal,
    writes_a_global,
    writes_attributes,
    appends_to_an_attribute,
    appends_now_and_then,
    updates_a_meter,
    writes_to_a_dict,
    reads_equal_lists,
]


def replaces_an_attribute_of_a_callable() -> Functions:
    trainer = Trainer()
    for i in range(2):
        trainer.x = torch.full((2,), float(i))
        yield trainer


def calls_a_callable() -> Functions:
    trainer = Trainer()
    for i in range(2):
        trainer.x = torch.full((2,), float(i))
        yield lambda: trainer()


def calls_a_method() -> Functions:
    trainer = Trainer()
    for i in range(2):
        trainer.x = torch.full((2,), float(i))
        yield lambda: trainer.compute()


def refills_a_dict() -> Functions:
    batch = {}
    for i in range(2):
        batch["x"] = torch.full((2,), float(i))
        yield lambda: batch["x"]


def refills_deeper() -> Functions:
    batch: dict[str, list[Tensor]] = {"x": [torch.zeros(2)]}
    for i in range(2):
        batch["x"][0] = torch.full((2,), float(i))
        yield lambda b=batch: b["x"][0]


def replaces_an_entry_of_its_default() -> Functions:
    def function(batch: dict[str, Tensor]) -> Tensor:
        batch["x"] = batch["x"] + 1
        return batch["x"]

    for i in range(2):
        batch = {"x": torch.full((2,), float(i))}
        yield lambda b=batch: function(b)


def reads_the_last_of_a_list() -> Functions:
    batches: list[Tensor] = []
    for i in range(2):
        batches.append(torch.full((2,), float(i)))
        yield lambda: batches[-1]


def reads_a_global() -> Functions:
    global of_the_loop
    for i in range(2):
        of_the_loop = torch.full((2,), float(i))
        yield lambda: of_the_loop  # noqa: B023


def is_wrapped() -> Functions:
    for i in range(2):
        x = torch.full((2,), float(i))
        yield torch.no_grad()(lambda: x + 1)  # noqa: B023


def stores_it_as_an_attribute_too() -> Functions:
    trainer = Trainer()
    for i in range(2):
        x = torch.full((2,), float(i))

        def function() -> Tensor:
            trainer.x = x  # noqa: B023
            return x  # noqa: B023

        yield function


def reads_a_buffer() -> Functions:
    batch = torch.zeros(2)
    for i in range(2):
        batch.fill_(i)
        yield lambda: batch + 1


def writes_its_default() -> Functions:
    for i in range(2):
        x = torch.full((2,), float(i))
        yield lambda x=x: x.mul_(2)


WRITTEN = [reads_a_buffer, writes_its_default]

CHANGED = [
    replaces_an_attribute_of_a_callable,
    calls_a_callable,
    calls_a_method,
    refills_a_dict,
    refills_deeper,
    replaces_an_entry_of_its_default,
    reads_the_last_of_a_list,
    reads_a_global,
    is_wrapped,
    stores_it_as_an_attribute_too,
]


def first_is_refused(functions: Functions) -> None:
    """Call all, and then check the variables of the first."""
    recorded = []
    for function in functions:
        variables = Variables(function)
        function()
        variables.forget_written()
        recorded.append(variables)
    recorded[0].refuse_changes()


@pytest.mark.parametrize("functions", KEPT)
def test_what_a_function_writes_is_not_refused(functions: Callable[[], Functions]) -> None:
    first_is_refused(functions())


@pytest.mark.parametrize("functions", CHANGED)
def test_what_the_loop_changes_is_refused(functions: Callable[[], Functions]) -> None:
    with pytest.raises(RuntimeError, match="which was assigned again before the step was over"):
        first_is_refused(functions())


@pytest.mark.parametrize("functions", WRITTEN)
def test_what_is_written_in_place_is_refused(functions: Callable[[], Functions]) -> None:
    with pytest.raises(RuntimeError, match=r"reads '(batch|x)', a tensor that was written"):
        first_is_refused(functions())


def test_parameters_may_be_written() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    variables = Variables(lambda: weight.sum())
    with torch.no_grad():
        weight.add_(1)
    variables.refuse_changes()
