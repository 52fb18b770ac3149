"""Accelerate's loops against steps written out in plain tensors."""

from __future__ import annotations

import copy
import functools
import itertools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigenfilter as ef
from eigenfilter.schedulers import RhoScheduler
from integrations.by_hand import sam_steps
from pages import ROOT, run_page
from plain_usam import MeanLoss
from run_distributed import RunDistributed

from integrations.accelerate_state import (  # isort: skip: skips the tests without it
    fresh_state,
    launched,
    reset_state,
    with_scaler,
)

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from eigenfilter.integrations.accelerate import SharpnessAwareBackward, optimizer_of

__all__ = ["fresh_state"]

BATCHES = 7  # of 3 samples: not a multiple of 4
LR, MOMENTUM, RHO = 0.3, 0.8, 0.2
MAX_NORM = 2.4  # clips some of the steps
Sam = {"lr": LR, "momentum": MOMENTUM, "rho": RHO}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def data() -> TensorDataset:
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(3 * BATCHES, 4, generator=gen, dtype=torch.float64)
    return TensorDataset(x, 2 * torch.sin(x[:, :2]) + 1)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def make_accelerator(accumulation: int = 1, **options: Any) -> Any:
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)


def train(
    accelerator: Any, model: nn.Module, opt: Any, epochs: int = 2, max_norm: float = 0.0
) -> tuple[list[float], list[float]]:
    """Train as the documentation says; return the losses and the norms before clipping."""
    loader = DataLoader(data(), batch_size=3)
    model, opt, loader = accelerator.prepare(model, opt, loader)
    backward = SharpnessAwareBackward(accelerator, model, opt)
    losses, norms = [], []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses.append(float(backward(functools.partial(loss_of, model), batch)))
                if accelerator.sync_gradients and max_norm:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))
                opt.step()
                opt.zero_grad()
    return losses, norms


def windows(accumulation: int) -> list[list[tuple[Tensor, ...]]]:
    """The micro-batches of each step of an epoch."""
    batches = list(DataLoader(data(), batch_size=3))
    return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]


def losses_by_hand(model: nn.Module, accumulation: int, epochs: int = 2) -> list[Any]:
    def total(window: list[Any]) -> Tensor:
        # Accelerate divides by the number of accumulation steps, in an incomplete window too.
        return torch.stack([loss_of(model, batch) / accumulation for batch in window]).sum()

    return [functools.partial(total, window) for window in windows(accumulation)] * epochs


def assert_same(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-12} | tolerance
    for (name, t), expected in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(t, expected, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("normalized", [False, True], ids=["usam", "sam"])
@pytest.mark.parametrize("max_norm", [0.0, MAX_NORM])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loop_is_the_method(accumulation: int, max_norm: float, normalized: bool) -> None:
    model = network()
    twin = copy.deepcopy(model)
    make = ef.SAM if normalized else ef.USAM
    accelerator = make_accelerator(accumulation)
    losses, norms = train(accelerator, model, make(model.parameters(), **Sam), max_norm=max_norm)
    values, norms_by_hand = sam_steps(
        list(twin.parameters()),
        losses_by_hand(twin, accumulation),
        **Sam,
        max_norm=max_norm,
        normalized=normalized,
    )
    assert_same(model, twin)
    if max_norm:
        assert norms == pytest.approx(norms_by_hand, rel=1e-10)
        assert min(norms) < max_norm < max(norms)  # some are clipped, some are not
    if accumulation == 1:
        assert losses == pytest.approx(values, rel=1e-10)


class Awkward(nn.Module):
    """Running statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


METHODS: dict[str, Callable[..., Any]] = {
    "two_step_usam": functools.partial(ef.TwoStepUSAM, lr=0.1, rho=0.1),
    "hessian_usam": functools.partial(ef.HessianUSAM, lr=0.1, rho=0.1, fd_step=1e-5),
    "product": functools.partial(ef.HessianUSAM, lr=0.1, rho=0.1, hvp="autograd"),
    "adamw": functools.partial(ef.AdamW, lr=0.01, method="sam", rho=0.1),
    "wrapped": lambda params: ef.SharpnessAware(torch.optim.AdamW(params, lr=0.01), "sam", 0.1),
    "no ascents": functools.partial(ef.USAM, lr=0.1, rho=0.0),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("method", METHODS)
def test_a_window_is_one_closure(method: str) -> None:
    """With running statistics and dropout, whose masks differ between the evaluations."""
    model = Awkward()
    twin = copy.deepcopy(model)
    torch.manual_seed(6)
    train(make_accelerator(4), model, METHODS[method](model.parameters()))
    opt = METHODS[method](twin.parameters())
    torch.manual_seed(6)
    for window in itertools.chain.from_iterable(windows(4) for _ in range(2)):
        state = {name: t.clone() for name, t in twin.named_buffers()}

        def closure(window: list[Any] = window, state: dict[str, Tensor] = state) -> None:
            opt.zero_grad()
            perturbed = opt.perturbed
            for batch in window:
                loss = loss_of(twin, batch) / 4
                loss.backward(create_graph=opt.needs_graph)
            if perturbed:  # back to the statistics of x
                for name, t in twin.named_buffers():
                    t.copy_(state[name])
            else:
                state |= {name: t.clone() for name, t in twin.named_buffers()}

        opt.step(closure)
    assert_same(model, twin)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_buffers_of_a_loss_are_those_of_x(accumulation: int) -> None:
    class Step(nn.Module):
        """A model with its loss."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.criterion = model, MeanLoss()

        def forward(self, batch: Any) -> Tensor:
            return self.criterion(self.model(batch[0]), batch[1])

    model = network()
    accelerator = make_accelerator(accumulation)
    opt = ef.TwoStepUSAM(model.parameters(), lr=LR, rho=RHO)
    model, opt, loader = accelerator.prepare(model, opt, DataLoader(data(), batch_size=3))
    backward, step, losses = SharpnessAwareBackward(accelerator, model, opt), Step(model), []
    for batch in loader:
        with accelerator.accumulate(model):
            losses.append(float(backward(step, batch)))
            opt.step()
            opt.zero_grad()
    step.criterion.assert_saw(losses)


def test_a_batch_may_be_changed_by_its_loss() -> None:
    """A loss that takes an entry from its batch, and one that writes to a tensor."""

    def popping(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        target = batch.pop("target")
        return nn.functional.mse_loss(model(batch["x"].mul_(0.5)), target)

    model, twin = network(), network()
    batches = [{"x": x.clone(), "target": y} for x, y in DataLoader(data(), batch_size=3)]
    accelerator = make_accelerator(2)
    prepared, opt = accelerator.prepare(model, ef.TwoStepUSAM(model.parameters(), lr=0.1, rho=0.1))
    backward = SharpnessAwareBackward(accelerator, prepared, opt)
    for batch in batches[:4]:
        with accelerator.accumulate(prepared):
            backward(popping, prepared, batch)
            opt.step()
            opt.zero_grad()
    other = ef.TwoStepUSAM(twin.parameters(), lr=0.1, rho=0.1)
    for window in windows(2)[:2]:

        def closure(window: list[Any] = window) -> None:
            other.zero_grad()
            for x, y in window:
                (nn.functional.mse_loss(twin(0.5 * x), y) / 2).backward()

        other.step(closure)
    assert_same(model, twin)


def wrapped_sam(params: Any, lr: float, momentum: float, rho: float) -> Any:
    return ef.SharpnessAware(torch.optim.SGD(params, lr=lr, momentum=momentum), "sam", rho)


@pytest.mark.parametrize("make", [ef.SAM, wrapped_sam], ids=["fused", "wrapped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_norm", [0.0, MAX_NORM])
def test_a_loss_scale_changes_nothing(
    accumulation: int, max_norm: float, make: Callable[..., Any]
) -> None:
    model = network()
    twin = copy.deepcopy(model)
    accelerator = with_scaler(make_accelerator(accumulation), 2.0**12)
    train(accelerator, model, make(model.parameters(), **Sam), max_norm=max_norm)
    assert accelerator.scaler.get_scale() > 2.0**12
    losses = losses_by_hand(twin, accumulation)
    sam_steps(list(twin.parameters()), losses, **Sam, max_norm=max_norm, normalized=True)
    assert_same(model, twin)


@pytest.mark.parametrize("make", [ef.SAM, wrapped_sam], ids=["fused", "wrapped"])
@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_a_step_that_overflows_is_skipped(where: str, make: Callable[..., Any]) -> None:
    model = network()
    opt = make(model.parameters(), **Sam)
    accelerator = make_accelerator()
    model = accelerator.prepare(model)
    prepared = with_scaler(accelerator, 2.0**12).prepare(opt)
    backward = SharpnessAwareBackward(accelerator, model, prepared)
    before = copy.deepcopy(model.state_dict())

    def overflowing(batch: Any) -> Tensor:
        huge = opt.perturbed == (where == "descent")
        return loss_of(model, batch) * (float("inf") if huge else 1.0)

    batch = windows(1)[0][0]
    backward(overflowing, batch)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    prepared.step()
    prepared.zero_grad()
    assert opt.skipped == 1
    assert accelerator.optimizer_step_was_skipped  # so that a schedule of lr does not advance
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    backward(functools.partial(loss_of, model), batch)
    prepared.step()
    assert opt.skipped == 1
    assert not accelerator.optimizer_step_was_skipped
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_saved_state_resumes_exactly(tmp_path: Path) -> None:
    """With the schedule of rho registered, momentum, dropout, and an incomplete window after."""

    def start() -> tuple[Any, ...]:
        reset_state()
        accelerator = make_accelerator(2)
        model = Awkward()
        opt = ef.USAM(model.parameters(), **Sam)
        schedule = RhoScheduler(opt, "linear", total_steps=5, end=0.2)
        model, opt, loader = accelerator.prepare(model, opt, DataLoader(data(), batch_size=3))
        accelerator.register_for_checkpointing(schedule)
        return accelerator, model, opt, loader, schedule

    def epoch(accelerator: Any, model: Any, opt: Any, loader: Any, schedule: Any) -> list[float]:
        backward = SharpnessAwareBackward(accelerator, model, opt)
        radii = []
        for batch in loader:
            with accelerator.accumulate(model):
                backward(functools.partial(loss_of, model), batch)
                opt.step()
                opt.zero_grad()
            if accelerator.sync_gradients:
                radii.append(opt.param_groups[0]["rho"])
                schedule.step()
        return radii

    torch.manual_seed(7)
    run = start()
    epoch(*run)
    run[0].save_state(str(tmp_path))
    radii = epoch(*run)
    assert len(set(radii)) > 1
    torch.manual_seed(8)
    other = start()
    other[0].load_state(str(tmp_path))
    assert epoch(*other) == radii
    assert_same(other[1], run[1], rtol=0, atol=0)


def test_the_explicit_form_reaches_the_optimizer() -> None:
    model, twin = network(), network()
    accelerator = make_accelerator()
    model, prepared = accelerator.prepare(model, ef.USAM(model.parameters(), **Sam))
    opt = optimizer_of(prepared)
    for (batch,) in windows(1):

        def closure(batch: Any = batch) -> None:
            accelerator.backward(loss_of(model, batch))

        prepared.zero_grad()
        closure()
        assert opt.phase == "ascent"
        while opt.ascend(accelerator.scaler):
            closure()
        prepared.step()
    sam_steps(list(twin.parameters()), losses_by_hand(twin, 1, epochs=1), **Sam)
    assert_same(model, twin)


def test_a_wrapper_takes_a_prepared_optimizer() -> None:
    model, twin = network(), network()
    accelerator = make_accelerator()
    model, base = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    )
    opt = ef.SharpnessAware(base, "sam", rho=RHO)
    for i, (batch,) in enumerate(windows(1)):

        def closure(batch: Any = batch) -> Tensor:
            opt.zero_grad()
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            return loss

        if i % 2:
            opt.step(closure)
        else:
            closure()
            while opt.ascend():
                closure()
            opt.step()
    sam_steps(list(twin.parameters()), losses_by_hand(twin, 1, epochs=1), **Sam, normalized=True)
    assert_same(model, twin)


def test_a_wrapper_refuses_a_prepared_optimizer_that_scales_or_accumulates() -> None:
    model = network()
    prepared = make_accelerator(2).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"only where an accumulation ends.*before Accelerate"):
        ef.SharpnessAware(prepared)
    reset_state()
    scaling = with_scaler(make_accelerator(), 2.0)
    prepared = scaling.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"through a GradScaler.*before Accelerate"):
        ef.SharpnessAware(prepared)


def test_misuse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    accelerator = make_accelerator(2)
    model, other = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="holds no optimizer of eigenfilter"):
        SharpnessAwareBackward(accelerator, model, other)
    releasing = ef.USAM(model.parameters(), lr=0.1, release_gradients=True)
    with pytest.raises(ValueError, match="release_gradients=True applies"):
        SharpnessAwareBackward(accelerator, model, accelerator.prepare(releasing))

    opt = accelerator.prepare(ef.USAM(model.parameters(), lr=0.1, rho=0.1))
    backward = SharpnessAwareBackward(accelerator, model, opt)
    batch = windows(1)[0][0]
    with pytest.raises(TypeError, match="a function without arguments"):
        backward(lambda: loss_of(model, batch))
    with pytest.raises(TypeError, match="must return the loss"):
        backward(lambda batch: loss_of(model, batch).item(), batch)
    accelerator.gradient_state._set_sync_gradients(True)
    backward(functools.partial(loss_of, model), batch)
    with pytest.raises(RuntimeError, match=r"leave out a step, call cancel\(\)"):
        backward(functools.partial(loss_of, model), batch)

    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(RuntimeError, match="DEEPSPEED reduces gradients"):
        SharpnessAwareBackward(accelerator, model, opt)


@pytest.mark.parametrize("name", ["y", "holder.y", "state['y']"])
def test_a_loss_function_that_reads_the_loop_is_refused(name: str) -> None:
    model = network()
    accelerator = make_accelerator(2)
    model, opt = accelerator.prepare(model, ef.USAM(model.parameters(), lr=0.1, rho=0.1))
    backward = SharpnessAwareBackward(accelerator, model, opt)
    holder, state = types.SimpleNamespace(), {}
    functions = {
        "y": lambda x: loss_of(model, (x, y)),
        "holder.y": lambda x: loss_of(model, (x, holder.y)),
        "state['y']": lambda x: loss_of(model, (x, state["y"])),
    }

    def train() -> None:
        nonlocal y
        for x, y in windows(2)[0]:
            state["y"] = holder.y = y
            with accelerator.accumulate(model):
                backward(functions[name], x)
                opt.step()

    y = None
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=f"reads {re.escape(repr(name))}, which was assigned"):
        train()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_loss_function_that_writes_is_not_refused() -> None:
    model = network()
    accelerator = make_accelerator(2)
    model, opt = accelerator.prepare(model, ef.USAM(model.parameters(), lr=0.1, rho=0.1))
    backward = SharpnessAwareBackward(accelerator, model, opt)
    calls, losses = 0, []

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = loss_of(model, (x, y))
        losses.append(loss.item())
        return loss

    for x, y in windows(2)[0]:
        with accelerator.accumulate(model):
            backward(loss_fn, x, y)
            opt.step()
            opt.zero_grad()
    assert calls == len(losses) == 4


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("method", ["two_step_usam", "wrapped", "no ascents"])
@pytest.mark.parametrize("at", [3, 1], ids=["last micro-batch", "second micro-batch"])
def test_a_step_that_the_loop_leaves_out(at: int, method: str, clips: bool, scaled: bool) -> None:
    """As if its micro-batches, up to the one where it is left out, had never come."""

    def run(model: nn.Module, cancels: bool) -> None:
        accelerator = make_accelerator(4)
        model = accelerator.prepare(model)
        owner = with_scaler(accelerator, 2.0**10) if scaled else accelerator
        opt = owner.prepare(METHODS[method](model.parameters()))
        backward = SharpnessAwareBackward(accelerator, model, opt)
        for step, window in enumerate(windows(4) * 2):
            for i, batch in enumerate(window):
                accelerator.gradient_state._set_sync_gradients(i == len(window) - 1)
                left_out = step == 2 and i <= at
                if left_out and not cancels:
                    continue
                backward(functools.partial(loss_of, model), batch)
                if left_out and i == at:
                    if clips and i == len(window) - 1:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    backward.cancel()
                    continue
                if clips and i == len(window) - 1:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
            assert not optimizer_of(opt).perturbed

    model = network()
    twin = copy.deepcopy(model)
    run(model, cancels=True)
    run(twin, cancels=False)
    assert_same(model, twin)


def test_a_plain_loop_names_the_integration() -> None:
    model = network()
    accelerator = make_accelerator()
    model, opt = accelerator.prepare(model, ef.USAM(model.parameters(), lr=0.1, rho=0.1))
    accelerator.backward(loss_of(model, windows(1)[0][0]))
    with pytest.raises(RuntimeError, match=r"accelerate\.SharpnessAwareBackward"):
        opt.step()


def train_on_a_rank(rank: int, accumulation: int) -> dict[str, Tensor]:
    with launched(rank, 2):
        accelerator = make_accelerator(accumulation)
        assert PartialState().num_processes == 2
        model = network()
        gen = torch.Generator().manual_seed(4)
        x = torch.randn(24, 4, generator=gen, dtype=torch.float64)
        loader = DataLoader(TensorDataset(x, 2 * torch.sin(x[:, :2]) + 1), batch_size=2)
        opt = ef.SAM(model.parameters(), **Sam)
        model, opt, loader = accelerator.prepare(model, opt, loader)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        backward = SharpnessAwareBackward(accelerator, model, opt)
        for batch in loader:
            with accelerator.accumulate(model):
                backward(functools.partial(loss_of, model), batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                opt.step()
                opt.zero_grad()
        return {name: t.clone() for name, t in model.module.state_dict().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 3])
def test_two_processes_are_one(accumulation: int, run_distributed: RunDistributed) -> None:
    ranks = run_distributed(train_on_a_rank, 2, accumulation)
    twin = network()
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(24, 4, generator=gen, dtype=torch.float64)
    batches = list(zip(x.split(4), (2 * torch.sin(x[:, :2]) + 1).split(4), strict=True))
    losses = [
        functools.partial(
            lambda w: torch.stack([loss_of(twin, b) / accumulation for b in w]).sum(),
            batches[i : i + accumulation],
        )
        for i in range(0, len(batches), accumulation)
    ]
    sam_steps(list(twin.parameters()), losses, **Sam, max_norm=MAX_NORM, normalized=True)
    for state in ranks:
        for name, t in twin.state_dict().items():
            torch.testing.assert_close(state[name], t, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    assert "loss " in run_page(ROOT / "docs" / "integrations" / "accelerate.md", tmp_path)
