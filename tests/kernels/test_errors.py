"""Arguments that do not fit together are refused by name, before the first write."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import UPDATES, bits
from eigenfilter import _core, kernels

SHAPE = (4, 6)


class Wrapper(Tensor):
    """A tensor without memory, as quantization and distribution libraries make them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(func)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(SHAPE)


def fake_view() -> Tensor:
    with FakeTensorMode():
        return further_on()


def freed() -> Tensor:
    t = torch.ones(SHAPE)
    t.untyped_storage().resize_(0)
    return t


def further_on() -> Tensor:
    """A view that does not begin where its storage does."""
    whole = torch.ones(math.prod(SHAPE) + 100_000)
    return whole[100_000:].view(SHAPE)


def freed_view() -> Tensor:
    t = further_on()
    t.untyped_storage().resize_(0)
    return t


def misaligned() -> Tensor:
    return torch.frombuffer(bytearray(4 * 24 + 1), dtype=torch.float32, offset=1).view(SHAPE)


LayoutError = _core.LayoutError
Make = Callable[[], object]

# What each may not be: how to make it, the error, and how its message goes on.
ANYWHERE: dict[str, tuple[Make, type[Exception], str]] = {
    "meta": (
        lambda: torch.ones(SHAPE, device="meta"),
        TypeError,
        "cannot be used: .*; pass strided tensors with memory of their own",
    ),
    "sparse": (
        lambda: torch.ones(SHAPE).to_sparse(),
        TypeError,
        "cannot be used: .*; pass strided tensors with memory of their own",
    ),
    "fake": (fake, TypeError, "has no memory of its own .*: pass the tensor that holds the data"),
    "freed": (freed, TypeError, "has no memory of its own .*: pass the tensor that holds the data"),
    "freed view": (freed_view, TypeError, "has no memory of its own .*: pass the tensor that"),
    "fake view": (fake_view, TypeError, "has no memory of its own .*: pass the tensor that"),
    "wrapper": (
        lambda: Wrapper(torch.ones(SHAPE)),
        TypeError,
        "has no memory of its own .*: pass the tensor that holds the data",
    ),
    "negated": (
        lambda: torch._neg_view(torch.ones(SHAPE)),
        TypeError,
        r"is lazily negated: pass \.resolve_neg\(\) of it",
    ),
    "complex": (
        lambda: torch.ones(SHAPE, dtype=torch.complex64),
        TypeError,
        "is complex64: supported are float32, float64, bfloat16, float16",
    ),
    "int": (lambda: torch.ones(SHAPE, dtype=torch.int32), TypeError, "is int32: supported are"),
    "bool": (lambda: torch.ones(SHAPE, dtype=torch.bool), TypeError, "is bool8: supported are"),
    "float8": (
        lambda: torch.ones(SHAPE).to(torch.float8_e4m3fn),
        TypeError,
        "is low-precision float8: supported are",
    ),
    "none": (lambda: None, TypeError, "cannot be used: NoneType is not a tensor"),
    "number": (lambda: 1.0, TypeError, "cannot be used: float is not a tensor"),
    "misaligned": (misaligned, ValueError, "is not aligned to its element size: clone it"),
    "dtype": (
        lambda: torch.ones(SHAPE, dtype=torch.float16),
        LayoutError,
        r"is float16 and (params\[0\]|grads\[1\]) is not: group tensors by dtype, "
        r"or convert it with \.to\(\)",
    ),
}


@pytest.mark.parametrize("what", ["meta", "sparse"])
def test_torchs_own_reasons_are_one_line(what: str) -> None:
    with pytest.raises(TypeError, match=r"tensors\[0\] cannot be used") as raised:
        _core.check(["tensors"], [[ANYWHERE[what][0]()]], [False])
    assert "frame #" not in str(raised.value)
    assert "\n" not in str(raised.value)


UNLIKE_PARAMS: dict[str, Make] = {
    "shape": lambda: torch.ones(6, 4),
    "more dimensions": lambda: torch.ones(1, *SHAPE),
    "fewer elements": lambda: torch.ones(4, 5),
    "strides": lambda: torch.ones(6, 4).t(),
    "expanded": lambda: torch.ones(()).expand(SHAPE),
    "not dense": lambda: torch.ones(4, 12)[:, ::2],
}

ROLES = ("params", "grads", "base_grads", "momenta", "exp_avgs", "exp_avg_sqs", "backups")


class Call:
    """Lists of two tensors for every role, to be spoiled in one place and found unchanged."""

    def __init__(self) -> None:
        self.lists: dict[str, list[Tensor]] = {
            role: [torch.randn(SHAPE) for _ in range(2)] for role in ROLES
        }

    def assert_refused(
        self,
        error: type[Exception],
        match: str,
        backend: str = "native",
        *,
        among: Sequence[str] = ("params",),
        written: bool = False,
    ) -> None:
        """Fail unless all kernels raise that have the lists `among`, and leave every bit.

        With `written` only kernels that write to one of them have to.
        """
        sound = [
            (t, bits(t).clone())
            for tensors in self.lists.values()
            for t in tensors
            if type(t) is Tensor and t.device.type == "cpu" and t.layout == torch.strided
            if t.dtype == torch.float32 and not t.is_neg() and t.untyped_storage().nbytes() > 0
        ]
        assert len(sound) >= 12
        updates = [u for u in UPDATES if set(among) <= set(u.lists)]
        if written:
            updates = [u for u in updates if set(among) & set(u.writes)]
        assert updates
        for update in updates:
            with pytest.raises(error, match=match):
                update([self.lists[role] for role in update.lists], backend=backend)
        for t, before in sound:
            assert torch.equal(bits(t), before)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("what", ANYWHERE)
def test_no_usable_tensor(what: str, role: str) -> None:
    make, error, message = ANYWHERE[what]
    call = Call()
    call.lists[role][1] = make()  # type: ignore[call-overload]
    call.assert_refused(error, rf"(?s)^{role}\[1\] {message}", among=[role])


@pytest.mark.parametrize("role", ROLES[1:])
@pytest.mark.parametrize("what", UNLIKE_PARAMS)
def test_unlike_its_parameter(what: str, role: str) -> None:
    call = Call()
    call.lists[role][1] = UNLIKE_PARAMS[what]()  # type: ignore[call-overload]
    fix = rf"pass torch\.empty_like\(params\[1\]\)\.copy_\({role}\[1\]\)"
    call.assert_refused(
        LayoutError,
        rf"^{role}\[1\] has shape .* and strides .*, params\[1\] has shape .*: {fix}",
        among=[role],
    )


@pytest.mark.parametrize("what", ["expanded", "not dense"])
def test_parameters_that_are_not_dense(what: str) -> None:
    call = Call()
    call.lists["params"][1] = UNLIKE_PARAMS[what]()  # type: ignore[call-overload]
    call.assert_refused(ValueError, r"^params\[1\] is not dense \(.*\): pass \.contiguous\(\)")


@pytest.mark.parametrize("change", [list.pop, lambda tensors: tensors.append(torch.ones(SHAPE))])
@pytest.mark.parametrize("role", ROLES[1:])
def test_lists_of_unequal_length(role: str, change: Callable) -> None:
    call = Call()
    change(call.lists[role])
    count = len(call.lists[role])
    call.assert_refused(
        ValueError,
        rf"^{role} has {count} tensors and params has 2: pass lists of equal length",
        among=[role],
    )


@pytest.mark.parametrize("role", ROLES[1:])
def test_no_list_at_all(role: str) -> None:
    call = Call()
    for update in UPDATES:
        lists = [iter(call.lists[r]) if r == role else call.lists[r] for r in update.lists]
        if role in update.lists:
            with pytest.raises(TypeError, match=f"^{role} must be a list or tuple of tensors"):
                update(lists)


MAY_BE_NONE = {
    "perturb-unsaved-backups": {"backups"},
    "sgd_step": {"momenta", "backups"},
    "adamw_step": {"backups"},
}


def assert_missing_lists_refused() -> None:
    for update in UPDATES:
        for role in set(update.lists[1:]) - MAY_BE_NONE.get(
            str(update), MAY_BE_NONE.get(update.kernel, set())
        ):
            lists = [None if r == role else [torch.ones(SHAPE)] for r in update.lists]
            error: type[Exception] = TypeError
            message = f"^{role} must be a list or tuple of tensors"
            if (update.kernel, role) == ("perturb", "backups"):
                error, message = ValueError, "^save=True needs backups: pass tensors like the"
            with pytest.raises(error, match=message):
                update(lists)  # type: ignore[arg-type]
            assert all((t == 1).all() for tensors in lists if tensors is not None for t in tensors)


def test_a_list_that_is_missing_is_refused() -> None:
    """In a process of its own: reading what is not there would end this one."""
    here = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, "-c", "import test_errors; test_errors.assert_missing_lists_refused()"],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (here, here.parent)))),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, f"{process.returncode}: {process.stdout}"


OVERLAPS = {
    "a parameter twice": ("params", 1, "params", 0),
    "a gradient is a parameter": ("grads", 0, "params", 0),
    "a gradient is another parameter": ("grads", 1, "params", 0),
    "a backup is a parameter": ("backups", 0, "params", 0),
    "a backup is a gradient": ("backups", 0, "grads", 0),
    "a momentum is a gradient": ("momenta", 1, "grads", 1),
    "a momentum twice": ("momenta", 1, "momenta", 0),
    "a momentum is a backup": ("momenta", 0, "backups", 0),
    "a base gradient is a parameter": ("base_grads", 1, "params", 0),
    "a first moment is a parameter": ("exp_avgs", 1, "params", 1),
    "a first moment is a gradient": ("exp_avgs", 0, "grads", 0),
    "a first moment is a backup": ("exp_avgs", 0, "backups", 1),
    "a first moment twice": ("exp_avgs", 1, "exp_avgs", 0),
    "a first moment is a second": ("exp_avgs", 1, "exp_avg_sqs", 1),
    "a second moment is a parameter": ("exp_avg_sqs", 0, "params", 1),
    "a second moment is a gradient": ("exp_avg_sqs", 1, "grads", 0),
    "a second moment is a backup": ("exp_avg_sqs", 1, "backups", 1),
    "a second moment twice": ("exp_avg_sqs", 1, "exp_avg_sqs", 0),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_memory_that_is_written_is_shared(name: str) -> None:
    role, i, other, j = OVERLAPS[name]
    call = Call()
    call.lists[role][i] = call.lists[other][j].view(SHAPE)
    both = rf"{role}\[{i}\] and {other}\[{j}\]|{other}\[{j}\] and {role}\[{i}\]"
    message = rf"^({both}) share memory, .* is written: clone one of them"
    call.assert_refused(ValueError, message, among=[role, other], written=True)


MAY_BE_SHARED = {
    "a gradient is a base gradient": ("grads", "base_grads"),
    "a gradient is a backup": ("grads", "backups"),
    "a base gradient is a backup": ("base_grads", "backups"),
}


@pytest.mark.parametrize("name", MAY_BE_SHARED)
def test_memory_that_is_only_read_may_be_shared(name: str) -> None:
    role, other = MAY_BE_SHARED[name]
    call = Call()
    call.lists[role] = call.lists[other]
    concerned = [u for u in UPDATES if {role, other} <= set(u.lists) - set(u.writes)]
    assert concerned
    for update in concerned:
        update([call.lists[r] for r in update.lists])


@pytest.mark.parametrize("distance", [1, 5, 23])
def test_partial_overlap(distance: int) -> None:
    call = Call()
    memory = torch.randn(24 + distance)
    call.lists["params"] = [memory[:24].view(SHAPE), memory[distance:].view(SHAPE)]
    call.assert_refused(ValueError, r"params\[[01]\] and params\[[01]\] share memory")


def test_neighbors_do_not_overlap() -> None:
    memory = torch.randn(48)
    params = [memory[24:].view(SHAPE), memory[:24].view(SHAPE)]
    before = memory.clone()
    g = torch.ones(SHAPE)
    kernels.sgd_step(params, [g, g], lr=0.5)  # what is only read may be shared
    torch.testing.assert_close(memory, before - 0.5)


def test_empty_tensors_may_share_memory() -> None:
    empty, x = torch.zeros(0), torch.ones(3)
    kernels.sgd_step([empty, x, empty], [empty, torch.ones(3), empty], lr=0.25)
    assert torch.equal(x, torch.full((3,), 0.75))


@pytest.mark.gpu
def test_mixed_devices() -> None:
    call = Call()
    call.lists["grads"][1] = call.lists["grads"][1].cuda()
    call.assert_refused(
        ValueError,
        r"^grads\[1\] is on cuda:0 and params\[0\] on cpu: group tensors by device",
    )


def test_norm_and_flag_name_their_tensors() -> None:
    lists = [torch.ones(3), torch.ones(3, dtype=torch.int64)]
    result = torch.zeros(1)
    for call in (lambda: kernels.norm(lists), lambda: kernels.flag_nonfinite(lists, result)):
        with pytest.raises(TypeError, match=r"^tensors\[1\] is int64: supported are"):
            call()
    assert result == 0


WEIGHTS = {
    "int": (
        lambda w: [w[0], torch.ones(3, dtype=torch.int64)],
        TypeError,
        r"weights\[1\] is int64",
    ),
    "dtype": (lambda w: [w[0], w[1].double()], LayoutError, r"weights\[1\] is float64 and weights"),
    "narrow": (
        lambda w: [t.double() for t in w],
        LayoutError,
        r"tensors\[0\] is float32 and weights",
    ),
    "shape": (lambda w: [w[0], torch.ones(4)], LayoutError, r"tensors\[1\] has shape \(3\)"),
    "too few": (lambda w: w[:1], ValueError, "tensors has 2 tensors and weights has 1"),
    "a tensor": (lambda w: torch.ones(2, 3), TypeError, "weights must be a list or tuple"),
    "none": (lambda w: [w[0], None], TypeError, r"weights\[1\] cannot be used: NoneType"),
}


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@pytest.mark.parametrize("what", WEIGHTS)
def test_norm_names_its_weights(what: str, backend_name: str) -> None:
    make, error, message = WEIGHTS[what]
    lists, out = [torch.ones(3), torch.ones(3)], torch.full((), torch.nan)
    with pytest.raises(error, match=f"^{message}"):
        kernels.norm(lists, weights=make(lists), out=out, backend=backend_name)
    assert out.isnan()


SPOILT = {
    "another shape": (lambda lists: lists["grads"].__setitem__(1, torch.ones(6)), LayoutError),
    "too few": (lambda lists: lists["grads"].pop(), ValueError),
    "shared": (lambda lists: lists["params"].__setitem__(1, lists["params"][0]), ValueError),
}


@pytest.mark.parametrize("what", SPOILT)
def test_the_reference_refuses_what_the_others_refuse(what: str) -> None:
    """All backends share one contract: broadcasting, or half an update, would be a wrong result."""
    spoil, error = SPOILT[what]
    call = Call()
    spoil(call.lists)
    call.assert_refused(error, "grads|params", backend="reference", among=["grads"])
