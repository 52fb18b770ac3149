"""release_gradients: ascents that backward takes, gradient by gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import eigenfilter as ef
from cases import RHO, same_bits
from eigenfilter.optimizers import in_backward
from optimizers.problems import (
    METHODS,
    SETTINGS,
    closure_of,
    loss_of,
    parameters,
    snapshot,
    state_of,
)

HEAVY = SETTINGS["heavy ball"]
SECOND = "a second gradient arrived"
MAKE: dict[str, Callable[..., Any]] = {
    "usam": METHODS["usam"].make,
    "sequential": METHODS["sequential"].make,
    "anchored": METHODS["anchored"].make,
    "adamw": lambda params, **kw: ef.AdamW(params, lr=0.05, rho=0.2, method="usam", **kw),
}
methods = pytest.mark.parametrize("name", MAKE)


@pytest.fixture(params=[0, None], ids=["each alone", "batches"], autouse=True)
def batch_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Whether every gradient is a batch of its own; None for the usual size."""
    if request.param is not None:
        monkeypatch.setattr(in_backward, "BATCH_BYTES", request.param)
    size: int | None = request.param
    return size


def make(name: str, params: Any, **kw: Any) -> Any:
    return MAKE[name](params, **({} if name == "adamw" else HEAVY), **kw)


def backward(opt: Any, loss: Callable[[], Tensor]) -> None:
    """Take the gradient of one phase of a step in its explicit form."""
    with opt.evaluation():
        loss().backward()


def same_in_both_forms(name: str, run: Callable[[Any, Sequence[Any]], None], **kw: Any) -> None:
    """The parameters and the state are the same, bit for bit, with released gradients."""
    runs = []
    for release in (False, True):
        params = parameters()
        opt = make(name, params, release_gradients=release, **kw)
        run(opt, params)
        assert not opt.perturbed
        runs.append([*params, *state_of(opt, params)])
    assert all(map(same_bits, *runs))


class Recorder(torch.autograd.Function):
    """The identity, whose backward calls a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.call()
        return g, None


# The steps are those of whole gradients.


class Network(nn.Module):
    """Convolutions, a norm, a weight that is used twice, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.inner = nn.Linear(12, 12)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh().flatten(1)
        x = nn.functional.dropout(self.inner(x).tanh(), 0.2)
        x = self.inner(x).tanh() * self.inner.bias
        out: Tensor = self.last(x) @ self.last.weight
        return out


@methods
def test_a_network_over_many_steps(name: str) -> None:
    runs = []
    for release in (False, True):
        torch.manual_seed(3)
        model = Network()
        params = list(model.parameters())
        opt = make(name, params, release_gradients=release)
        losses = []
        for _ in range(25):
            x = torch.randn(5, 1, 4, 4)

            def closure(opt: Any = opt, model: nn.Module = model, x: Tensor = x) -> Tensor:
                opt.zero_grad()
                loss = (model(x) - 1).square().mean()
                loss.backward()
                return loss

            losses.append(opt.step(closure))
        assert losses[-1] < losses[0]
        runs.append([*losses, *params, *state_of(opt, params)])
    assert all(map(same_bits, *runs))


@methods
def test_groups_whose_radius_is_zero(name: str) -> None:
    runs = []
    for release in (False, True):
        params = parameters()
        groups = [{"params": params[:1] + params[3:4]}, {"params": params[1:3] + params[4:]}]
        groups[0]["rho"] = 0.0
        opt = make(name, groups, release_gradients=release)
        closure = closure_of(opt, params)
        for _ in range(4):
            opt.step(closure)
        assert closure.calls == 4 * (3 if name in ("sequential", "anchored") else 2)
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("comes", ["first", "last"])
def test_a_gradient_that_takes_no_ascent_is_dropped_too(comes: str) -> None:
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    idle, ascending = (last, first) if comes == "first" else (first, last)
    groups = [{"params": idle.parameters(), "rho": 0.0}, {"params": ascending.parameters()}]
    opt = ef.USAM(groups, lr=0.1, rho=0.1, release_gradients=True)
    backward(opt, lambda: last(first(torch.ones(2, 3))).square().sum())
    assert all(p.grad is None for p in (*first.parameters(), *last.parameters()))
    assert opt.ascend()


@methods
def test_parameters_without_a_gradient(name: str) -> None:
    """They count as those whose gradient is zero, in every evaluation another one."""

    def run(opt: Any, params: Sequence[Any]) -> None:
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            opt.zero_grad()
            inputs = [p.detach() if i == calls % 6 else p for i, p in enumerate(params)]
            loss = loss_of(inputs)
            loss.backward()
            return loss

        for _ in range(7):
            opt.step(closure)

    same_in_both_forms(name, run)


@methods
def test_gradients_accumulated_before_the_evaluation(name: str) -> None:
    """One parameter has a gradient from the earlier micro-batches alone."""

    def run(opt: Any, params: Sequence[Any]) -> None:
        for _ in range(3):
            while True:
                opt.zero_grad()
                loss_of(params).backward()
                rest = [*params[:3], params[3].detach(), *params[4:]]
                backward(opt, lambda rest=rest: 2 * loss_of(rest))  # type: ignore[misc]
                if not opt.ascend():
                    break
            opt.step()

    same_in_both_forms(name, run)


@methods
def test_a_loss_that_is_not_finite(name: str) -> None:
    def run(opt: Any, params: Sequence[Any]) -> None:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = loss_of(params) * float("nan")
            loss.backward()
            return loss

        opt.step(closure_of(opt, params))
        opt.step(closure)

    same_in_both_forms(name, run)


@methods
def test_after_a_change_of_memory_format(name: str) -> None:
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 3, 2))
        opt = make(name, model.parameters(), release_gradients=release)

        def closure(model: nn.Module = model, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        opt.step(closure)
        model.to(memory_format=torch.channels_last)
        opt.step(closure)
        opt.step(closure)
        runs.append(snapshot(list(model.parameters())))
    assert all(map(same_bits, *runs))


def test_a_norm_needs_the_whole_gradient() -> None:
    """SAM's ascent waits for `ascend`; its descent alone is released."""
    params = parameters()
    opt = ef.SAM(params, **HEAVY, rho=RHO, release_gradients=True)
    before = snapshot(params)
    backward(opt, lambda: loss_of(params))
    assert all(map(same_bits, params, before))
    assert all(p.grad is not None for p in params)
    assert opt.ascend()


# What backward does, and what `ascend` adds.


@methods
def test_backward_itself_perturbs(name: str, batch_bytes: int | None) -> None:
    """The first ascent, while it goes on; `ascend` ends it. What tells of it is up to date.

    The last bias has the smallest gradient, which waits.
    """
    torch.manual_seed(0)
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    params = [*first.parameters(), *last.parameters()]
    opt = make(name, params, release_gradients=True)
    before = snapshot(params)
    versions = [p._version for p in params]
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        unchanged = [same_bits(p, x) for p, x in zip(params, before, strict=True)]
        assert all(unchanged[:2])
        assert unchanged[3]
        seen.append((not unchanged[2], opt.perturbed))

    with opt.evaluation():
        last(Recorder.apply(first(torch.ones(2, 3)), look)).square().sum().backward()
    assert seen == [(batch_bytes == 0,) * 2]
    assert not any(map(same_bits, params, before))
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    assert (opt.perturbed, opt.phase) == (True, "ascent")
    with pytest.raises(RuntimeError, match="while the parameters are perturbed"):
        opt.state_dict()
    assert opt.ascend()
    opt.restore()
    assert all(map(same_bits, params, before))
    assert (opt.perturbed, opt.phase) == (False, "ascent")


def test_step_before_ascend_is_refused() -> None:
    params, others = parameters(), parameters()
    opt, other = make("usam", params, release_gradients=True), make("usam", others)
    backward(opt, lambda: loss_of(params))
    with pytest.raises(RuntimeError, match="without ascend"):
        opt.step()
    assert opt.ascend()  # the step can go on
    backward(opt, lambda: loss_of(params))
    opt.step()
    other.step(closure_of(other, others))
    assert all(map(same_bits, params, others))


def test_a_radius_set_to_zero_after_the_ascent_is_refused() -> None:
    params = parameters()
    opt = make("usam", params, release_gradients=True)
    before = snapshot(params)
    backward(opt, lambda: loss_of(params))
    opt.param_groups[0]["rho"] = 0.0
    assert not opt.ascend()
    with pytest.raises(RuntimeError, match="without ascend"):
        opt.step()
    opt.restore()
    assert all(map(same_bits, params, before))


def test_gradients_outside_an_evaluation_are_whole_with_a_warning() -> None:
    params, others = parameters(), parameters()
    opt, other = make("usam", params, release_gradients=True), make("usam", others)
    loss_of(params).backward()
    with pytest.warns(UserWarning, match="inside `with"):
        assert opt.ascend()
    backward(opt, lambda: loss_of(params))
    opt.step()
    other.step(closure_of(other, others))
    assert all(map(same_bits, params, others))


# A second gradient would be taken at a point that is perturbed in part.

Act = Callable[[Any, Any], None]


def twice_in_a_closure(opt: Any, params: Any) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss_of(params).backward()
        loss = loss_of(params)
        loss.backward()
        return loss

    opt.step(closure)


def the_graph_again(opt: Any, params: Any) -> None:
    with opt.evaluation():
        loss = loss_of(params)
        loss.backward(retain_graph=True)
        loss.backward()


def in_a_second_evaluation(opt: Any, params: Any) -> None:
    backward(opt, lambda: loss_of(params))
    backward(opt, lambda: loss_of(params))


def after_the_evaluation(opt: Any, params: Any) -> None:
    backward(opt, lambda: loss_of(params))
    loss_of(params).backward()
    opt.ascend()


def of_other_parameters(opt: Any, params: Any) -> None:
    with opt.evaluation():
        params[3].square().sum().backward()
        (params[4] * params[3].detach().sum()).square().sum().backward()


def of_others_after_the_evaluation(opt: Any, params: Any) -> None:
    backward(opt, lambda: params[3].square().sum())
    (params[4] * params[3].detach().sum()).square().sum().backward()
    opt.ascend()


def to_a_gradient_that_is_left(opt: Any, params: Any) -> None:
    params[4].square().sum().backward()
    backward(opt, lambda: params[3].square().sum())
    (params[4] * params[3].detach().sum()).square().sum().backward()
    opt.ascend()


def caught_by_the_closure(opt: Any, params: Any) -> None:
    with opt.evaluation():
        loss_of(params).backward()
        with pytest.raises(RuntimeError, match=SECOND):
            loss_of(params).backward()


SECONDS = [
    twice_in_a_closure,
    the_graph_again,
    in_a_second_evaluation,
    after_the_evaluation,
    of_other_parameters,
    of_others_after_the_evaluation,
    to_a_gradient_that_is_left,
    caught_by_the_closure,
]


@pytest.mark.parametrize("act", SECONDS)
@methods
def test_a_second_gradient_is_refused(name: str, act: Act) -> None:
    params = parameters()
    opt = make(name, params, release_gradients=True)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match=SECOND):
        act(opt, params)
    assert not opt.perturbed
    assert all(map(same_bits, params, before))
    opt.zero_grad()
    others = parameters()
    other = make(name, others)
    for o, some in ((opt, params), (other, others)):  # and nothing of it is left
        o.step(closure_of(o, some))
    assert all(map(same_bits, params, others))


def test_a_scaler_is_refused_after_the_ascent_too() -> None:
    params = parameters(torch.float32)
    before = snapshot(params)
    opt = make("usam", params, release_gradients=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backward(opt, lambda: scaler.scale(loss_of(params)))
    with pytest.raises(RuntimeError, match="GradScaler"):
        opt.ascend(grad_scaler=scaler)
    assert not opt.perturbed
    assert all(map(same_bits, params, before))


# Uses of a parameter that backward comes to after its gradient.


def shared_segments(model: nn.Module, x: Tensor, use_reentrant: bool) -> Tensor:
    for _ in range(3):
        x = checkpoint(model, x, use_reentrant=use_reentrant).tanh()
    return x


def test_checkpointed_segments_that_share_parameters() -> None:
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 4).double()
        opt = make("sequential", model.parameters(), release_gradients=release)

        def closure(model: nn.Module = model, opt: Any = opt) -> Tensor:
            opt.zero_grad()
            x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
            loss = shared_segments(model, x, False).square().sum()
            loss.backward()
            return loss

        for _ in range(4):
            opt.step(closure)
        runs.append(snapshot(list(model.parameters())))
    assert all(map(same_bits, *runs))


def test_reentrant_segments_that_share_parameters_are_refused() -> None:
    """Each of their passes completes a gradient of its own."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    opt = make("usam", model.parameters(), release_gradients=True)
    before = snapshot(list(model.parameters()))
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="need use_reentrant=False"):
        backward(opt, lambda: shared_segments(model, x, True).square().sum())
    assert not opt.perturbed
    assert all(map(same_bits, model.parameters(), before))


def test_a_detached_use_that_comes_later_is_noticed(batch_bytes: int | None) -> None:
    """Backward still needs the weight for its input: autograd raises, or the weight waits."""
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        first, last = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        params = [first.weight, *last.parameters()]
        opt = make("usam", params, release_gradients=release)
        before = snapshot(params)

        def closure(opt: Any = opt, first: nn.Module = first, last: nn.Linear = last) -> Tensor:
            opt.zero_grad()
            y = first(torch.ones(2, 3)) @ last.weight.detach()
            loss = (y @ last.weight + last.bias).square().sum()
            loss.backward()
            return loss

        if release and batch_bytes == 0:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                opt.step(closure)
            assert not opt.perturbed
            assert all(map(same_bits, params, before))
            return
        opt.step(closure)
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("name", ["sequential", "anchored"])
def test_a_backward_that_fails(name: str, fails_at: int) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    params = [*first.parameters(), *last.parameters()]
    opt = make(name, params, release_gradients=True)
    before, calls = snapshot(params), 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise ArithmeticError("backward")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = last(Recorder.apply(first(torch.ones(2, 3)), fail)).square().sum()
        loss.backward()
        return loss

    with pytest.raises(ArithmeticError):
        opt.step(closure)
    assert not opt.perturbed
    at_x = params if fails_at < 3 else params[:2]  # the descent's updates stay
    assert all(map(same_bits, at_x, before))
    assert all(p.grad is None for p in params)
    opt.step(closure)
    assert not any(map(same_bits, params, before))


def test_an_explicit_evaluation_that_fails() -> None:
    params = parameters()
    opt = make("usam", params, release_gradients=True)
    before = snapshot(params)

    def loss() -> Tensor:
        loss_of(params).backward()
        raise ArithmeticError("after backward")

    with pytest.raises(ArithmeticError):
        backward(opt, loss)
    assert not opt.perturbed
    assert all(map(same_bits, params, before))
    assert not opt.ascend()


def test_an_error_before_backward_keeps_accumulated_gradients() -> None:
    params = parameters()
    opt = make("usam", params, release_gradients=True)
    loss_of(params).backward()
    with pytest.raises(ArithmeticError), opt.evaluation():
        raise ArithmeticError("before backward")
    assert all(p.grad is not None for p in params)


def clip(params: Sequence[Any]) -> None:
    nn.utils.clip_grad_norm_(params, 0.01)


def clip_by_1(params: Sequence[Any]) -> None:
    nn.utils.clip_grad_norm_(params, 1e9)


def scale(params: Sequence[Any]) -> None:
    for p in params:
        p.grad = None if p.grad is None else 0.5 * p.grad


def each(change: Callable[[Tensor], Any]) -> Callable[[Sequence[Any]], None]:
    def change_all(params: Sequence[Any]) -> None:
        for g in (p.grad for p in params if p.grad is not None):
            change(g)

    return change_all


def set_data(g: Tensor) -> None:
    g.data = 0.5 * g.data


CHANGES = {
    "clip": clip,
    "clip by 1": clip_by_1,
    "scale": scale,
    "data": each(lambda g: g.data.mul_(0.5)),
    "new data": each(set_data),
    "numpy": each(lambda g: g.numpy().fill(3)),
}


@pytest.mark.parametrize("change", CHANGES)
@methods
def test_changed_gradients_are_refused(name: str, change: str) -> None:
    """One gradient always waits, so that the closure finds one to change."""
    params = parameters()
    opt = make(name, params, release_gradients=True)
    before = snapshot(params)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(params)
        loss.backward()
        CHANGES[change](params)
        return loss

    with pytest.raises(RuntimeError, match="changed after backward, as by clipping"):
        opt.step(closure)
    assert all(map(same_bits, params, before))
    assert not opt.perturbed


@methods
def test_gradients_that_the_closure_clears_after_backward(name: str) -> None:
    """They have been used, or are about to be."""
    runs = []
    for clears in (False, True):
        params = parameters()
        opt = make(name, params, release_gradients=True)

        def closure(opt: Any = opt, params: Any = params, clears: bool = clears) -> Tensor:
            loss = loss_of(params)
            loss.backward()
            if clears:
                opt.zero_grad()
            return loss

        for _ in range(3):
            opt.step(closure)
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))


def test_a_bad_hyperparameter_comes_before_the_first_write() -> None:
    params = parameters()
    opt = make("usam", params, release_gradients=True)
    before = snapshot(params)
    opt.param_groups[0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho must be at least 0"):
        backward(opt, lambda: loss_of(params))
    assert all(map(same_bits, params, before))


def test_gradients_in_an_order_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of ever other parameters: what is kept of them stays bounded."""
    monkeypatch.setattr(in_backward, "BATCH_BYTES", 24)
    runs = []
    for release in (False, True):
        params = [nn.Parameter(torch.full((3,), 0.1 * i)) for i in range(5)]
        opt = make("usam", params, release_gradients=release)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            order = torch.randperm(5, generator=generator).tolist()

            def loss(order: list[int] = order, params: list[nn.Parameter] = params) -> Tensor:
                terms = torch.zeros(())
                for i in order:
                    terms = (terms + (i + 1) * params[i].square().sum()).sin()
                return terms

            def closure(opt: Any = opt, loss: Callable[[], Tensor] = loss) -> Tensor:
                opt.zero_grad()
                value = loss()
                value.backward()
                return value

            opt.step(closure)
        held = sum(map(len, opt._release.batches()._kept))
        assert held <= 9 * len(params) if release else held == 0
        runs.append(snapshot(params))
    assert all(map(same_bits, *runs))
