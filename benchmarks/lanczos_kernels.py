"""The kernels of the Lanczos iteration on a few long vectors, beside torch's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.comparison import (
    Benchmark,
    Comparison,
    Contender,
    Goal,
    Phase,
    Setting,
    Tolerance,
    copy_reference,
)
from eigenfilter import kernels

COLUMNS = 1_900_000
BETA = 0.3

# Elements are of size 7e-4; peers sum 1.9 million products in float32.
TOLERANCE = Tolerance(rtol=1e-4, atol=1e-7)


def unit_vectors(setting: Setting, rows: int, seed: int) -> Tensor:
    """Vectors of length one, nearly orthogonal to each other."""
    random = torch.Generator(setting.device).manual_seed(seed)
    vectors = torch.randn(rows, COLUMNS, generator=random, device=setting.device)
    unit: Tensor = vectors / vectors.norm(dim=1, keepdim=True)
    return unit


def lanczos_step(setting: Setting, rows: int) -> Comparison:
    """A step of the Lanczos recurrence after the product: alpha, the next vector, its length.

    The library reads 2 vectors, then 3, and writes one. That one is normalized except for a factor
    that the next step takes into account. One of torch's contenders sums in float64, as the library
    does, the other in float32.
    """
    q, before, rest = (unit_vectors(setting, rows, seed) for seed in range(3))
    before -= (before.double() * q).sum(1, keepdim=True).float() * q
    product = 0.7 * q + BETA * before + 0.5 * rest
    beta = torch.full((rows,), BETA, dtype=torch.float64, device=setting.device)

    def contender(name: str, target: Tensor, run: Callable[[Tensor], list[Tensor]]) -> Contender:
        work = target.clone()
        results: list[Tensor] = []

        def step() -> None:
            results[:] = run(work)

        def result() -> list[Tensor]:
            alpha, length = results
            return [work.double() / work.double().norm(dim=1, keepdim=True), alpha, length]

        return Contender(name, (Phase(lambda: work.copy_(target), step),), result)

    def ours(u: Tensor) -> list[Tensor]:
        alpha, squares = kernels.row_dots(q, product, backend=setting.backend)
        size = (squares - alpha**2 - beta**2).sqrt()
        factors = torch.stack([torch.ones_like(size), -alpha, -beta]) / size
        squares, _ = kernels.lanczos_step(u, q, product, factors, backend=setting.backend)
        return [alpha, size * squares.sqrt()]

    def theirs(w: Tensor, dtype: torch.dtype) -> list[Tensor]:
        w.addcmul_(before, beta[:, None].float(), value=-1)
        alpha = torch.linalg.vecdot(q.to(dtype), w.to(dtype))
        w.addcmul_(q, alpha[:, None].float(), value=-1)
        length = torch.linalg.vector_norm(w.to(dtype), dim=1)
        w.div_(length[:, None].float())
        return [alpha.double(), length.double()]

    peers = (
        contender("torch", product, functools.partial(theirs, dtype=torch.float64)),
        contender("torch-float32", product, functools.partial(theirs, dtype=torch.float32)),
    )
    traffic = 6 * product.nbytes
    reference = copy_reference(product.numel(), product.dtype, setting.device, traffic)
    library = contender("eigenfilter", before, ours)
    return Comparison(library, peers, (reference,), TOLERANCE, traffic, "device")


def cholesky_qr(setting: Setting, rows: int) -> Comparison:
    """Orthonormalize a block of vectors, in two passes that read it twice and write it once.

    torch's contenders are its QR, and two passes of Cholesky-QR in float32. The latter fails if the
    condition number of the block is above a thousand.
    """
    start = unit_vectors(setting, rows, 0)

    def contender(name: str, run: Callable[[Tensor], object]) -> Contender:
        v = start.clone()
        phase = Phase(lambda: v.copy_(start), lambda: run(v))
        return Contender(name, (phase,), lambda: [v])

    def householder(v: Tensor) -> None:
        q, r = torch.linalg.qr(v.T)
        v.copy_((q * r.diagonal().sign()).T)

    def cholesky(v: Tensor) -> None:
        for _ in range(2):
            lower = torch.linalg.cholesky(v @ v.T)
            v.copy_(torch.linalg.solve_triangular(lower, v, upper=False))

    ours = functools.partial(kernels.cholesky_qr, backend=setting.backend)
    peers = (contender("torch-qr", householder), contender("torch-cholesky", cholesky))
    traffic = 6 * start.nbytes
    reference = copy_reference(start.numel(), start.dtype, setting.device, traffic)
    library = contender("eigenfilter", ours)
    return Comparison(library, peers, (reference,), TOLERANCE, traffic, "device")


BENCHMARKS = tuple(
    Benchmark(
        f"{build.__name__.replace('_', '-')}-{rows}",
        f"kernel `{build.__name__}`, {rows} vectors of 1.9 million elements in float32",
        functools.partial(build, rows=rows),
        {"cpu": (Goal(against, 3.0),), "cuda": (Goal(against, 3.0),)},
    )
    for build, against in ((lanczos_step, "torch"), (cholesky_qr, "torch-qr"))
    for rows in (4, 8)
)
