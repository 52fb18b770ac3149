"""Every public kernel, every argument, every way to make it bad: a table made from a few lists.

`assert_refused` fails unless a call raises one clear error and leaves every bit of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import UPDATES
from eigenfilter import kernels
from eigenfilter.kernels._op import OPERATIONS

SHAPE = (4, 6)
COUNT = 2  # tensors in a list


class Wrapper(Tensor):
    """A tensor without memory, as quantization and distribution libraries make them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(func)


class Stranger:
    """An object of another library that has the attributes by which a tensor is recognized."""

    __dlpack_c_exchange_api__ = Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    is_neg = Tensor.is_neg
    is_inference = Tensor.is_inference
    grad = torch._C.TensorBase.grad  # type: ignore[attr-defined]


def freed(like: Tensor) -> Tensor:
    t = like.clone()
    t.untyped_storage().resize_(0)
    return t


def fake(like: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.ones(like.shape, dtype=like.dtype)


def made_for_inference(like: Tensor) -> Tensor:
    with torch.inference_mode():
        return like.clone()


def misaligned(like: Tensor) -> Tensor:
    memory = torch.zeros(like.nbytes + 1, dtype=torch.uint8)
    shifted = torch.frombuffer(memory.numpy(), dtype=like.dtype, offset=1, count=like.numel())
    return shifted.view(like.shape)


# Of a tensor, wherever it is read.
TENSORS: dict[str, Callable[[Tensor], object]] = {
    "none": lambda t: None,
    "number": lambda t: 0.5,
    "string": lambda t: "params",
    "array": lambda t: t.numpy(),
    "stranger": lambda t: Stranger(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "fake": fake,
    "freed": freed,
    "wrapper": lambda t: Wrapper(t),
    "negated": lambda t: torch._neg_view(t.clone()),
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "complex": lambda t: t.to(torch.complex64),
    "int": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "longer": lambda t: torch.ones(t.numel() + 1, dtype=t.dtype),
    "misaligned": misaligned,
}
# Of a tensor in a list, beside these; "half" where its dtype must be the others'.
OF_LISTS: dict[str, Callable[[Tensor], object]] = {
    "half": lambda t: t.bfloat16(),
    "strides": lambda t: t.clone().reshape(t.shape[::-1]).t(),
    "more dimensions": lambda t: t.clone()[None],
    "every second": lambda t: torch.ones(*t.shape[:-1], 2 * t.shape[-1])[..., ::2],
    "expanded": lambda t: torch.ones(()).expand(t.shape),
}
# Of a list.
LISTS: dict[str, Callable[[list[Tensor]], object]] = {
    "none": lambda tensors: None,
    "a tensor": lambda tensors: tensors[0],
    "a number": lambda tensors: 5,
    "a string": lambda tensors: "params",
    "an iterator": iter,
    "a dict": lambda tensors: dict(enumerate(tensors)),
    "a set": lambda tensors: set(tensors),
    "nothing": lambda tensors: [],
    "too few": lambda tensors: tensors[:-1],
    "too many": lambda tensors: [*tensors, tensors[0].clone()],
    "nested": lambda tensors: [tensors],
}
# Of a hyperparameter.
SCALARS: dict[str, object] = {
    "none": None,
    "string": "0.1",
    "list": [0.1],
    "complex": 0.1 + 0.1j,
    "numpy complex": np.complex64(0.1 + 0.1j),
    "two numbers": np.array([0.1, 0.2]),
    "nan": float("nan"),
    "infinite": float("inf"),
    "numpy nan": np.float32("nan"),
    "huge": 10**400,
    "int tensor": torch.tensor(1),
    "half tensor": torch.tensor(0.1, dtype=torch.bfloat16),
    "two elements": torch.tensor([0.1, 0.2]),
    "no element": torch.zeros(0),
    "meta tensor": torch.tensor(0.1, device="meta"),
    "freed tensor": freed(torch.tensor(0.1)),
    "negated tensor": torch._neg_view(torch.tensor(0.1)),
    "nan tensor": torch.tensor(float("nan")),
    "infinite tensor": torch.tensor(float("inf"), dtype=torch.float64),
}
# Computed from gradients: as a tensor they may be no number.
COMPUTED = {"perturb": {"alpha"}, "perturb_hvp": {"alpha", "eps"}}
# Outside of the range that a hyperparameter is documented with.
OUTSIDE: dict[str, tuple[float, ...]] = {
    "beta1": (-0.1, 1.0),
    "beta2": (-0.1, 1.5),
    "step": (0, 1.5, -1),
    "rounding_seed": (-1, 0.5, 2**24),
    "grad_scale": (0.0, -1.0),
}
SWITCHES: dict[str, object] = {
    "none": None,
    "string": "yes",
    "tensor": torch.ones(2),
    "number": 0.5,
}
WHOLE: dict[str, object] = {"none": None, "string": "2", "float": 1.5, "zero": 0, "below": -1}
WHOLE["huge"] = 10**30
BACKENDS: dict[str, object] = {"unknown": "nope", "number": 3, "list": []}


@dataclass(frozen=True)
class Kernel:
    """A kernel: how to make sound arguments for it, which of them it writes, which may be None.

    `in_place`: those that may be what is written.
    """

    name: str
    make: Callable[[], dict[str, Any]]
    written: frozenset[str]
    optional: frozenset[str] = frozenset()
    in_place: frozenset[str] = frozenset()

    def __call__(self, backend: object, **arguments: Any) -> None:
        getattr(kernels, self.name)(**arguments, backend=backend)


def _update(update: Any) -> Kernel:
    def make() -> dict[str, Any]:
        lists = {role: [torch.rand(SHAPE) + 1 for _ in range(COUNT)] for role in update.lists}
        flags = {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)}
        return {**lists, **update.options, **flags}

    annotations = OPERATIONS[update.kernel].annotations
    optional = {name for name, annotation in annotations.items() if annotation.endswith("None")}
    if "backups" in update.writes:
        optional.remove("backups")
    return Kernel(update.kernel, make, frozenset(update.writes), frozenset(optional))


def _vectors(*names: str, count: int = 3) -> dict[str, Any]:
    return {name: torch.rand(count, 40) + 1 for name in names}


KERNELS = {
    **{str(update): _update(update) for update in UPDATES},
    "norm": Kernel(
        "norm",
        lambda: {
            "tensors": [torch.rand(SHAPE) for _ in range(COUNT)],
            "weights": [torch.rand(SHAPE) for _ in range(COUNT)],
            "out": torch.zeros(()),
            "grad_scale": torch.tensor(2.0),
        },
        frozenset({"out"}),
        frozenset({"weights", "out", "grad_scale"}),
    ),
    "flag_nonfinite": Kernel(
        "flag_nonfinite",
        lambda: {"tensors": [torch.rand(SHAPE)] * COUNT, "found_inf": torch.zeros(1)},
        frozenset({"found_inf"}),
    ),
    "orthogonalize": Kernel(
        "orthogonalize", lambda: _vectors("w", "basis") | {"passes": 2}, frozenset({"w"})
    ),
    "row_dots": Kernel("row_dots", lambda: _vectors("q", "w"), frozenset()),
    "lanczos_step": Kernel(
        "lanczos_step",
        lambda: _vectors("u", "q", "w") | {"factors": torch.rand(3, 3).double()},
        frozenset({"u"}),
    ),
    "gram": Kernel("gram", lambda: _vectors("vectors"), frozenset()),
    "mix_rows": Kernel(
        "mix_rows",
        lambda: _vectors("vectors") | {"factors": torch.rand(3, 3).double()},
        frozenset({"vectors"}),
    ),
    "cross_entropy_hvp": Kernel(
        "cross_entropy_hvp",
        lambda: _vectors("logits", "u", "out") | {"scales": torch.rand(3).double()},
        frozenset({"out"}),
        frozenset({"out"}),
        frozenset({"u"}),
    ),
    "cholesky_qr": Kernel(
        "cholesky_qr",
        lambda: {"vectors": torch.rand(3, 40).double() * 100, "total": lambda t: t},
        frozenset({"vectors"}),
        frozenset({"total"}),
    ),
}


def _of_list(kernel: Kernel, name: str, tensors: list[Tensor]) -> Iterator[tuple[str, object]]:
    for what, spoil in LISTS.items():
        if what == "none" and name in kernel.optional:
            continue
        if what in ("too few", "too many") and name == "tensors" and kernel.name != "norm":
            continue
        yield what, spoil(tensors)
    spoilers = TENSORS | OF_LISTS
    if name in ("grads", "base_grads", "tensors"):
        del spoilers["half"]  # gradients may differ in dtype
    if name == "tensors" and kernel.name != "norm":  # each stands for itself
        for what in ("longer", "strides", "more dimensions"):
            del spoilers[what]
    if name in kernel.written:
        spoilers = spoilers | {"inference": made_for_inference}
    for what, make in spoilers.items():
        yield f"{what} in it", [tensors[0], make(tensors[1])]
    if name in kernel.written:
        yield "itself twice", [tensors[0], tensors[0]]


def _of_tensor(kernel: Kernel, name: str, t: Tensor) -> Iterator[tuple[str, object]]:
    spoilers = dict(TENSORS)
    if name in kernel.optional:
        del spoilers["none"]
    if name == "grad_scale":
        del spoilers["number"], spoilers["array"]  # which it may be
    if name in kernel.written:
        spoilers["inference"] = made_for_inference
    if t.ndim == 2:
        spoilers |= {
            "transposed": lambda t: t.t().contiguous().t(),
            "every second": lambda t: torch.ones(len(t), 2 * t.shape[1], dtype=t.dtype)[:, ::2],
        }
    for what, make in spoilers.items():
        yield what, make(t)


def _overlaps(kernel: Kernel, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Bad calls in which an argument shares memory with another one that is written."""
    for name, value in arguments.items():
        if name in kernel.in_place:
            continue
        for other in kernel.written - {name}:
            theirs = arguments[other]
            if isinstance(theirs, list):
                theirs = theirs[0]
            if isinstance(value, list) and theirs.numel() > 1:
                yield name, f"shares {other}", [theirs, *value[1:]]
            elif isinstance(value, Tensor) and value.numel() == 1 and theirs.dtype == value.dtype:
                yield name, f"shares {other}", theirs.view(-1)[:1].view(value.shape)
            elif isinstance(value, Tensor) and theirs.shape == value.shape:
                yield name, f"shares {other}", theirs
            elif isinstance(value, float) and theirs.dtype == torch.float32:
                yield name, f"shares {other}", theirs.view(-1)[0]


def bad_calls(kernel: Kernel) -> Iterator[tuple[str, str, dict[str, Any], object]]:
    """All bad calls: the argument's name, what is wrong, the sound arguments, the bad value."""
    for name, sound in kernel.make().items():
        arguments = kernel.make()
        if isinstance(sound, list):
            result = _of_list(kernel, name, arguments[name])
        elif isinstance(sound, Tensor):
            result = _of_tensor(kernel, name, arguments[name])
        elif isinstance(sound, bool):
            result = iter(SWITCHES.items())
        elif name == "passes":
            result = iter(WHOLE.items())
        elif name == "total":
            result = iter(
                {"number": 5, "nothing": lambda t: None, "int": lambda t: t.int()}.items()
            )
        else:
            computed = COMPUTED.get(kernel.name, set())
            result = (
                (what, bad)
                for what, bad in SCALARS.items()
                if not (what == "none" and name in kernel.optional)
                and not (what in ("nan tensor", "infinite tensor") and name in computed)
            )
        for what, bad in result:
            yield name, what, arguments, bad
        for value in OUTSIDE.get(name, ()):
            outside = torch.tensor(value) if isinstance(sound, Tensor) else value
            yield name, f"outside, {value}", arguments, outside
    arguments = kernel.make()
    for name, what, bad in _overlaps(kernel, arguments):
        yield name, what, arguments, bad
    for what, bad in BACKENDS.items():
        yield "backend", what, kernel.make(), bad


def snapshot(arguments: Mapping[str, Any]) -> list[tuple[Tensor, bytes, int]]:
    """Every sound tensor with its bits and version."""
    tensors = [
        t
        for value in arguments.values()
        for t in (value if isinstance(value, list) else [value])
        if isinstance(t, Tensor)
    ]
    return [(t, t.numpy().tobytes(), t._version) for t in tensors]


def assert_refused(
    kernel: Kernel, backend: str, name: str, arguments: dict[str, Any], bad: object
) -> str:
    """Fail unless a bad call raises a clear error and writes nothing; return its message."""
    before = snapshot(arguments)
    try:
        kernel(**{"backend": backend, **arguments, name: bad})
    except (TypeError, ValueError, RuntimeError) as error:
        message = str(error)
    else:
        raise AssertionError("the call was accepted")
    for t, bits, version in before:
        assert t.numpy().tobytes() == bits, "something was written"
        assert t._version == version, "a version was counted"
    assert 0 < len(message) < 500, message
    for unclear in ("Invoked with", "incompatible", "frame #", "object is not", "has no attribute"):
        assert unclear not in message, message
    return message
