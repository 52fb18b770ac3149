"""`_core` trusts no caller: for any argument it succeeds or raises one clear error."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eigenfilter import _core, kernels

FUZZED = Path(__file__).with_name("fuzzed.py")


def test_no_argument_ends_the_process() -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(FUZZED)],
        env={"PYTHONPATH": str(FUZZED.parent.parent), "OMP_NUM_THREADS": "2"},
        text=True,
        capture_output=True,
    )
    last = process.stdout.strip().splitlines()[-1:]
    assert process.returncode == 0, f"{process.returncode}: {last}\n{process.stderr}"
    assert last == ["all ended 1"]


def test_a_list_that_was_never_made_is_refused() -> None:
    tensor_list = _core.TensorList.__new__(_core.TensorList)  # type: ignore[call-arg]
    for act in (
        lambda: len(tensor_list),
        lambda: tensor_list[0],
        lambda: tensor_list.filled,
        lambda: kernels.norm(tensor_list),
        lambda: _core.check(("params",), (tensor_list,), (True,)),
    ):
        with pytest.raises(TypeError, match="was never initialized"):
            act()


def test_checked_gradients_may_be_wider_than_the_other_lists() -> None:
    x, wide = [torch.ones(2, dtype=torch.bfloat16)], [torch.ones(2)]
    for name in ("grads", "base_grads"):
        _core.check(("params", name), (x, wide), (True, False))
    for name in ("momenta", "backups", "weights"):
        with pytest.raises(
            _core.LayoutError, match=rf"{name}\[0\] is float32 and params\[0\] is not"
        ):
            _core.check(("params", name), (x, wide), (True, False))


@pytest.mark.parametrize("count", [0, 9])
def test_as_many_lists_are_checked_as_a_call_can_have(count: int) -> None:
    with pytest.raises(ValueError, match="must have equal lengths, 1 to 8"):
        _core.check(("params",) * count, ([torch.ones(1)],) * count, (False,) * count)


def test_a_getter_may_shrink_the_list_it_is_in() -> None:
    class Shrinking(torch.nn.Parameter):
        @property
        def grad(self) -> Tensor:  # type: ignore[override]
            del params[1:]
            return torch.ones(2)

    params = [Shrinking(torch.zeros(2)) for _ in range(100)]
    before = list(params)
    grads, missing = _core.gradients(params)
    assert len(grads) == len(before)
    assert missing == 0


def test_another_thread_may_empty_a_list_that_is_read() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often, where this one asks torch
    ended = threading.Event()
    lists: list[list[Tensor]] = [[]]
    result: list[float] = []
    messages: set[str] = set()

    def empty() -> None:
        while not ended.is_set():
            lists[0].clear()

    thread = threading.Thread(target=empty)
    thread.start()
    try:
        for _ in range(300):
            lists[0] = [torch.ones(8) for _ in range(200)]
            try:
                result.append(kernels.norm(lists[0]).item())
            except ValueError as error:  # it was empty before it was read
                messages.add(str(error))
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(0 < norm <= 40.1 for norm in result)
    assert messages <= {"no tensors: pass at least one", "tensors is empty"}


@pytest.mark.parametrize("hold", [False, True])
def test_a_tensor_negated_where_it_is_is_noticed(hold: bool) -> None:
    x, g = torch.ones(4), torch.ones(4)
    tensor_list = _core.TensorList([g], hold=hold)
    kernels.sgd_step([x], tensor_list, lr=0.25)
    g.data = torch._neg_view(g.data)
    assert g.tolist() == [-1.0] * 4
    with pytest.raises(TypeError, match=r"^grads\[0\] is lazily negated: pass \.resolve_neg\(\)"):
        kernels.sgd_step([x], tensor_list, lr=0.25)
    assert x.tolist() == [0.75] * 4


def test_inference_tensors_are_changed_in_inference_mode_alone() -> None:
    with torch.inference_mode():
        x, g = torch.ones(4), torch.ones(4)
        kernels.sgd_step([x], [g], lr=0.25)
    assert x.tolist() == [0.75] * 4
    y = torch.ones(4)
    kernels.sgd_step([y], [g], lr=0.25)  # what is only read may be one
    for lists in (([x], [torch.ones(4), x]),):
        with pytest.raises(RuntimeError, match=r"params\[\d\] was made in inference mode"):
            kernels.sgd_step(lists[-1], [g] * len(lists[-1]), lr=0.25)
    assert x.tolist() == [0.75] * 4


def test_what_inference_mode_allowed_is_not_trusted_outside_of_it() -> None:
    with torch.inference_mode():
        x, g = torch.ones(4), torch.ones(4)
        tensor_list = _core.TensorList([x], hold=True, trust=True)
        kernels.norm(tensor_list)
        kernels.sgd_step(tensor_list, [g], lr=0.25)
    with pytest.raises(RuntimeError, match=r"params\[0\] was made in inference mode"):
        kernels.sgd_step(tensor_list, [g], lr=0.25)
    assert x.tolist() == [0.75] * 4


def test_lazy_clones_are_written_apart() -> None:
    x = torch.ones(4)
    clone = torch._lazy_clone(x)
    kernels.sgd_step([clone], [torch.ones(4)], lr=0.25)
    assert clone.tolist() == [0.75] * 4
    assert x.tolist() == [1.0] * 4


def test_empty_vectors_and_tensors() -> None:
    empty = torch.zeros(3, 0)
    assert kernels.gram(empty).tolist() == [[0.0] * 3] * 3
    assert kernels.cholesky_qr(empty.clone()).shape == (3, 3)
    assert kernels.norm([empty]).item() == 0
    kernels.sgd_step([empty], [empty], lr=0.1)


VECTORS = {
    "orthogonalize": ("w", lambda w, wide: (w, torch.ones(3, 6), wide(3), wide(), 1, 1)),
    "row_dots": ("q", lambda q, wide: (q, torch.ones_like(q), wide(2, 4), 1)),
    "lanczos_step": (
        "u",
        lambda u, wide: (u, torch.ones_like(u), torch.ones_like(u), wide(3, 4), wide(2, 4), 1),
    ),
    "gram": ("vectors", lambda v, wide: (v, wide(4, 4), 1)),
    "mix_rows": ("vectors", lambda v, wide: (v, wide(4, 4), 1)),
    "cross_entropy_hvp": (
        "out",
        lambda out, wide: (out, torch.ones_like(out), wide(4), wide(4), None, 1),
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_another_shape_are_refused(name: str) -> None:
    """And so are results of other shapes, which the kernels would write beyond."""
    role, arguments = VECTORS[name]

    def wide(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def short(*shape: int) -> Tensor:
        return torch.zeros([*shape[:-1], shape[-1] - 1] if shape else [2], dtype=torch.float64)

    call = getattr(_core, name)
    for bad, error, message in (
        (torch.ones(4, 6, 1), ValueError, rf"^{role} must be (\[n\] or )?\[b, n\]"),
        (torch.ones(6, 4).T, ValueError, rf"^{role} must be contiguous|^basis must be \[m, n\]"),
        (torch.ones(6, 6).T, ValueError, rf"^{role} must be contiguous: pass \.contiguous\(\)"),
        (torch.ones(4, 6).half(), TypeError, rf"^{role} must be float32 or float64, not float16"),
        (torch.ones(65_536, 6), ValueError, rf"^{role} must be of at most \d+ vectors|of shape"),
    ):
        with pytest.raises(error, match=message):
            call(*arguments(bad, wide))
    good = torch.ones(6) if name == "orthogonalize" else torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"must be a contiguous float64 tensor of shape \[.*\] on"):
        call(*arguments(good, short))
    assert (good == 1).all()
    call(*arguments(good, wide))


def test_a_wrong_call_names_the_arguments_and_shows_none() -> None:
    x, g = [torch.full((2,), 7.5)], [torch.ones(2)]
    named = {"alpha": 0.5, "corrections": None, "momentum_scales": None, "save": False}
    named |= {"adaptive": False, "grad_scale": None, "found_inf": None}
    wrong = (
        ((x, g), named, "not given backups"),
        ((x, g, None), {**named, "num_threads": 1, "rho": 1}, "given an argument of another name"),
        ((x, g, None), {**named, "num_threads": 1, "grads": g}, "given grads twice"),
        ((x, g, None, *named.values(), 1, 1), {}, "given 12 arguments"),
    )
    for args, kwargs, reason in wrong:
        with pytest.raises(TypeError) as error:
            _core.perturb(*args, **kwargs)
        assert str(error.value) == (
            "perturb(params, grads, backups, alpha, corrections, momentum_scales, save, adaptive, "
            f"grad_scale, found_inf, num_threads) was {reason}"
        )
    _core.perturb(x, backups=None, grads=g, num_threads=1, **named)
    assert x[0].tolist() == [8.0, 8.0]


def test_functions_have_a_signature_and_say_what_they_do() -> None:
    parameters = [*inspect.signature(kernels.sgd_step).parameters]
    assert [*inspect.signature(_core.sgd_step).parameters] == [*parameters[:-1], "num_threads"]
    functions = {name: of for name, of in vars(_core).items() if inspect.isbuiltin(of)}
    assert len(functions) > 15
    for name, function in functions.items():
        assert function.__doc__, name
        inspect.signature(function)


def test_saving_needs_backups_and_momentum_momenta() -> None:
    x, g = [torch.ones(2)], [torch.ones(2)]
    with pytest.raises(ValueError, match=r"^save=True needs backups: pass tensors like the param"):
        _core.perturb(x, g, None, 0.1, None, None, True, False, None, None, 1)
    needing = (
        (0.9, 0.0, False),
        (0.0, 0.0, True),
        (torch.zeros(()), 0.0, False),
        (0.0, 0.1, False),
    )
    for momentum, extrapolation, nesterov in needing:
        message = "^(momentum|extrapolation|nesterov=True) needs momenta: pass tensors like the par"
        lists, numbers = (x, g, *[None] * 4), (0.1, momentum, 0.0, 0.0, extrapolation, 1.0)
        with pytest.raises(ValueError, match=message):
            _core.sgd_step(*lists, *numbers, nesterov, False, None, None, None, 1)
    assert x[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("has_backups", [False, True])
def test_perturbing_without_saving(adaptive: bool, has_backups: bool) -> None:
    x, g = [torch.tensor([2.0, 3.0])], [torch.tensor([1.0, -1.0])]
    b = [torch.tensor([4.0, 5.0])]
    origin = b[0] if has_backups else x[0].clone()
    expected = origin + 0.5 * (origin * origin * g[0] if adaptive else g[0])
    backups = _core.TensorList(b) if has_backups else None
    _core.perturb(x, g, backups, 0.5, None, None, False, adaptive, None, None, 1)
    assert torch.equal(x[0], expected)
    assert b[0].tolist() == [4.0, 5.0]
    assert backups is None or not backups.filled
