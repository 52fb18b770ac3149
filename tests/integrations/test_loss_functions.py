"""Which variables of a loss function are taken for changed, and which are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eigenfilter.integrations._bytecode import names_of
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


def writes_a_tensor() -> Functions:
    total = torch.zeros(())

    def function() -> object:
        total.add_(1.0)
        return None

    yield from [function] * 3


def writes_entries() -> Functions:
    logs = {"loss": torch.zeros(()), "count": torch.zeros(2)}
    history, table = torch.zeros(5), np.zeros((2, 2))
    numbers = iter(range(10))

    def function() -> object:
        logs["loss"].mul_(0.9).add_(torch.ones(()), alpha=0.1)
        logs["count"][0] += 1
        history[next(numbers)] = 3.0
        table[0, 1] += 1
        return None

    yield from [function] * 3


def writes_a_tensor_deeper() -> Functions:
    state = SimpleNamespace(meters=SimpleNamespace(total=torch.zeros(())))

    def function() -> object:
        state.meters.total.add_(1.0)
        return None

    yield from [function] * 3


def fills_an_array_and_reads_it() -> Functions:
    scratch = np.zeros(2)
    numbers = iter(range(1, 10))

    def function() -> object:
        scratch.fill(next(numbers))
        return scratch + 1

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
    writes_a_tensor,
    writes_entries,
    writes_a_tensor_deeper,
    fills_an_array_and_reads_it,
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


def reads_two_levels() -> Functions:
    state = SimpleNamespace(inner=SimpleNamespace())
    for i in range(2):
        state.inner.x = torch.full((2,), float(i))
        yield lambda: state.inner.x


def reads_levels_by_local_names() -> Functions:
    state = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace()))
    state.a.up = state  # a cycle

    def function() -> Tensor:
        inner = state.a.b
        return inner.batch["x"]

    for i in range(2):
        state.a.b.batch = {"x": torch.full((2,), float(i))}
        yield function


def calls_a_method_deeper() -> Functions:
    owner = SimpleNamespace(trainer=Trainer())
    for i in range(2):
        owner.trainer.x = torch.full((2,), float(i))
        yield lambda: owner.trainer.compute()


def replaces_a_large_dict() -> Functions:
    for i in range(2):
        words = dict.fromkeys(range(2000), i)
        yield lambda: words[0]  # noqa: B023


def adds_to_a_large_list() -> Functions:
    numbers = list(range(2000))
    for i in range(2):
        numbers.append(i)
        yield lambda: numbers[-1]


def refills_a_dict_with_a_large_entry() -> Functions:
    state: dict[str, Any] = {"words": dict.fromkeys(range(2000))}
    for i in range(2):
        state["batch"] = [torch.full((2,), float(i))]
        yield lambda: state["batch"]


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


def reads_an_array() -> Functions:
    batch = np.zeros(2)
    for i in range(2):
        batch[:] = i
        yield lambda: batch + 1


def reads_an_array_of_a_dict() -> Functions:
    state = SimpleNamespace(data={"large": np.zeros(2**18), "x": np.zeros(2)})
    for i in range(2):
        state.data["x"].fill(i)
        yield lambda: state.data["x"] + 1


def writes_its_default_array() -> Functions:
    for i in range(2):
        x = np.full(2, i + 1.0)
        yield lambda x=x: np.multiply(x, 2, out=x)


def writes_and_uses_it() -> Functions:
    x = torch.ones(2)
    yield from [lambda: x.mul_(2) + 1] * 2


def writes_and_reads_it() -> Functions:
    x = torch.ones(2)

    def function() -> Tensor:
        x.mul_(2)
        return x + 1

    yield from [function] * 2


def writes_its_default_alone() -> Functions:
    def function(x: Tensor = torch.ones(2)) -> None:  # noqa: B008
        x.mul_(2)

    yield from [function] * 2


WRITTEN = [
    reads_a_buffer,
    reads_an_array,
    reads_an_array_of_a_dict,
    writes_its_default,
    writes_its_default_array,
    writes_and_uses_it,
    writes_and_reads_it,
    writes_its_default_alone,
]

CHANGED = [
    replaces_an_attribute_of_a_callable,
    calls_a_callable,
    calls_a_method,
    refills_a_dict,
    refills_deeper,
    replaces_an_entry_of_its_default,
    reads_the_last_of_a_list,
    reads_a_global,
    reads_two_levels,
    reads_levels_by_local_names,
    calls_a_method_deeper,
    replaces_a_large_dict,
    adds_to_a_large_list,
    refills_a_dict_with_a_large_entry,
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
    with pytest.raises(RuntimeError, match=r"an? (tensor|array) that was written in"):
        first_is_refused(functions())


def test_parameters_may_be_written() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    variables = Variables(lambda: weight.sum())
    with torch.no_grad():
        weight.add_(1)
    variables.refuse_changes()


ONLY_WRITTEN = [
    "it.add_(loss.detach())",
    "it.mul_(0.9).add_(loss, alpha=0.1)",
    "it[i] = loss",
    "it[i] += loss",
    "it[i, 2:] += loss",
    "it[i].add_(loss)",
    "state.it.add_(loss)",
    "state['a'].it[0] += loss",
]
ALSO_READ = [
    "return it.add_(loss)",
    "last = it.add_(loss)",
    "model(it.mul_(2), loss)",
    "it.add_(loss); print(it)",
    "it.copy_(it + loss)",
    "it(loss)",
    "it + loss",
    "it.item()",
    "out[0] = it[0]",
    "out[it] = loss",
]


@pytest.mark.parametrize("body", ONLY_WRITTEN + ALSO_READ)
def test_what_code_only_writes(body: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def function(loss, i): {body}", scope)
    assert ("it" in names_of(scope["function"].__code__).used) == (body in ALSO_READ)
