"""Single kernels on a few large tensors, beside torch's functions and the bandwidth of a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.comparison import (
    TOLERANCES,
    Benchmark,
    Comparison,
    Contender,
    Goal,
    Phase,
    Setting,
    Tolerance,
    copy_reference,
    do_nothing,
)
from benchmarks.peers import torch_adamw, torch_sgd
from benchmarks.shapes import TensorProblem
from eigenfilter import kernels

ALPHA, EPS, LR, MOMENTUM = 0.05, 0.5, 0.1, 0.9
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}

# The library's norm is a rounding away from the exact one. torch sums in the tensors' dtype.
NORM_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-12, atol=0.0),
    torch.float32: Tolerance(rtol=3e-4, atol=0.0),
    torch.float16: Tolerance(rtol=3e-3, atol=0.0),
    torch.bfloat16: Tolerance(rtol=3e-3, atol=0.0),
}


# Sums of 1.9 million products in float32, whose order differs, of vectors of norm 1 and 1,400.
ORTHOGONALIZE_TOLERANCE = Tolerance(rtol=1e-5, atol=1e-5)


def problem(device: torch.device, dtype: torch.dtype) -> TensorProblem:
    """Four tensors, which have 25 million elements together, and 100 million on a GPU."""
    return TensorProblem([(6_250_000 if device.type == "cpu" else 25_000_000,)] * 4, device, dtype)


def perturb(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Back up and perturb: reads x, g; writes x, b."""
    p = problem(setting.device, dtype)
    grads = p.tensors(1)

    def contender(name: str, run: Callable[..., object]) -> Contender:
        x, b = p.tensors(0), p.tensors(2)
        return _contender(name, lambda: run(x, grads, b, alpha=ALPHA), [*x, *b])

    ours = functools.partial(kernels.perturb, backend=setting.backend)
    return _comparison(
        p, contender("eigenfilter", ours), contender("foreach", torch_sgd.perturb), 4
    )


def perturb_unsaved(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Perturb without saving: reads x, g; writes x."""
    p = problem(setting.device, dtype)
    grads = p.tensors(1)

    def contender(name: str, run: Callable[..., object]) -> Contender:
        x = p.tensors(0)
        return _contender(name, lambda: run(x, grads, alpha=ALPHA), x)

    ours = functools.partial(kernels.perturb, backups=None, save=False, backend=setting.backend)
    theirs = contender("foreach", torch_sgd.perturb_unsaved)
    return _comparison(p, contender("eigenfilter", ours), theirs, 3)


def perturb_hvp(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Perturb along a finite difference: reads b, g, g0; writes x."""
    p = problem(setting.device, dtype)
    inputs = [p.tensors(i) for i in (1, 2, 3)]

    def contender(name: str, run: Callable[..., object]) -> Contender:
        x = p.tensors(0)
        return _contender(name, lambda: run(x, *inputs, alpha=ALPHA, eps=EPS), x)

    ours = functools.partial(kernels.perturb_hvp, backend=setting.backend)
    theirs = contender("foreach", torch_sgd.perturb_hvp)
    return _comparison(p, contender("eigenfilter", ours), theirs, 4)


def sgd_step(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Restore and step with momentum: reads b, g, m; writes x, m."""
    p = problem(setting.device, dtype)
    grads, backups = p.tensors(1), p.tensors(2)

    def contender(name: str, run: Callable[..., object]) -> Contender:
        x, m = p.tensors(0), p.tensors(3)
        step = functools.partial(run, x, grads, m, backups, lr=LR, momentum=MOMENTUM)
        return _contender(name, step, [*x, *m])

    ours = functools.partial(kernels.sgd_step, backend=setting.backend)
    return _comparison(
        p, contender("eigenfilter", ours), contender("foreach", torch_sgd.sgd_step), 5
    )


def adamw_step(setting: Setting, dtype: torch.dtype) -> Comparison:
    """AdamW's step: reads x, g, m, v; writes x, m, v."""
    p = problem(setting.device, dtype)
    grads = p.tensors(1)

    def contender(name: str, run: Callable[..., object]) -> Contender:
        x, m, v = p.tensors(0), p.tensors(2), [1 + t.square() for t in p.tensors(3)]
        return _contender(name, lambda: run(x, grads, m, v, step=10, **ADAMW), [*x, *m, *v])

    ours = functools.partial(kernels.adamw_step, backend=setting.backend)
    theirs = contender("fused", torch_adamw.adamw_step)
    return _comparison(p, contender("eigenfilter", ours), theirs, 7)


def norm(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Euclidean norm of all elements: reads each once."""
    p = problem(setting.device, dtype)
    tensors = p.tensors(1)
    ours = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=p.device)
    theirs = ours.clone()
    return _comparison(
        p,
        _contender(
            "eigenfilter",
            lambda: kernels.norm(tensors, out=ours, backend=setting.backend),
            [ours],
        ),
        _contender(
            "get_total_norm", lambda: theirs.copy_(torch.nn.utils.get_total_norm(tensors)), [theirs]
        ),
        1,
        NORM_TOLERANCES,
    )


def flag_nonfinite(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Flag for non-finite elements: reads all of them, since only the last one is infinite.

    GradScaler's check also writes, as it unscales, here by one.
    """
    p = problem(setting.device, dtype)
    tensors = p.tensors(1)
    tensors[-1][-1] = float("inf")
    copies = [t.clone() for t in tensors]
    ours = torch.zeros(1, device=p.device)
    theirs, one = torch.zeros(1, device=p.device), torch.ones(1, device=p.device)
    check = functools.partial(torch._amp_foreach_non_finite_check_and_unscale_, copies, theirs, one)
    return _comparison(
        p,
        _contender(
            "eigenfilter",
            lambda: kernels.flag_nonfinite(tensors, ours, backend=setting.backend),
            [ours],
        ),
        _contender("GradScaler", check, [theirs]),
        1,
    )


ROWS, COLUMNS = 60, 1_900_000


def accesses_to_a_basis(device: torch.device, passes: int) -> int:
    """How often `orthogonalize` reads its basis.

    A pass takes inner products and then subtracts. On a CPU the subtraction and the next pass's
    inner products share a stretch of the basis while it is in the cache. On a GPU they are two
    kernels, and each reads all of it.
    """
    return passes + 1 if device.type == "cpu" else 2 * passes


def orthogonalize(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Two passes of Gram-Schmidt against 60 vectors, in `dtype` for the library.

    torch's contender has the vectors in float32.
    """
    shape, device = (ROWS, COLUMNS), setting.device
    random = torch.Generator(device).manual_seed(0)
    # The rows of the basis are nearly orthonormal.
    basis = torch.randn(shape, generator=random, device=device) / COLUMNS**0.5
    start = torch.randn(COLUMNS, generator=random, device=device)
    basis = basis.to(dtype)
    wide = basis.float()

    def contender(name: str, run: Callable[[Tensor], object]) -> Contender:
        w = start.clone()
        phase = Phase(lambda: w.copy_(start), lambda: run(w))
        return Contender(name, (phase,), lambda: [w])

    def two_passes(w: Tensor) -> None:
        for _ in range(2):
            torch.addmv(w, wide.T, wide @ w, alpha=-1, out=w)
        torch.linalg.vector_norm(w)

    ours = contender(
        "eigenfilter", lambda w: kernels.orthogonalize(w, basis, backend=setting.backend)
    )
    traffic = accesses_to_a_basis(device, passes=2) * ROWS * COLUMNS * dtype.itemsize
    reference = copy_reference(ROWS * COLUMNS, dtype, device, traffic)
    peers = (contender("torch", two_passes),)
    return Comparison(ours, peers, (reference,), ORTHOGONALIZE_TOLERANCE, traffic, "device")


def _contender(name: str, run: Callable[[], object], result: list[Tensor]) -> Contender:
    return Contender(name, (Phase(do_nothing, run),), lambda: result)


def _comparison(
    p: TensorProblem,
    library: Contender,
    peer: Contender,
    accesses: int,
    tolerances: Mapping[torch.dtype, Tolerance] = TOLERANCES,
) -> Comparison:
    traffic = p.traffic(accesses)
    reference = copy_reference(p.elements, p.dtype, p.device, traffic)
    return Comparison(library, (peer,), (reference,), tolerances[p.dtype], traffic, "device")


KERNELS = {
    build.__name__: build
    for build in (
        perturb,
        perturb_unsaved,
        perturb_hvp,
        sgd_step,
        adamw_step,
        norm,
        flag_nonfinite,
    )
}

BENCHMARKS = tuple(
    Benchmark(
        f"{name}-{str(dtype).removeprefix('torch.')}",
        f"kernel `{name}`, {dtype}, 4 large tensors",
        functools.partial(build, dtype=dtype),
        {"cuda": (Goal("copy", 0.9),)},
    )
    for name, build in KERNELS.items()
    for dtype in TOLERANCES
) + tuple(
    Benchmark(
        f"orthogonalize-{str(dtype).removeprefix('torch.')}",
        f"kernel `orthogonalize`, two passes against {ROWS} vectors, 1.9 million elements, {dtype}",
        functools.partial(orthogonalize, dtype=dtype),
        {"cpu": (Goal("torch", 3.0),), "cuda": (Goal("torch", 3.0),)},
    )
    for dtype in (torch.float32, torch.float16)
)
