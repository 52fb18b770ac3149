"""adamw_step against exact arithmetic and torch.optim.AdamW.

x <- b; d = +-g / grad_scale; m <- beta1 m + (1 - beta1) d; v <- beta2 v + (1 - beta2) d^2;
x <- (1 - lr wd) x - lr u with u = m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps).
With an extrapolation e: - lr u - e (u - u before), from m and v as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import ADAMW_DESCENTS, SCALE, AdamWDescent, Arena, KernelBackend, nonzero, same_bits
from eigenfilter import kernels
from tolerances import ADAMW_AGAINST_TORCH, Exact, adamw_roundings, assert_near, exact

X, G, M, V, B = range(5)


def arena_for(case: AdamWDescent, backend: KernelBackend, dtype: torch.dtype) -> Arena:
    """Lists x, g, m, v, b; with backups x is NaN, as it must not be read."""
    arena = Arena(dtype, 5, device=backend.device)
    arena.fill(G, M, V, B if case.backups else X)
    arena.memory[V].abs_()
    return arena


def call(case: AdamWDescent, arena: Arena, backend: KernelBackend, **flags: Tensor) -> None:
    params, grads, exp_avgs, exp_avg_sqs, backups = arena.lists
    kernels.adamw_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        backups if case.backups else None,
        **case.options(),
        **flags,
        backend=backend.name,
    )
    arena.assert_margins_untouched()


def update_of(m: Exact, v: Exact, step: int, options: dict[str, Any]) -> Exact:
    """The update u that follows from the moments after `step` steps."""
    beta1, beta2, eps = (np.longdouble(options[name]) for name in ("beta1", "beta2", "eps"))
    if step == 0:
        return np.zeros_like(m)
    return m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + eps)


def expected(
    case: AdamWDescent, before: list[Tensor], stored: list[Tensor], scale: float
) -> dict[int, tuple[Exact, Exact]]:
    """(values, sizes of their terms) of x, m and v after the call, which has `stored` m and v."""
    options = case.options()
    lr, beta1, beta2, decay = (
        np.longdouble(options[name]) for name in ("lr", "beta1", "beta2", "weight_decay")
    )
    e = np.longdouble(options.get("extrapolation", 0.0))
    x, g, m, v = (exact(before[i]) for i in (B if case.backups else X, G, M, V))
    d = (-g if case.maximize else g) / np.longdouble(np.float32(scale))
    terms_m = beta1 * np.abs(m) + (1 - beta1) * np.abs(d)
    u_before = update_of(m, v, case.step - 1, options)
    u_stored = update_of(*map(exact, stored), case.step, options)
    m = beta1 * m + (1 - beta1) * d
    v = beta2 * v + (1 - beta2) * d**2
    u, terms_u = (update_of(each, v, case.step, options) for each in (m, terms_m))
    if case.ahead:
        u, terms_u = u_stored, np.abs(u_stored)
    decayed = (1 - lr * decay) * x
    terms_x = np.abs(decayed) + (lr + e) * terms_u + e * np.abs(u_before)
    return {
        X: (decayed - lr * u - e * (u - u_before), terms_x),
        M: (m, terms_m),
        V: (v, v),
    }


def assert_stepped(case: AdamWDescent, arena: Arena, before: list[Tensor], scale: float) -> None:
    options = case.options()
    new = expected(case, before, [arena.values(M), arena.values(V)], scale)
    betas = options["beta1"], options["beta2"]
    roundings = adamw_roundings(before[X].dtype, *betas, case.step, case.ahead)
    assert_near(arena.values(X), *new[X], roundings)
    assert_near(arena.values(M), *new[M])
    assert_near(arena.values(V), *new[V])


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("case", ADAMW_DESCENTS, ids=str)
def test_adamw_step(
    backend: KernelBackend, dtype: torch.dtype, case: AdamWDescent, scale: float | None
) -> None:
    arena = arena_for(case, backend, dtype)
    before = [arena.values(i) for i in (X, G, M, V, B)]
    flags = {} if scale is None else {"grad_scale": torch.tensor(scale, device=backend.device)}
    call(case, arena, backend, **flags)
    assert_stepped(case, arena, before, scale or 1.0)
    assert same_bits(arena.values(G), before[G])
    assert same_bits(arena.values(B), before[B])


@pytest.mark.parametrize("flag", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("case", ADAMW_DESCENTS[1::3], ids=str)
def test_found_inf_restores_x_and_keeps_m_and_v(
    backend: KernelBackend, dtype: torch.dtype, case: AdamWDescent, flag: float
) -> None:
    arena = arena_for(case, backend, dtype)
    before = [arena.values(i) for i in (X, G, M, V, B)]
    call(case, arena, backend, found_inf=torch.tensor([flag], device=backend.device))
    if flag:
        assert same_bits(arena.values(X), before[B if case.backups else X])
        assert same_bits(arena.values(M), before[M])
        assert same_bits(arena.values(V), before[V])
    else:
        assert_stepped(case, arena, before, 1.0)


def test_what_never_had_a_gradient_only_decays(backend: KernelBackend, dtype: torch.dtype) -> None:
    """0 / (0 + eps), with an eps that float16 cannot hold."""
    x = torch.full((33,), 2.0, dtype=dtype, device=backend.device)
    g, m, v = (torch.zeros_like(x) for _ in range(3))
    kernels.adamw_step(
        [x], [g], [m], [v], lr=0.5, eps=1e-30, weight_decay=0.5, step=3, backend=backend.name
    )
    assert torch.equal(x, torch.full_like(x, 1.5))
    assert not m.any()
    assert not v.any()


def test_the_update_before_the_first_step_is_zero(
    backend: KernelBackend, dtype: torch.dtype
) -> None:
    """Without an eps its quotient would be 0 / 0."""
    x, m, v = (torch.zeros(33, dtype=dtype, device=backend.device) for _ in range(3))
    options = {"lr": 0.25, "eps": 0.0, "weight_decay": 0.0, "beta1": 0.5, "beta2": 0.75}
    kernels.adamw_step(
        *([x], [torch.full_like(x, 2.0)], [m], [v]),
        **options,
        extrapolation=0.5,
        step=1,
        backend=backend.name,
    )
    assert torch.equal(x, torch.full_like(x, -0.75))


def test_an_extrapolation_of_0_on_the_device_is_none(
    backend: KernelBackend, dtype: torch.dtype
) -> None:
    """To the bit: lr u is then of the moments before they are rounded."""
    gen = torch.Generator().manual_seed(5)
    lists = [torch.rand(999, generator=gen).to(dtype).to(backend.device) for _ in range(4)]
    results = []
    for e in (0.0, torch.zeros((), dtype=torch.float64, device=backend.device)):
        x, g, m, v = ([t.clone()] for t in lists)
        options = AdamWDescent(False, False, True, False, 9).options()
        kernels.adamw_step(x, g, m, v, **options, extrapolation=e, backend=backend.name)
        results.append(torch.cat([*x, *m, *v]))
    assert same_bits(*results)


@pytest.mark.parametrize("T", [torch.float32, torch.float64], ids=str)
def test_roots_and_quotients_are_rounded_once(backend: KernelBackend, T: torch.dtype) -> None:
    """Of every size, subnormals and infinity among them, as IEEE prescribes.

    Without a gradient, with betas of 1/2 and bias corrections of 1: x = -(m/2) / (sqrt(v/2) + eps).
    """
    integer = {4: np.uint32, 8: np.uint64}[T.itemsize]
    patterns = np.random.default_rng(3).integers(0, np.iinfo(integer).max, (2, 4001), integer)
    real = torch.empty(0, dtype=T).numpy().dtype
    m, v = patterns.view(real)
    m, v = m[~np.isnan(m) & ~np.isnan(v)], np.abs(v[~np.isnan(m) & ~np.isnan(v)])
    half, eps = real.type(0.5), real.type(2.0**-70)
    assert (v < np.finfo(real).tiny).any()
    with np.errstate(all="ignore"):
        quotient = 0 - half * m / (np.sqrt(half * v) + eps)
    x, g = (torch.zeros(m.size, dtype=T, device=backend.device) for _ in range(2))
    first, second = (torch.from_numpy(t.copy()).to(backend.device) for t in (m, v))
    options = {"lr": 1.0, "beta1": 0.5, "beta2": 0.5, "eps": 2.0**-70, "weight_decay": 0.0}
    kernels.adamw_step([x], [g], [first], [second], **options, step=5000, backend=backend.name)
    finite = np.isfinite(quotient)
    assert finite.sum() > 3000
    assert same_bits(x.cpu()[finite], torch.from_numpy(quotient[finite]))
    assert torch.equal(x.cpu().isinf(), torch.from_numpy(np.isinf(quotient)))


@dataclass
class Run:
    """AdamW's state of one tensor; steps are ours or torch's, and go on from each other's."""

    x: Tensor
    options: dict[str, Any]
    m: Tensor = field(init=False)
    v: Tensor = field(init=False)
    taken: int = 0

    def __post_init__(self) -> None:
        self.x = self.x.clone()
        self.m, self.v = torch.zeros_like(self.x), torch.zeros_like(self.x)

    def ours(self, grads: list[Tensor], backend: KernelBackend) -> None:
        for g in grads:
            self.taken += 1
            lists = [self.x], [g], [self.m], [self.v]
            kernels.adamw_step(*lists, **self.options, step=self.taken, backend=backend.name)

    def torchs(self, grads: list[Tensor]) -> None:
        """Take a step with a new optimizer of torch that loads the state."""
        o = self.options
        opt = torch.optim.AdamW(
            [self.x],
            lr=o["lr"],
            betas=(o["beta1"], o["beta2"]),
            eps=o["eps"],
            weight_decay=o["weight_decay"],
            maximize=o["maximize"],
            foreach=False,
        )
        if self.taken > 0:
            step = torch.tensor(float(self.taken))
            state = {0: {"step": step, "exp_avg": self.m, "exp_avg_sq": self.v}}
            opt.load_state_dict(opt.state_dict() | {"state": state})
        for g in grads:
            self.x.grad = g
            opt.step()
        self.taken += len(grads)
        self.m, self.v = (opt.state[self.x][name] for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("T", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_runs_are_torchs(backend: KernelBackend, T: torch.dtype, maximize: bool) -> None:
    """Runs agree also where one optimizer continues from the other's state."""
    steps, allowed = 6, ADAMW_AGAINST_TORCH[T]
    start = nonzero((1000,), T).to(backend.device)
    grads = [nonzero((1000,), T).to(backend.device) for _ in range(steps)]
    options = AdamWDescent(False, False, True, maximize, 1).options() | {"lr": 0.0113}
    del options["step"]
    runs = [Run(start, options) for _ in range(4)]
    runs[0].torchs(grads)
    runs[1].ours(grads, backend)
    runs[2].ours(grads[:3], backend)
    runs[2].torchs(grads[3:])
    runs[3].torchs(grads[:3])
    runs[3].ours(grads[3:], backend)
    assert (runs[0].x - start).abs().mean() > 1e-2
    for run in runs[1:]:
        assert run.taken == steps
        largest = torch.maximum(start.abs(), run.x.abs())
        assert ((run.x - runs[0].x).abs() <= steps * allowed * largest).all()
        assert ((run.m - runs[0].m).abs() <= steps * allowed * 2).all()
        assert ((run.v - runs[0].v).abs() <= steps * allowed * run.v).all()
