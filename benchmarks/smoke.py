"""Every kernel on every backend, once and quickly, against the reference on the CPU.

    eigenfilter bench smoke --device cuda

Each kernel runs in each dtype that it takes, on one tensor of each size and on many small ones.
Tensors are aligned to 64 bytes, or one element off, between margins of NaN. Written tensors must
have the reference's bits, and sums must agree to a few roundings. The reference on a GPU only needs
to be close, since torch fuses operations there that it does not fuse on the CPU. A table says how
many of the cases agree; one line for each of the others says what differs. The files are written
as the table grows, and until it is complete they say so.
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
# Tensors of a long list, and their size. A launch of the compiled CUDA kernels takes up to 148
# tensors of two lists in its small batch, and up to 671 of five lists in its large batch.
LONG_LIST, LONG_LIST_SIZE = 700, 21
SHIFTS = (0, 1)
MARGIN = 64
ROWS = 3

# Relative tolerances for float64 sums in another order, and for such sums rounded to float32.
SUM_TOLERANCE = 1e-11
ROUNDED_SUM_TOLERANCE = 8 * 2.0**-24
# On a GPU the reference may be off by so many epsilons of the dtype, absolute and relative.
REFERENCE_EPSILONS = 8

Lists = list[list[Tensor]]


@dataclass(frozen=True)
class KernelCall:
    """A kernel with the options of a call.

    Attributes:
        name: name of the kernel, and of the variant.
        lists: how many lists of tensors it takes.
        run: calls the kernel with the lists and a backend, and returns the kernel's results.
        dtypes: dtypes that it takes.
        as_rows: whether a list is one tensor of `ROWS` rows.
        wide: index of a list in a wider dtype: float32 for narrower dtypes, and float64 for float32
            unless `as_rows`. None if all lists have the same dtype.
    """

    name: str
    lists: int
    run: Callable[..., Tensor | tuple[Tensor, ...] | None]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    as_rows: bool = False
    wide: int | None = None


@dataclass(frozen=True)
class CaseResult:
    """The result of one case; `problem` is empty if it agrees with the reference."""

    kernel: str
    backend: str
    dtype: str
    tensors: int
    size: int
    shift: int
    problem: str

    def line(self) -> str:
        """Describe the case and the problem in one line."""
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
AHEAD = {"extrapolation": 0.61}
UNSAVED = {"save": False}
SEED = {"rounding_seed": 11_184_811}
VECTORS = (torch.float32, torch.float64)


def _call(kernel: Callable[..., Any], *options: Mapping[str, Any], last: Any = ()) -> Any:
    """A call with all lists, then the arguments `last`, with the options of all mappings."""
    all_options = {name: value for each in options for name, value in each.items()}
    return lambda lists, backend: kernel(*lists, *last, **all_options, backend=backend)


def _call_without(kernel: Callable[..., Any], roles: Sequence[int | None], *options: Any) -> Any:
    """A call without some optional lists: for each argument, the index of its list or None."""
    all_options = {name: value for each in options for name, value in each.items()}
    return lambda lists, backend: kernel(
        *(None if i is None else lists[i] for i in roles), **all_options, backend=backend
    )


def _norm(lists: Lists, backend: str) -> Tensor:
    return kernels.norm(lists[0], backend=backend)


def _weighted_norm(lists: Lists, backend: str) -> Tensor:
    return kernels.norm(lists[0], weights=lists[1], backend=backend)


def _flags(lists: Lists, backend: str) -> Tensor:
    """The flags for finite tensors, and for tensors whose very last element is infinite."""
    flags = torch.zeros(2, device=lists[0][0].device)
    kernels.flag_nonfinite(lists[0], flags[:1], backend=backend)
    lists[0][-1].view(-1)[-1] = torch.inf
    kernels.flag_nonfinite(lists[0], flags[1:], backend=backend)
    return flags


def _orthogonalize(lists: Lists, backend: str) -> tuple[Tensor, ...]:
    """Orthogonalize against rows of lengths near 1; scaling by a power of 2 has no rounding."""
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


def _cross_entropy_hvp(lists: Lists, backend: str) -> tuple[Tensor, ...]:
    [[logits], [u]] = lists
    scales = torch.arange(float(ROWS), dtype=torch.float64, device=u.device)
    return kernels.cross_entropy_hvp(logits, u, scales, backend=backend)


def _on_rows(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda lists, backend: kernel(*(rows for [rows] in lists), backend=backend)


KERNEL_CALLS = (
    KernelCall("perturb", 3, _call(kernels.perturb, last=(0.137,))),
    KernelCall("perturb, adaptive", 3, _call(kernels.perturb, {"adaptive": True}, last=(0.137,))),
    KernelCall("perturb, wide gradients", 3, _call(kernels.perturb, last=(0.137,)), wide=1),
    KernelCall("perturb, unsaved", 2, _call(kernels.perturb, UNSAVED, last=(None, 0.137))),
    KernelCall("perturb, unsaved, backups", 3, _call(kernels.perturb, UNSAVED, last=(0.137,))),
    KernelCall("perturb_hvp", 4, _call(kernels.perturb_hvp, last=(0.137, 0.019))),
    KernelCall("sgd_step", 2, _call_without(kernels.sgd_step, (0, 1, None, None), SGD)),
    KernelCall("sgd_step, momentum", 3, _call_without(kernels.sgd_step, (0, 1, 2, None), MOMENTUM)),
    KernelCall("sgd_step, backups", 3, _call_without(kernels.sgd_step, (0, 1, None, 2), SGD)),
    KernelCall("sgd_step, Nesterov, backups", 4, _call(kernels.sgd_step, NESTEROV)),
    KernelCall("sgd_step, stochastic", 4, _call(kernels.sgd_step, MOMENTUM, SEED)),
    KernelCall("sgd_step, wide gradients", 4, _call(kernels.sgd_step, MOMENTUM), wide=1),
    KernelCall("adamw_step", 4, _call_without(kernels.adamw_step, (0, 1, 2, 3, None), ADAMW)),
    KernelCall("adamw_step, backups", 5, _call(kernels.adamw_step, ADAMW)),
    KernelCall("adamw_step, ahead, backups", 5, _call(kernels.adamw_step, ADAMW, AHEAD)),
    KernelCall("adamw_step, stochastic", 5, _call(kernels.adamw_step, ADAMW, SEED)),
    KernelCall("adamw_step, wide gradients", 5, _call(kernels.adamw_step, ADAMW), wide=1),
    KernelCall("norm", 1, _norm),
    KernelCall("norm, weighted", 2, _weighted_norm),
    KernelCall("flag_nonfinite", 1, _flags),
    KernelCall("orthogonalize", 2, _orthogonalize, as_rows=True, wide=1),
    KernelCall("row_dots", 2, _on_rows(kernels.row_dots), dtypes=VECTORS, as_rows=True),
    KernelCall("lanczos_step", 3, _lanczos_step, dtypes=VECTORS, as_rows=True),
    KernelCall("gram", 1, _on_rows(kernels.gram), dtypes=VECTORS, as_rows=True),
    KernelCall("mix_rows", 1, _mix_rows, dtypes=VECTORS, as_rows=True),
    KernelCall("cross_entropy_hvp", 2, _cross_entropy_hvp, dtypes=VECTORS, as_rows=True),
)


def backends(device: torch.device) -> list[str]:
    """Return the backends that have kernels for a device."""
    if device.type == "cpu":
        return ["reference", "native"]
    names = ["reference"]
    if _core.cuda_compiled and dispatch.missing_code(device) is None:
        names.append("native")
    if importlib.util.find_spec("triton") is not None:
        names.append("triton")
    return names


def run(
    device: torch.device, only: Sequence[str], sizes: Sequence[int], folder: Path
) -> list[CaseResult]:
    """Run all cases, print and write the table as it grows, and return the cases that disagree.

    Args:
        device: the device.
        only: names of backends; an empty sequence means all that have kernels for the device.
        sizes: numbers of elements of a tensor.
        folder: the folder for the results.
    """
    table = _Table(list(only) or backends(device), device, folder)
    results: list[CaseResult] = []
    pairs = [
        (call, dtype)
        for call in KERNEL_CALLS
        for dtype in call.dtypes
        if call.wide is None or call.as_rows or dtype != torch.float64  # nothing is wider
    ]
    for call, dtype in pairs:
        row = _run_cases(call, dtype, device, table.backends, sizes)
        results += row
        table.add(call, dtype, row)
        table.save(results, len(pairs))
    failures = [r for r in results if r.problem]
    print("\n".join(["", *(r.line() for r in failures), _verdict(results)]))
    table.files.print_paths()
    return failures


class _Table:
    """The table of results by kernel, dtype and backend, on the terminal and in files."""

    def __init__(self, backends: list[str], device: torch.device, folder: Path) -> None:
        self.backends = backends
        self.files = report.ResultFiles(
            folder, f"{device.type}-smoke", environment.describe(device)
        )
        self.header = [
            line + "".join(f" {cell} |" for cell in cells)
            for line, cells in (
                ("| kernel | dtype |", backends),
                ("| --- | --- |", ["---"] * len(backends)),
            )
        ]
        self.rows: list[str] = []
        print("\n".join(self.header))

    def add(self, call: KernelCall, dtype: torch.dtype, results: Sequence[CaseResult]) -> None:
        agreements = [
            [not r.problem for r in results if r.backend == name] for name in self.backends
        ]
        cells = [f"{sum(agreement)} of {len(agreement)}" for agreement in agreements]
        self.rows.append(f"| {call.name} | {_dtype_name(dtype)} | {' | '.join(cells)} |")
        print(self.rows[-1], flush=True)

    def save(self, results: Sequence[CaseResult], total: int) -> None:
        note = report.incomplete(len(self.rows), total, "rows")
        problems = [r.line() for r in results if r.problem]
        title = "# Every kernel against the reference"
        text = [
            title,
            *note,
            "",
            _verdict(results),
            "",
            *self.header,
            *self.rows,
            "",
            *problems,
        ]
        cases = [asdict(r) for r in results]
        self.files.save(text, {"complete": len(self.rows) == total, "cases": cases})


def _verdict(results: Sequence[CaseResult]) -> str:
    agreements = sum(not r.problem for r in results)
    return f"{agreements} of {len(results)} cases agree with the reference."


def _run_cases(
    call: KernelCall,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    sizes: Sequence[int],
) -> list[CaseResult]:
    """Run all cases of a kernel in a dtype: numbers and sizes of tensors, and shifts."""
    shapes = [(1, size) for size in sizes]
    if not call.as_rows:
        shapes.append((LONG_LIST, LONG_LIST_SIZE))
    results = []
    for (n, size), shift in itertools.product(shapes, SHIFTS):
        expected = _results(call, "reference", torch.device("cpu"), dtype, n, size, shift)
        for name in names:
            try:
                problem = _difference(
                    name, _results(call, name, device, dtype, n, size, shift), expected
                )
            except Exception as error:  # every failure is reported, Triton's own errors too
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            results.append(CaseResult(call.name, name, _dtype_name(dtype), n, size, shift, problem))
    return results


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _results(
    call: KernelCall,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    size: int,
    shift: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Call a kernel on lists of `n` tensors; return the lists and the kernel's results, on the CPU.

    Raises:
        RuntimeError: the kernel wrote into a margin.
    """
    shape = (ROWS, size) if call.as_rows else (size,)
    numel = math.prod(shape)
    begin, end = MARGIN + shift, MARGIN + shift + numel
    row = -(-(end + MARGIN) // MARGIN) * MARGIN  # all tensors of a list have the same alignment
    memories, lists = [], []
    for i in range(call.lists):
        list_dtype = torch.promote_types(dtype, torch.float32) if call.wide == i else dtype
        if call.wide == i and list_dtype == dtype and not call.as_rows:
            list_dtype = torch.float64
        memories.append(torch.full((n, row), torch.nan, dtype=list_dtype, device=device))
        memories[-1][:, begin:end].copy_(_values((n, numel), list_dtype, i))
        lists.append([memory[begin:end].view(shape) for memory in memories[-1]])
    output = call.run(lists, backend)
    for memory in memories:
        if not (memory[:, :begin].isnan().all() and memory[:, end:].isnan().all()):
            raise RuntimeError("memory beside a tensor was written into")
    outputs = output if isinstance(output, tuple) else () if output is None else (output,)
    return [memory[:, begin:end].cpu() for memory in memories], [t.cpu() for t in outputs]


@functools.lru_cache(maxsize=8)
def _values(shape: tuple[int, ...], dtype: torch.dtype, number: int) -> Tensor:
    """The values of a list: of both signs, with sizes between 0.5 and 2.

    The values of the fourth list are positive, as second moments have to be.
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
    """Describe how results differ from the reference's; return "" if they agree."""
    for i, (a, b) in enumerate(zip(actual[0], expected[0], strict=True)):
        if backend == "reference":
            limit = REFERENCE_EPSILONS * torch.finfo(b.dtype).eps * (1 + b.double().abs())
            agrees = bool(((a.double() - b.double()).abs() <= limit).all() or torch.equal(a, b))
        else:
            agrees = torch.equal(_bits(a), _bits(b))
        if not agrees:
            count = int((_bits(a) != _bits(b)).sum())
            return f"list {i} differs from the reference in {count} of {a.numel()} elements"
    for i, (a, b) in enumerate(zip(actual[1], expected[1], strict=True)):
        # If the first result is rounded to float32, later ones are computed from the rounded one.
        is_rounded = actual[1][0].dtype != torch.float64
        tolerance = ROUNDED_SUM_TOLERANCE if is_rounded else SUM_TOLERANCE
        size = max(float(b.double().abs().max()), 1.0)
        error = float((a.double() - b.double()).abs().max()) / size
        if not error <= tolerance:
            return f"result {i} is {error:.1e} off, relative to its largest number"
    return ""


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
