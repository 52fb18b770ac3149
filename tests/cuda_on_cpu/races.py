"""Run every kernel once, on a few blocks, under the thread sanitizer: `run.sh thread races.py`.

A block takes a tenth of a second there. A race ends the process. The results do not matter here:
the tests check them. Arguments choose a part: `updates`, `reductions`, `rows`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import forking
import torch
from torch import Tensor

import backends
from eigenfilter import kernels

SIZES = (1, 4097, 5000)  # the largest tensor takes two blocks, the second of them in part
COLUMNS = 2500  # two tiles; every row starts at an aligned address, unlike with one more column
ROWS = 9  # there are more pairs of rows than a block has warps


def lists(count: int, dtype: torch.dtype) -> list[list[Tensor]]:
    return [[torch.rand(size).to(dtype) for size in SIZES] for _ in range(count)]


def on_device(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def updates(dtype: torch.dtype) -> None:
    """Run all updates with hyperparameters that the device reads: each block makes its rule."""
    flags = {"grad_scale": torch.tensor(2.0), "found_inf": torch.zeros(1)}
    x, g, b, m, v = lists(5, dtype)
    kernels.perturb(x, g, b, on_device(0.1), **flags)
    kernels.perturb(x, g, b, on_device(0.1), save=False)
    kernels.perturb_hvp(x, g, m, b, on_device(0.1), 0.01)
    kernels.sgd_step(x, g, m, b, lr=on_device(0.1), momentum=0.9, **flags)
    adamw = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "extrapolation": 0.2}
    kernels.adamw_step(x, g, m, v, b, lr=0.1, **adamw, step=on_device(3))


def reductions(dtype: torch.dtype) -> None:
    x, weights = lists(2, dtype)
    kernels.norm(x)
    kernels.norm(x, weights=weights, grad_scale=torch.tensor(2.0))
    if dtype == torch.float64:
        kernels.norm([t * 1e200 for t in x])  # squares overflow and are taken again
    x[-1][-1] = torch.inf
    kernels.flag_nonfinite(x, torch.zeros(1))


def wide_gradients() -> None:
    """Step parameters whose gradients are of the next wider dtype."""
    [x, b], [g] = lists(2, torch.bfloat16), lists(1, torch.float32)
    kernels.perturb(x, g, b, 0.1)
    kernels.sgd_step(x, g, None, b, lr=0.1, rounding_seed=on_device(3))


def compressed() -> None:
    """Step compressed tensors, whose groups share a scale between threads."""
    [x], [g] = lists(1, torch.bfloat16), lists(1, torch.float32)
    corrections = [torch.zeros(size, dtype=torch.int8) for size in SIZES]
    m = [torch.zeros(size, dtype=torch.int8) for size in SIZES]
    v = [torch.zeros(size, dtype=torch.uint8) for size in SIZES]
    scales = [[torch.zeros(-(-size // 64)) for size in SIZES] for _ in range(2)]
    kernels.sgd_step(x, g, m, None, corrections, scales[0], lr=on_device(0.1), momentum=0.9)
    adamw = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "rounding_seed": 3}
    kernels.adamw_step(x, g, m, v, None, None, *scales, lr=0.1, **adamw, step=on_device(3))


def rows(dtype: torch.dtype, columns: int) -> None:
    u, q, w = torch.rand(3, ROWS, columns, dtype=dtype)
    kernels.orthogonalize(w[:2], q / columns**0.5)
    kernels.orthogonalize(w[0], (q / columns**0.5).bfloat16())
    kernels.row_dots(q, w)
    kernels.lanczos_step(u, q, w, torch.rand(3, ROWS, dtype=torch.float64))
    kernels.gram(u)
    kernels.mix_rows(u, torch.rand(ROWS, ROWS, dtype=torch.float64))
    scales = torch.arange(ROWS, dtype=torch.float64)
    kernels.cross_entropy_hvp(q, w, scales)
    kernels.cross_entropy_hvp(q, w, scales, out=w)


def run(parts: Sequence[str]) -> int:
    for dtype in (torch.float32, torch.float64):
        if "updates" in parts:
            updates(dtype)
        if "reductions" in parts:
            reductions(dtype)
        if "rows" in parts:
            rows(dtype, COLUMNS)
            rows(dtype, COLUMNS + 1)
    if "updates" in parts:
        updates(torch.bfloat16)
        wide_gradients()
        compressed()
    return 0


if __name__ == "__main__":
    assert backends.EMULATED, "run.sh runs this"
    parts = sys.argv[1:] or ["updates", "reductions", "rows"]
    if "ANSWERS" in os.environ:  # mutants.py started this process
        forking.serve(lambda: run(parts), limit=900)
    else:
        run(parts)
        print("no race")
