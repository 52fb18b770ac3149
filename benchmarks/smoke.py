"""Every kernel on every backend, once and quickly, against the reference on the CPU.

    eigenfilter bench smoke --device cuda

Each kernel, in each dtype it takes, on a tensor of each size and on many small ones, aligned to 64
bytes and one element off, between margins of NaN. What is written has the reference's bits, sums
agree to a few roundings; the reference on a GPU, whose torch fuses where the CPU's does not, need
only come near. A table says how many of the cases agree, and a line why one does not. The files are
written as the table grows, and say so until it is complete.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, report
from eigenfilter import _core, kernels
from eigenfilter.kernels import dispatch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 4097, 8192, 5_000_000)
# Tensors of a list that is long, and their size. A launch of the compiled CUDA kernels takes up to
# 148 tensors of two lists in its small batch, and up to 671 of five lists in the large one.
MANY, OF_MANY = 700, 21
SHIFTS = (0, 1)
MARGIN = 64
ROWS = 3

# Relative, of sums in float64 whose order differs; of results rounded to float32 after.
SUMS = 1e-11
ROUNDED = 8 * 2.0**-24
NEAR = 8  # spacings of a dtype's numbers at 1, beside as many relative ones

Lists = list[list[Tensor]]


@dataclass(frozen=True)
class Task:
    """A kernel with what it is called with.

    Attributes:
        name: the kernel's, and of what variant.
        lists: how many lists of tensors it takes.
        call: calls it with the lists and a backend; returns what it gives back.
        dtypes: what it takes.
        as_rows: whether a list is one tensor of `ROWS` rows.
        wide: the number of a list that is float32 for narrower dtypes and float64 for float32.
    """

    name: str
    lists: int
    call: Callable[..., Tensor | tuple[Tensor, ...] | None]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    as_rows: bool = False
    wide: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What one case came to; `problem` is empty where it agrees."""

    kernel: str
    backend: str
    dtype: str
    tensors: int
    size: int
    shift: int
    problem: str

    def line(self) -> str:
        """The problem, and where it is."""
        case = f"{self.kernel}, {self.backend}, {self.dtype}, {self.tensors} x {self.size} elements"
        return f"- {case}, {self.shift} off: {self.problem}"


SGD: Mapping[str, Any] = {"lr": 0.313, "weight_decay": 0.073}
MOMENTUM: Mapping[str, Any] = {**SGD, "momentum": 0.87, "dampening": 0.31}
NESTEROV: Mapping[str, Any] = {**SGD, "momentum": 0.87, "nesterov": True, "maximize": True}
ADAMW: Mapping[str, Any] = {
    "lr": 0.313,
    "beta1": 0.83,
    "beta2": 0.973,
    "eps": 0.037,
    "weight_decay": 0.073,
    "step": 9,
}
SEED = {"rounding_seed": 11_184_811}
VECTORS = (torch.float32, torch.float64)


def _call(kernel: Callable[..., Any], *options: Mapping[str, Any], last: Any = ()) -> Any:
    merged = {name: value for each in options for name, value in each.items()}
    return lambda lists, backend: kernel(*lists, *last, **merged, backend=backend)


def _sgd_step(kernel: Callable[..., Any], roles: Sequence[int | None], *options: Any) -> Any:
    """A descent that is given some of its optional lists: the number of each, or None."""
    merged = {name: value for each in options for name, value in each.items()}
    return lambda lists, backend: kernel(
        *(None if i is None else lists[i] for i in roles), **merged, backend=backend
    )


def _norm(lists: Lists, backend: str) -> Tensor:
    return kernels.norm(lists[0], backend=backend)


def _weighted_norm(lists: Lists, backend: str) -> Tensor:
    return kernels.norm(lists[0], weights=lists[1], backend=backend)


def _flags(lists: Lists, backend: str) -> Tensor:
    """Of finite tensors, and with an infinity as the last element of all."""
    flags = torch.zeros(2, device=lists[0][0].device)
    kernels.flag_nonfinite(lists[0], flags[:1], backend=backend)
    lists[0][-1].view(-1)[-1] = torch.inf
    kernels.flag_nonfinite(lists[0], flags[1:], backend=backend)
    return flags


def _orthogonalize(lists: Lists, backend: str) -> tuple[Tensor, ...]:
    """Against rows of lengths near 1: a power of 2 scales them alike on every device."""
    [[basis], [wide]] = lists
    w, scale = wide[0].clone(), 2.0 ** -round(math.log2(basis.shape[1]) / 2)
    return (w, *kernels.orthogonalize(w, basis * scale, backend=backend))


def _lanczos_step(lists: Lists, backend: str) -> Tensor:
    [[u], [q], [w]] = lists
    factors = torch.tensor([0.7, -0.4, 1.3], dtype=torch.float64, device=u.device)
    return kernels.lanczos_step(u, q, w, factors.repeat(ROWS, 1).T.contiguous(), backend=backend)


def _mix_rows(lists: Lists, backend: str) -> None:
    [[vectors]] = lists
    factors = torch.arange(1.0, ROWS * ROWS + 1, dtype=torch.float64, device=vectors.device)
    kernels.mix_rows(vectors, factors.view(ROWS, ROWS), backend=backend)


def _on_rows(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda lists, backend: kernel(*(rows for [rows] in lists), backend=backend)


TASKS = (
    Task("perturb", 3, _call(kernels.perturb, last=(0.137,))),
    Task("perturb, adaptive", 3, _call(kernels.perturb, {"adaptive": True}, last=(0.137,))),
    Task("perturb, wide gradients", 3, _call(kernels.perturb, last=(0.137,)), wide=1),
    Task("perturb_again", 2, _call(kernels.perturb_again, last=(0.137,))),
    Task(
        "perturb_again, backups",
        3,
        lambda lists, backend: kernels.perturb_again(
            lists[0], lists[1], 0.137, lists[2], backend=backend
        ),
    ),
    Task("perturb_hvp", 4, _call(kernels.perturb_hvp, last=(0.137, 0.019))),
    Task("sgd_step", 2, _sgd_step(kernels.sgd_step, (0, 1, None, None), SGD)),
    Task("sgd_step, momentum", 3, _sgd_step(kernels.sgd_step, (0, 1, 2, None), MOMENTUM)),
    Task("sgd_step, backups", 3, _sgd_step(kernels.sgd_step, (0, 1, None, 2), SGD)),
    Task("sgd_step, Nesterov, backups", 4, _call(kernels.sgd_step, NESTEROV)),
    Task("sgd_step, stochastic", 4, _call(kernels.sgd_step, MOMENTUM, SEED)),
    Task("sgd_step, wide gradients", 4, _call(kernels.sgd_step, MOMENTUM), wide=1),
    Task("adamw_step", 4, _sgd_step(kernels.adamw_step, (0, 1, 2, 3, None), ADAMW)),
    Task("adamw_step, backups", 5, _call(kernels.adamw_step, ADAMW)),
    Task("adamw_step, stochastic", 5, _call(kernels.adamw_step, ADAMW, SEED)),
    Task("adamw_step, wide gradients", 5, _call(kernels.adamw_step, ADAMW), wide=1),
    Task("norm", 1, _norm),
    Task("norm, weighted", 2, _weighted_norm),
    Task("flag_nonfinite", 1, _flags),
    Task("orthogonalize", 2, _orthogonalize, as_rows=True, wide=1),
    Task("row_dots", 2, _on_rows(kernels.row_dots), dtypes=VECTORS, as_rows=True),
    Task("lanczos_step", 3, _lanczos_step, dtypes=VECTORS, as_rows=True),
    Task("gram", 1, _on_rows(kernels.gram), dtypes=VECTORS, as_rows=True),
    Task("mix_rows", 1, _mix_rows, dtypes=VECTORS, as_rows=True),
)


def backends(device: torch.device) -> list[str]:
    """Those that serve a device."""
    if device.type == "cpu":
        return ["reference", "native"]
    has_native = _core.cuda_compiled and dispatch.missing_code(device) is None
    found = ["reference", *(["native"] if has_native else [])]
    return found + (["triton"] if importlib.util.find_spec("triton") is not None else [])


def run(
    device: torch.device, only: Sequence[str], sizes: Sequence[int], folder: Path
) -> list[Outcome]:
    """Run all cases, print the table as it grows, write it; return those that do not agree.

    Args:
        device: where.
        only: backends, or none for all that serve the device.
        sizes: elements of the tensors.
        folder: where the results go.
    """
    table = _Table(list(only) or backends(device), device, folder)
    outcomes: list[Outcome] = []
    pairs = [
        (task, dtype)
        for task in TASKS
        for dtype in task.dtypes
        if task.wide is None or task.as_rows or dtype != torch.float64  # nothing is wider
    ]
    for task, dtype in pairs:
        own = _of_task(task, dtype, device, table.backends, sizes)
        outcomes += own
        table.add(task, dtype, own)
        table.save(outcomes, len(pairs))
    failed = [o for o in outcomes if o.problem]
    print("\n".join(["", *(o.line() for o in failed), _verdict(outcomes)]))
    table.files.name()
    return failed


class _Table:
    """What the cases came to, by kernel, dtype and backend: on the terminal and in files."""

    def __init__(self, backends: list[str], device: torch.device, folder: Path) -> None:
        self.backends = backends
        self.files = report.Files(folder, f"{device.type}-smoke", environment.describe(device))
        self.header = [
            line + "".join(f" {cell} |" for cell in cells)
            for line, cells in (
                ("| kernel | dtype |", backends),
                ("| --- | --- |", ["---"] * len(backends)),
            )
        ]
        self.rows: list[str] = []
        print("\n".join(self.header))

    def add(self, task: Task, dtype: torch.dtype, own: Sequence[Outcome]) -> None:
        counts = [[not o.problem for o in own if o.backend == name] for name in self.backends]
        cells = [f"{sum(agree)} of {len(agree)}" for agree in counts]
        self.rows.append(f"| {task.name} | {_named(dtype)} | {' | '.join(cells)} |")
        print(self.rows[-1], flush=True)

    def save(self, outcomes: Sequence[Outcome], of: int) -> None:
        missing = report.incomplete(len(self.rows), of, "rows")
        problems = [o.line() for o in outcomes if o.problem]
        title = "# Every kernel against the reference"
        text = [
            title,
            *missing,
            "",
            _verdict(outcomes),
            "",
            *self.header,
            *self.rows,
            "",
            *problems,
        ]
        cases = [asdict(o) for o in outcomes]
        self.files.save(text, {"complete": len(self.rows) == of, "cases": cases})


def _verdict(outcomes: Sequence[Outcome]) -> str:
    agree = sum(not o.problem for o in outcomes)
    return f"{agree} of {len(outcomes)} cases agree with the reference."


def _of_task(
    task: Task, dtype: torch.dtype, device: torch.device, names: Sequence[str], sizes: Sequence[int]
) -> list[Outcome]:
    """All cases of a kernel in a dtype: numbers and sizes of tensors, and shifts."""
    shapes = [(1, size) for size in sizes]
    if not task.as_rows:
        shapes.append((MANY, OF_MANY))
    outcomes = []
    for (n, size), shift in itertools.product(shapes, SHIFTS):
        expected = _results(task, "reference", torch.device("cpu"), dtype, n, size, shift)
        for name in names:
            try:
                problem = _difference(
                    name, _results(task, name, device, dtype, n, size, shift), expected
                )
            except Exception as error:  # a sweep names all that fails, Triton's own errors too
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            outcomes.append(Outcome(task.name, name, _named(dtype), n, size, shift, problem))
    return outcomes


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _results(
    task: Task,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    size: int,
    shift: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """What a backend makes of lists of `n` tensors, and what it returns, both on the CPU.

    Raises:
        RuntimeError: a margin was written into.
    """
    shape = (ROWS, size) if task.as_rows else (size,)
    numel = math.prod(shape)
    begin, end = MARGIN + shift, MARGIN + shift + numel
    row = -(-(end + MARGIN) // MARGIN) * MARGIN  # tensors of a list are aligned alike
    memories, lists = [], []
    for i in range(task.lists):
        own = torch.promote_types(dtype, torch.float32) if task.wide == i else dtype
        if task.wide == i and own == dtype and not task.as_rows:
            own = torch.float64
        memories.append(torch.full((n, row), torch.nan, dtype=own, device=device))
        memories[-1][:, begin:end].copy_(_values((n, numel), own, i))
        lists.append([memory[begin:end].view(shape) for memory in memories[-1]])
    returned = task.call(lists, backend)
    for memory in memories:
        if not (memory[:, :begin].isnan().all() and memory[:, end:].isnan().all()):
            raise RuntimeError("memory beside a tensor was written into")
    if returned is None:
        returned = ()
    given_back = returned if isinstance(returned, tuple) else (returned,)
    return [memory[:, begin:end].cpu() for memory in memories], [t.cpu() for t in given_back]


@functools.lru_cache(maxsize=8)
def _values(shape: tuple[int, ...], dtype: torch.dtype, number: int) -> Tensor:
    """Those of a list, of both signs and between 0.5 and 2 in size.

    The fourth list's are positive, as second moments have to be.
    """
    random = torch.Generator().manual_seed(number)
    values = torch.empty(shape).uniform_(-1.5, 1.5, generator=random)
    values += values.sign() * 0.5
    return (values.abs() if number == 3 else values).to(dtype)


def _difference(
    backend: str,
    actual: tuple[list[Tensor], list[Tensor]],
    expected: tuple[list[Tensor], list[Tensor]],
) -> str:
    """Say how results differ from the reference's; empty where they agree."""
    for i, (a, b) in enumerate(zip(actual[0], expected[0], strict=True)):
        if backend == "reference":
            allowed = NEAR * torch.finfo(b.dtype).eps * (1 + b.double().abs())
            same = bool(((a.double() - b.double()).abs() <= allowed).all() or torch.equal(a, b))
        else:
            same = torch.equal(_bits(a), _bits(b))
        if not same:
            differ = int((_bits(a) != _bits(b)).sum())
            return f"list {i} differs from the reference in {differ} of {a.numel()} elements"
    for i, (a, b) in enumerate(zip(actual[1], expected[1], strict=True)):
        # The first is the one that was rounded, and others are of what it was rounded to.
        most = SUMS if actual[1][0].dtype == torch.float64 else ROUNDED
        size = max(float(b.double().abs().max()), 1.0)
        error = float((a.double() - b.double()).abs().max()) / size
        if not error <= most:
            return f"result {i} is {error:.1e} off, relative to its largest number"
    return ""


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
