"""Hostile arguments for every function of `_core`; `test_core.py` runs this in its own process.

Each argument of a sound call is replaced by everything hostile, and pairs of them at random. A call
may be accepted, or raise one clear error. A signal ends this process: the last line that it has
written names the call.
"""

from __future__ import annotations

import faulthandler
import itertools
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eigenfilter import _core
from refusals import SCALARS, TENSORS, Stranger, made_for_inference

CLEAR = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)
PAIRS = 150  # random pairs of bad arguments for each function


def tensor() -> Tensor:
    return torch.rand(4, 6) + 1


def tensors() -> list[Tensor]:
    return [tensor(), tensor()]


def doubles(*shape: int) -> Tensor:
    return torch.rand(*shape).double()


class Changing(Tensor):
    """A tensor that changes the lists it is in while it is read."""

    lists: tuple[list[Any], ...] = ()

    def is_neg(self) -> bool:  # type: ignore[override]
        for each in self.lists:
            each.clear()
        return False


def changing() -> list[Tensor]:
    result: list[Tensor] = [t.as_subclass(Changing) for t in (*tensors(), *tensors())]
    for t in result:
        t.lists = (result,)  # type: ignore[attr-defined]
    return result


class Passing:
    """What has a shard that nothing keeps alive."""

    @property
    def _local_tensor(self) -> Tensor:
        return tensor()


class Param:
    """A parameter whose gradient changes the list it is in."""

    def __init__(self, home: list[Any], change: Callable[[list[Any]], object]) -> None:
        self.home, self.change = home, change

    @property
    def grad(self) -> Tensor:
        self.change(self.home)
        return tensor()

    @grad.setter
    def grad(self, value: object) -> None:
        self.change(self.home)


def params_that(change: Callable[[list[Any]], object]) -> list[Any]:
    result: list[Any] = []
    result += [Param(result, change) for _ in range(5)]
    return result


class Key:
    """A key that changes a dict and a list while it is compared."""

    def __init__(self, *victims: Any) -> None:
        self.victims = victims

    def __hash__(self) -> int:
        return hash("momentum")

    def __eq__(self, other: object) -> bool:
        for victim in self.victims:
            victim.clear()
        return False


def changing_entries() -> tuple[Any, ...]:
    state: dict[Any, Any] = {}
    entries: list[Any] = []
    values = [None] * 3
    for i in range(3):
        state[i] = {Key(state, entries, values): i}
    entries += state.values()
    return state, entries, ("momentum",), values


class Uninitialized(_core.TensorList):  # type: ignore[misc]
    def __init__(self) -> None:
        pass


def uninitialized() -> object:
    return _core.TensorList.__new__(_core.TensorList)  # type: ignore[call-arg]


HOSTILE: list[Callable[[], object]] = [
    *(lambda value=value: value for value in SCALARS.values()),  # type: ignore[misc]
    *(lambda make=make: make(tensor()) for make in TENSORS.values()),  # type: ignore[misc]
    *(lambda make=make: [tensor(), make(tensor())] for make in TENSORS.values()),  # type: ignore[misc]
    *(lambda n=n: n for n in (-1, 0, 1, 3, 7, 2**31, 2**40, 2**62, 2**63, -(2**70))),  # type: ignore[misc]
    *(lambda v=v: v for v in (True, 1.5, "", "x\0y", "\ud800", b"x", (), [], {}, {1: 2})),  # type: ignore[misc]
    lambda: [None],
    lambda: [[]],
    lambda: object(),
    lambda: tensor,
    lambda: int,
    Stranger,
    Passing,
    lambda: [Passing(), Passing()],
    uninitialized,
    lambda: _core.TensorList([]),
    lambda: _core.TensorList(tensors(), hold=True, trust=True),
    lambda: made_for_inference(tensor()),
    changing,
    lambda: tuple(changing()),
    lambda: _core.TensorList(changing()),
    lambda: params_that(list.clear),
    lambda: params_that(lambda home: home.extend(home)),
    lambda: iter(tensors()),
    lambda: torch.ones(()).expand(2**40, 2**20),
    lambda: torch.zeros(0),
    lambda: [torch.zeros(0), torch.zeros(0)],
    lambda: torch.zeros(0).double(),
    lambda: tensor().half(),
    lambda: tensor().double(),
    lambda: [tensor().requires_grad_(), tensor()],
]

LR, FLAGS = [0.1, 0.9, 0.0, 0.0], [None, None]


# A sound call of every function.
CALLS: dict[str, Callable[[], list[Any]]] = {
    "isa": list,
    "isas": list,
    "is_serial": list,
    "set_isa": lambda: [_core.isa()],
    "require_cuda": list,
    "check": lambda: [["a", "b"], [tensors(), tensors()], [True, False]],
    "perturb": lambda: [tensors(), tensors(), tensors(), 0.1, True, False, *FLAGS, 2],
    "perturb_hvp": lambda: [tensors(), tensors(), tensors(), tensors(), 0.1, 0.2, *FLAGS, 2],
    "sgd_step": lambda: [*(tensors() for _ in range(4)), *LR, False, False, 7, *FLAGS, 2],
    "adamw_step": lambda: [
        *(tensors() for _ in range(5)),
        *(0.1, 0.9, 0.99, 1e-8, 0.0, 0.2, 1, False, None, *FLAGS, 2),
    ],
    "norm": lambda: [tensors(), torch.zeros(()), tensors(), None, 2],
    "flag_nonfinite": lambda: [tensors(), torch.zeros(1), 2],
    "orthogonalize": lambda: [tensor(), tensor(), doubles(4, 4), doubles(4), 2, 2],
    "row_dots": lambda: [tensor(), tensor(), doubles(2, 4), 2],
    "lanczos_step": lambda: [tensor(), tensor(), tensor(), doubles(3, 4), doubles(2, 4), 2],
    "gram": lambda: [tensor(), doubles(4, 4), 2],
    "mix_rows": lambda: [tensor(), doubles(4, 4), 2],
    "cross_entropy_hvp": lambda: [tensor(), tensor(), doubles(4), doubles(4), tensor(), 2],
    "gradients": lambda: [tensors()],
    "clear_gradients": lambda: [tensors()],
    "same_objects": lambda: [tensors(), tensors()],
    "same_entries": lambda: [{0: {"m": 1}}, [], ("m",), [1]],
    "TensorList": lambda: [tensors()],
    "TensorList.__len__": lambda: [_core.TensorList(tensors())],
    "TensorList.__iter__": lambda: [_core.TensorList(tensors())],
    "TensorList.__getitem__": lambda: [_core.TensorList(tensors()), 0],
    "TensorList.filled.__get__": lambda: [_core.TensorList(tensors()), _core.TensorList],
    "TensorList.filled.__set__": lambda: [_core.TensorList(tensors()), True],
}


def functions() -> dict[str, Callable[..., object]]:
    """Every function that `_core` has, by name."""
    tensor_list = _core.TensorList
    result: dict[str, Any] = {
        name: value for name, value in vars(_core).items() if callable(value) and name[0] != "_"
    }
    for name in ("__len__", "__iter__", "__getitem__"):
        result[f"TensorList.{name}"] = vars(tensor_list)[name]
    for name in ("__get__", "__set__"):
        result[f"TensorList.filled.{name}"] = getattr(vars(tensor_list)["filled"], name)
    del result["LayoutError"]
    return result


def assert_clear_error(
    name: str, function: Callable[..., object], arguments: list[Any], what: str
) -> None:
    print(f"{name} with {what}", flush=True)
    message = ""
    try:
        function(*arguments)
    except CLEAR as error:
        message = str(error)
    assert "\n" not in message, message
    assert "Invoked with" not in message, message


def assert_survives_bad_arguments(
    name: str, function: Callable[..., object], rng: random.Random
) -> None:
    make = CALLS[name]
    count = len(make())
    assert_clear_error(name, function, make(), "sound arguments")
    for bad in range(len(HOSTILE)):
        assert_clear_error(name, function, [*make(), HOSTILE[bad]()], f"one more, {bad}")
    if not name.startswith("TensorList."):
        assert_clear_error(name, lambda *a: function(*a, wrong=a), make(), "a wrong name")
    for missing in range(count):
        assert_clear_error(name, function, make()[:missing], f"{missing} arguments")
    for position, bad in itertools.product(range(count), range(len(HOSTILE))):
        arguments = make()
        arguments[position] = HOSTILE[bad]()
        assert_clear_error(name, function, arguments, f"{bad} at {position}")
    for _ in range(PAIRS if count > 1 else 0):
        arguments, choices = make(), {}
        for position in rng.sample(range(count), 2):
            choices[position] = rng.randrange(len(HOSTILE))
            arguments[position] = HOSTILE[choices[position]]()
        assert_clear_error(name, function, arguments, str(choices))


def main() -> None:
    faulthandler.enable()
    result = functions()
    assert result.keys() == CALLS.keys(), result.keys() ^ CALLS.keys()
    rng = random.Random(11)
    for name, function in result.items():
        assert_survives_bad_arguments(name, function, rng)
    same = _core.same_entries(*changing_entries())
    assert not same
    print("all ended", len(sys.argv))


if __name__ == "__main__":
    main()
