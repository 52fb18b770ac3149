"""Every launch of the Triton kernels, up to the launch itself, on a machine without a GPU.

Triton's interpreter compiles nothing: here signatures, specializations, tables and machine code
are the ones that a GPU gets.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import triton_stub
from benchmarks.triton_stub import Launch, StubDriver
from cases import DTYPES, SCALE, UPDATES, Arena, Update, nonzero, places
from compressed import SOME_FORMATS, Format, lists_of, name_of
from eigenfilter import kernels
from eigenfilter.kernels._op import OPERATIONS
from eigenfilter.kernels.triton import rows
from eigenfilter.kernels.triton.perturb import perturb_kernel
from launches import assert_arguments_fit, assert_tables_cover

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing is compiled"),
]

WIDE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}
ROWS = [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]
# Dtypes that a step is compiled for, and whose they are.
CONSTANTS = {
    "sgd_step": {"CORRECTION": "corrections", "STATE": "momenta", "SCALE": "momentum_scales"},
    "adamw_step": {
        "CORRECTION": "corrections",
        "FIRST": "exp_avgs",
        "SECOND": "exp_avg_sqs",
        "SCALE": "exp_avg_scales",
    },
}
COLUMNS = (1, 1000, 1024, 4097)


class Recorder:
    """Runs calls and returns their launches, each of which fits the compiled code."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.driver: StubDriver

    def __call__(self, call: Callable[[], object]) -> list[Launch]:
        self.launches.clear()
        call()
        for launch in self.launches:
            assert_arguments_fit(launch)
        return list(self.launches)

    def warm(self, call: Callable[[], object]) -> list[Launch]:
        """Run a call that must find everything compiled, and return its launches."""
        before = self.driver.variants
        launches = self(call)
        assert self.driver.variants == before, "compiled again"
        return launches


def test_the_version_that_was_asked_for() -> None:
    """EIGENFILTER_TEST_TRITON is what make test-triton-launch has installed beside .venv's."""
    assert triton.__version__ == os.environ.get("EIGENFILTER_TEST_TRITON", triton.__version__)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    result = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with triton_stub.installed(result.launches.append) as result.driver:
            yield result


def on_host(value: float) -> float:
    return value


def on_device(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def between(value: float) -> Tensor:
    """One of several numbers on the device, 8 bytes from where the first one is."""
    return torch.tensor([0.0, value], dtype=torch.float64)[1]


SCALARS = [(dtype, wrap) for dtype in DTYPES for wrap in (on_host, on_device)]
SCALARS.append((torch.float32, between))


@pytest.mark.parametrize(("dtype", "wrap"), SCALARS)
@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_updates(
    recorder: Recorder, dtype: torch.dtype, update: Update, wrap: Callable[[float], Any]
) -> None:
    arena = update.arena(dtype)
    inputs = {name: wrap(float(update.options[name])) for name in update.hyperparameters}
    if wrap is not on_host:
        at = int(wrap is between)
        inputs["grad_scale"] = torch.full((2,), SCALE)[at : at + 1]
        inputs["found_inf"] = torch.zeros(2)[at : at + 1]

    def call() -> None:
        update(arena.lists, **inputs, backend="triton")

    (launch,) = recorder(call)
    assert launch.kernel == f"{update.kernel}_kernel"
    assert_tables_cover([launch], arena.lists, arena.lists[update.lists.index("grads")])
    for name, value in inputs.items():
        if name in ("grad_scale", "found_inf"):
            assert launch[name].data_ptr() == value.data_ptr()
        elif isinstance(value, Tensor):
            assert launch[f"{name}_at"].data_ptr() == value.data_ptr()
        else:
            assert (launch[name], launch[f"{name}_at"]) == (value, None)
    if "SAVE" in launch.source.fn.arg_names:
        assert launch["SAVE"] == update.options.get("save", True)
        assert launch["ADAPTIVE"] == update.options.get("adaptive", False)
        assert (
            update.lists[launch["origin"]] == update.lists[-1 if "backups" in update.lists else 0]
        )
    elif "origin" in launch.source.fn.arg_names:
        assert update.lists[launch["origin"]] == update.starts_from
    if "MOMENTA" in launch.source.fn.arg_names:
        assert launch["MOMENTA"] == ("momenta" in update.lists)
        assert launch["NESTEROV"] == update.options.get("nesterov", False)
    if "AHEAD" in launch.source.fn.arg_names:
        assert launch["AHEAD"] == ("extrapolation" in update.options)
    if "sign" in launch.source.fn.arg_names:
        assert launch["sign"] == (-1.0 if update.options.get("maximize") else 1.0)
    if "STOCHASTIC" in launch.source.fn.arg_names:
        stochastic = "rounding_seed" in update.options and dtype.itemsize == 2
        assert launch["STOCHASTIC"] == stochastic
    (again,) = recorder.warm(call)
    assert again["pointers"] is launch["pointers"]
    assert again["chunks"] is launch["chunks"]


@pytest.mark.parametrize("update", UPDATES, ids=str)
@pytest.mark.parametrize(("dtype", "wide"), WIDE.items(), ids=str)
def test_updates_by_wide_gradients_among_others(
    recorder: Recorder, update: Update, dtype: torch.dtype, wide: torch.dtype
) -> None:
    """One launch for each dtype of gradients."""
    lists = list(update.arena(dtype).lists)
    for i, role in enumerate(update.lists):
        if role in ("grads", "base_grads"):
            arena = Arena(wide, 1, places(dtype), shifts=[i])
            lists[i] = [
                t if k % 2 else grad
                for k, (grad, t) in enumerate(zip(arena.lists[0], lists[i], strict=True))
            ]
    launches = recorder(lambda: update(lists, backend="triton"))
    assert len(launches) == 2
    assert_tables_cover(launches, lists, lists[update.lists.index("grads")])
    recorder.warm(lambda: update(lists, backend="triton"))


@pytest.mark.parametrize("backups", [False, True])
@pytest.mark.parametrize("name", ["sgd_step", "adamw_step"])
@pytest.mark.parametrize("form", SOME_FORMATS, ids=name_of)
def test_steps_of_compressed_tensors(
    recorder: Recorder, form: Format, name: str, backups: bool
) -> None:
    lists = lists_of(form, 1 + (name == "adamw_step"))
    given = lists.arguments(backups=backups)
    numbers = {"lr": 0.1} | ({"step": 2} if name == "adamw_step" else {"momentum": 0.9})

    def call() -> None:
        getattr(kernels, name)(**given, **numbers, backend="triton")

    (launch,) = recorder(call)
    present = [a for a in OPERATIONS[name].arguments if given.get(a) is not None]
    assert_tables_cover([launch], [given[a] for a in present], lists.grads)
    assert present[launch["origin"]] == ("backups" if backups else "params")
    for constant, argument in CONSTANTS[name].items():
        expected = None
        if given[argument] is not None:
            expected = getattr(tl, str(given[argument][0].dtype).removeprefix("torch."))
        assert launch[constant] == expected
    recorder.warm(call)


@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_no_number_is_compiled_in(recorder: Recorder, update: Update) -> None:
    """Neither hyperparameters, 0 and 1 among them, nor how many tensors there are."""
    lists = update.arena(torch.float32).lists
    recorder(lambda: update(lists, backend="triton"))
    for n, value in ((1, 0.0), (2, 0.5), (16, 1.0)):
        bounded = {"beta1", "beta2", "eps", "step", "rounding_seed", "momentum", "dampening"}
        bounded.add("extrapolation")  # with 0 it is a shorter kernel
        options = {name: value for name in update.hyperparameters if name not in bounded}
        options |= {name: 1 for name in update.hyperparameters if name == "step"}
        fewer = [t[-n:] for t in lists]
        recorder.warm(functools.partial(update, fewer, **options, backend="triton"))


def test_backups_and_what_is_true_are_no_variants(recorder: Recorder) -> None:
    x, g, b = ([nonzero((5000,), torch.float32)] for _ in range(3))
    unsaved: dict[str, Any] = {"alpha": 0.1, "save": False, "backend": "triton"}
    recorder(lambda: kernels.perturb(x, g, b, **unsaved))
    recorder.warm(lambda: kernels.perturb(x, g, None, **unsaved))
    for nesterov in (False, True):
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "backend": "triton"}
        step = functools.partial(kernels.sgd_step, x, g, b, **options)
        recorder(functools.partial(step, nesterov=nesterov))
        recorder.warm(functools.partial(step, nesterov=np.bool_(nesterov)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_reductions(recorder: Recorder, dtype: torch.dtype, weighted: bool, mixed: bool) -> None:
    tensors = Arena(dtype, 1, shifts=[1]).lists[0]
    if mixed and dtype in WIDE:
        wide = Arena(WIDE[dtype], 1, places(dtype)).lists[0]
        tensors = [b if i % 3 else a for i, (a, b) in enumerate(zip(tensors, wide, strict=True))]
    weights = Arena(dtype, 1).lists[0] if weighted else None
    scale, out = torch.ones(()), torch.zeros((), dtype=torch.float64)

    def norm() -> None:
        kernels.norm(tensors, weights=weights, grad_scale=scale, out=out, backend="triton")

    *sums, last = recorder(norm)
    assert len(sums) == len({t.dtype for t in tensors})
    assert_tables_cover(sums, [tensors] if weights is None else [weights, tensors], tensors)
    at = last["sums"].data_ptr()
    has_doubles = any(t.dtype == torch.float64 for t in tensors)
    exponent_at = last["exponents"].data_ptr() if has_doubles else None
    for launch in sums:
        assert launch["sums"].data_ptr() == at
        at += 8 * launch.grid[0]
        if exponent_at is None:
            assert launch["exponents"] is None
        else:
            assert launch["exponents"].data_ptr() == exponent_at
            exponent_at += 4 * launch.grid[0]
    assert last["sums"].numel() == last["count"] == sum(launch.grid[0] for launch in sums)
    assert last["out"] is out
    assert last["grad_scale"].data_ptr() == scale.data_ptr()
    assert last.grid == (1, 1, 1)
    recorder.warm(norm)
    result = torch.zeros(1)
    flags = recorder(lambda: kernels.flag_nonfinite(tensors, result, backend="triton"))
    assert_tables_cover(flags, [tensors], tensors)
    assert all(launch["found_inf"] is result for launch in flags)


def rows_of(shape: Sequence[int], dtype: torch.dtype, shift: int) -> Tensor:
    """Rows that follow each other, `shift` elements from where memory is aligned."""
    t = nonzero((torch.Size(shape).numel() + shift,), dtype)
    return t[shift:].view(tuple(shape))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("vector", "of_basis"), ROWS, ids=str)
def test_orthogonalize(
    recorder: Recorder, vector: torch.dtype, of_basis: torch.dtype, columns: int, shift: int
) -> None:
    w, basis = rows_of((3, columns), vector, shift), rows_of((5, columns), of_basis, shift)
    launches = recorder(lambda: kernels.orthogonalize(w, basis, passes=2, backend="triton"))
    dots, add, subtract = "dots_kernel", "add_tiles_kernel", "subtract_kernel"
    names = [launch.kernel for launch in launches]
    assert names == [dots, add, subtract] * 2 + ["norms_kernel"]
    tiles = -(-columns // rows.TILE)
    grids = {dots: (tiles, 3, 1), add: (15, 1, 1), subtract: (tiles, 3, 1)}
    for launch in launches[:-1]:
        assert launch.grid == grids[launch.kernel]
    assert [launch["FIRST"] for launch in launches if launch.kernel == add] == [True, False]
    for launch in launches:
        if launch.kernel in (dots, subtract):
            assert (launch["w"].data_ptr(), launch["rows"]) == (w.data_ptr(), 5)
            assert (launch["basis"].data_ptr(), launch["columns"]) == (basis.data_ptr(), columns)
    assert launches[0]["sums"].numel() == 3 * 5 * tiles
    assert launches[2]["squares"].numel() == 3 * tiles
    assert launches[-1].grid == (3, 1, 1)
    recorder.warm(lambda: kernels.orthogonalize(w, basis, passes=2, backend="triton"))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows(recorder: Recorder, dtype: torch.dtype, columns: int, shift: int) -> None:
    u, q, w = (rows_of((4, columns), dtype, shift) for _ in range(3))
    factors, square = nonzero((3, 4), torch.float64), nonzero((4, 4), torch.float64)
    calls: dict[str, tuple[Callable[[], object], int, int]] = {
        "row_dots": (lambda: kernels.row_dots(q, w, backend="triton"), 4, 8),
        "lanczos_step": (lambda: kernels.lanczos_step(u, q, w, factors, backend="triton"), 4, 8),
        "gram": (lambda: kernels.gram(u, backend="triton"), 1, 16),
    }
    tiles = -(-columns // rows.TILE)
    inputs = {"u": u, "q": q, "w": w, "vectors": u, "factors": factors}
    for name, (call, programs, sums) in calls.items():
        launch, add = recorder(call)
        assert (launch.kernel, add.kernel) == (f"{name}_kernel", "add_sums_kernel")
        assert (launch.grid, add.grid) == ((tiles, programs, 1), (sums, 1, 1))
        assert launch["sums"].numel() == sums * tiles
        assert add["sums"] is launch["sums"]
        assert add["out"].numel() == sums
        for argument, t in inputs.items():
            if argument in launch.source.fn.arg_names:
                assert launch[argument].data_ptr() == t.data_ptr()
        recorder.warm(call)
    (launch,) = recorder(lambda: kernels.mix_rows(u, square, backend="triton"))
    assert (launch.grid, launch["rows"], launch["columns"]) == ((tiles, 1, 1), 4, columns)
    assert launch["vectors"].data_ptr() == u.data_ptr()
    assert launch["factors"].data_ptr() == square.data_ptr()
    in_place = [(w, w), (u, w)]
    for out, vectors in in_place:
        (launch,) = recorder(
            lambda out=out, vectors=vectors: kernels.cross_entropy_hvp(
                q, vectors, factors[0], out=out, backend="triton"
            )
        )
        assert (launch.kernel, launch.grid) == ("cross_entropy_hvp_kernel", (4, 1, 1))
        addresses = [launch[name].data_ptr() for name in ("product", "logits", "u")]
        assert addresses == [out.data_ptr(), q.data_ptr(), vectors.data_ptr()]
        assert launch["columns"] == columns


def test_the_driver_is_put_back(recorder: Recorder) -> None:
    """What was compiled for the stub is forgotten, or another driver would not launch."""
    cache = perturb_kernel.device_caches
    x, g, b = ([nonzero((50,), torch.float32)] for _ in range(3))
    with triton_stub.installed() as inner:
        assert triton.runtime.driver.active is inner
        kernels.perturb(x, g, b, 0.1, backend="triton")
        assert (inner.variants, len(cache)) == (1, 1)
    assert triton.runtime.driver.active is recorder.driver
    assert len(cache) == 0
