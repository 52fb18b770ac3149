"""sgd_step against exact arithmetic, with every combination of lists and options.

x <- b; d = +-g / grad_scale + wd x; m <- beta m + (1 - dampening) d; x <- x - lr m (or d + beta m).
With an extrapolation e last x <- x - e (m - m before).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import DESCENTS, SCALE, Arena, Descent, KernelBackend, same_bits
from eigenfilter import kernels
from tolerances import Exact, assert_near, exact

X, G, M, B = range(4)


def arena_for(case: Descent, backend: KernelBackend, dtype: torch.dtype) -> Arena:
    """Lists x, g, m, b; with backups x is NaN, as it must not be read."""
    arena = Arena(dtype, 4, device=backend.device)
    arena.fill(G, M, B if case.backups else X)
    return arena


def call(case: Descent, arena: Arena, backend: KernelBackend, **flags: Tensor) -> None:
    params, grads, momenta, backups = arena.lists
    kernels.sgd_step(
        params,
        grads,
        momenta if case.momentum != "none" else None,
        backups if case.backups else None,
        **case.options(),
        **flags,
        backend=backend.name,
    )
    arena.assert_margins_untouched()


def rule(
    x: Exact, g: Exact, m: Exact, S: float, options: dict[str, Any], stored: Exact
) -> tuple[Exact, Exact]:
    """The new x and m, from terms; with all terms positive, the sum of their sizes.

    An extrapolation starts from the new m as it is `stored`.
    """
    beta, lr = np.longdouble(options["momentum"]), np.longdouble(options["lr"])
    d = S * g + np.longdouble(options["weight_decay"]) * x
    if beta == 0:
        return x - lr * d, m
    before, m = m, beta * m + (1 - np.longdouble(options["dampening"])) * d
    x = x - lr * (d + beta * m if options["nesterov"] else m)
    e = np.longdouble(options.get("extrapolation", 0.0))
    return x - e * stored + abs(e) * before, m


def expected(
    case: Descent, before: list[Tensor], stored: Tensor, scale: float
) -> tuple[tuple[Exact, Exact], tuple[Exact, Exact]]:
    """(x, sizes of its terms) and (m, sizes of its terms) after the call that stored an m."""
    options = case.options()
    x, g, m = exact(before[B if case.backups else X]), exact(before[G]), exact(before[M])
    S = np.longdouble(1) / np.longdouble(np.float32(scale))
    new_x, new_m = rule(x, g, m, -S if case.maximize else S, options, exact(stored))
    sizes = options | {"lr": -options["lr"], "extrapolation": -options.get("extrapolation", 0.0)}
    terms_x, terms_m = rule(np.abs(x), np.abs(g), np.abs(m), S, sizes, np.abs(exact(stored)))
    return (new_x, terms_x), (new_m, terms_m)


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("case", DESCENTS, ids=str)
def test_sgd_step(
    backend: KernelBackend, dtype: torch.dtype, case: Descent, scale: float | None
) -> None:
    arena = arena_for(case, backend, dtype)
    before = [arena.values(i) for i in (X, G, M, B)]
    flags = {} if scale is None else {"grad_scale": torch.tensor(scale, device=backend.device)}
    call(case, arena, backend, **flags)
    x, m = expected(case, before, arena.values(M), scale or 1.0)
    assert_near(arena.values(X), *x)
    assert_near(arena.values(M), *m)
    assert same_bits(arena.values(G), before[G])
    assert same_bits(arena.values(B), before[B])


@pytest.mark.parametrize("flag", [0.0, 1.0])
@pytest.mark.parametrize("case", DESCENTS[::3], ids=str)
def test_found_inf_restores_x_and_keeps_m(
    backend: KernelBackend, dtype: torch.dtype, case: Descent, flag: float
) -> None:
    arena = arena_for(case, backend, dtype)
    before = [arena.values(i) for i in (X, G, M, B)]
    call(case, arena, backend, found_inf=torch.tensor([flag], device=backend.device))
    stopped = same_bits(arena.values(X), before[B if case.backups else X])
    assert stopped == bool(flag)
    if flag:
        assert same_bits(arena.values(M), before[M])
    else:
        x, _ = expected(case, before, arena.values(M), 1.0)
        assert_near(arena.values(X), *x)


def test_no_decay_is_no_multiplication_by_zero(backend: KernelBackend, dtype: torch.dtype) -> None:
    x = torch.full((33,), torch.inf, dtype=dtype, device=backend.device)
    kernels.sgd_step([x], [torch.ones_like(x)], lr=0.3, backend=backend.name)
    assert x.isposinf().all()
