"""timm's factory and its loss scaler against USAM in plain torch."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import eigenfilter as ef
from pages import ROOT, run_page
from plain_usam import LR, MOMENTUM, RHO, USAM, PlainUSAM, assert_same, make_batches, make_model
from run_distributed import RunDistributed

pytest.importorskip("timm")
import timm.optim
import timm.utils
from timm.optim import create_optimizer_v2

from eigenfilter.integrations import timm as integration
from eigenfilter.integrations.timm import SharpnessAwareScaler, register

NAMES = register()


def criterion(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    scaler: timm.utils.NativeScaler,
    accumulation: int = 1,
    clip_grad: float | None = None,
    batches: int = 10,
    after: Callable[[], None] = lambda: None,
) -> list[float]:
    """The loop of timm's train.py: the last window has the batches that are left."""
    model.train()
    opt.zero_grad()
    losses = []
    loader = make_batches(batches)
    last = batches % accumulation or accumulation
    for index, (x, y) in enumerate(loader):
        count = last if index >= batches - last else accumulation
        need_update = index == batches - 1 or (index + 1) % accumulation == 0

        def forward(x: Tensor, y: Tensor, count: int = count) -> Tensor:
            return criterion(model, x, y) / count

        loss = scaler(
            forward,
            opt,
            clip_grad=clip_grad,
            parameters=model.parameters(),
            need_update=need_update,
            batch=(x, y),
        )
        losses.append(float(loss) * count)
        if need_update:
            after()
            opt.zero_grad()
    return losses


def windows(accumulation: int, batches: int = 10) -> list[list[tuple[Tensor, Tensor]]]:
    loader = make_batches(batches)
    return [loader[i : i + accumulation] for i in range(0, batches, accumulation)]


def no_scaling(model: nn.Module) -> SharpnessAwareScaler:
    return SharpnessAwareScaler(model, device="cpu", enabled=False)


@pytest.mark.parametrize("clip_grad", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_run_is_usam(accumulation: int, clip_grad: float | None, enabled: bool) -> None:
    model, other = make_model(), make_model()
    ema, other_ema = (timm.utils.ModelEmaV3(m, decay=0.7) for m in (model, other))
    opt = create_optimizer_v2(model, opt="usam", **USAM, filter_bias_and_bn=False)
    scaler = SharpnessAwareScaler(model, device="cpu", enabled=enabled)
    torch.manual_seed(1)
    losses = train(model, opt, scaler, accumulation, clip_grad, after=lambda: ema.update(model))

    plain = PlainUSAM(other, clip_grad)
    torch.manual_seed(1)
    expected = []
    for window in windows(accumulation):
        expected += plain.step(window)
        other_ema.update(other)
    assert_same(model, other)
    assert_same(ema.module, other_ema.module)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


def test_the_names() -> None:
    assert register() == NAMES  # which changes nothing the second time
    assert {"usam", "sam", "asam", "twostepusam", "hessianusam", "efsgd", "efadamw"} <= set(NAMES)
    assert set(NAMES) <= set(timm.optim.list_optimizers())
    assert timm.optim.get_optimizer_class("sgd", bind_defaults=False) is torch.optim.SGD


def test_registering_twice_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        register()
    assert not caplog.records


def test_a_name_of_timms_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(integration.default_registry._optimizers)
    known["usam"] = known["sgd"]
    monkeypatch.setattr(integration.default_registry, "_optimizers", known)
    with pytest.raises(RuntimeError, match="another optimizer that is named 'usam'"):
        register()


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_by_its_name(name: str) -> None:
    model = make_model()
    opt = create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.05, foreach=True, eps=1e-3)
    assert type(opt).__module__.startswith("eigenfilter.")
    decays = {group["weight_decay"]: len(group["params"]) for group in opt.param_groups}
    assert decays == {0.0: 4, 0.05: 2}  # biases and batch norm apart
    if isinstance(opt, ef.AdamW):
        assert opt.param_groups[0]["eps"] == 1e-3
    else:
        assert opt.param_groups[0]["momentum"] == 0.9
    if name == "asam":
        assert opt.adaptive
    before = copy.deepcopy(model.state_dict())
    train(model, opt, no_scaling(model), batches=2)
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_layer_decay_scales_the_learning_rates() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=3)
    opt = create_optimizer_v2(model, opt="usam", lr=0.1, layer_decay=0.5, rho=RHO)
    scales = {group["lr_scale"] for group in opt.param_groups}
    assert len(scales) > 2
    for group in opt.param_groups:  # as timm's schedulers do
        group["lr"] = 0.1 * group["lr_scale"]
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    scaler = no_scaling(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def forward() -> Tensor:
        return nn.functional.cross_entropy(model(images), targets)

    first = [g.clone() for g in torch.autograd.grad(forward(), list(model.parameters()))]
    with torch.no_grad():
        for p, g in zip(model.parameters(), first, strict=True):
            p += RHO * g
    second = torch.autograd.grad(forward(), list(model.parameters()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    scaler(forward, opt)
    scale_of = {id(p): g["lr_scale"] for g in opt.param_groups for p in g["params"]}
    for (name, p), g in zip(model.named_parameters(), second, strict=True):
        expected = before[name] - 0.1 * scale_of[id(p)] * g
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)


def test_an_optimizer_of_timm_steps_as_with_its_own_scaler() -> None:
    model, other = make_model(), make_model()
    torch.manual_seed(1)
    train(model, create_optimizer_v2(model, opt="sgd", lr=LR), no_scaling(model), 4, 0.05)
    torch.manual_seed(1)
    opt = create_optimizer_v2(other, opt="sgd", lr=LR)
    theirs = timm.utils.NativeScaler(device="cpu")

    def call(
        forward: Callable[..., Tensor], *args: object, batch: tuple[Tensor, ...], **kwargs: object
    ) -> Tensor:
        loss = forward(*batch)
        theirs(loss, *args, **kwargs)
        return loss.detach()

    train(other, opt, call, 4, 0.05)
    assert_same(model, other)


def test_lookahead_around_usam() -> None:
    model, other = make_model(), make_model()
    opt = create_optimizer_v2(model, opt="lookahead_usam", **USAM, filter_bias_and_bn=False)
    torch.manual_seed(1)
    train(model, opt, no_scaling(model), batches=5)  # it looks back every 6th step
    plain = PlainUSAM(other)
    torch.manual_seed(1)
    for window in windows(1, 5):
        plain.step(window)
    assert_same(model, other)


def test_a_step_that_overflows_is_skipped() -> None:
    model = make_model()
    opt = create_optimizer_v2(model, opt="usam", **USAM)
    scaler = SharpnessAwareScaler(model, device="cpu")
    before = [p.detach().clone() for p in model.parameters()]
    scale = scaler.state_dict()["scale"]
    scaler(lambda: criterion(model, *make_batches(1)[0]) * float("inf"), opt)
    assert not opt.perturbed
    assert opt.skipped == 1
    assert all(map(torch.equal, before, model.parameters()))
    assert scaler.state_dict()["scale"] == scale / 2


def test_a_run_goes_on_from_a_checkpoint() -> None:
    models = [make_model(), make_model()]
    for model, parts in zip(models, ([10], [6, 4]), strict=True):
        saved = None
        start = 0
        torch.manual_seed(1)
        for part in parts:
            opt = create_optimizer_v2(model, opt="usam", **USAM)
            scaler = SharpnessAwareScaler(model, device="cpu")
            if saved is not None:
                opt.load_state_dict(saved["optimizer"])
                scaler.load_state_dict(saved["amp_scaler"])
            for x, y in make_batches(10)[start : start + part]:
                scaler(partial(criterion, model, x, y), opt)
                opt.zero_grad()
            saved = {"optimizer": opt.state_dict(), "amp_scaler": scaler.state_dict()}
            start += part
    assert_same(*models)


@pytest.mark.parametrize("start", [0.0, RHO], ids=["from rho 0", "from rho"])
@pytest.mark.parametrize("clears", ["optimizer", "in place", "model"])
def test_an_epoch_that_begins_with_cleared_gradients_begins_a_step(
    clears: str, start: float
) -> None:
    models = make_model(), make_model()
    for model in models:
        opt = ef.USAM(model.parameters(), **USAM)
        scaler = no_scaling(model)
        torch.manual_seed(1)
        for epoch in range(2):
            if clears == "model":
                model.zero_grad()
            else:
                opt.zero_grad(set_to_none=clears == "optimizer")
            if epoch == 1 and model is models[1]:
                scaler = no_scaling(model)  # which has no micro-batch
            for index, (x, y) in enumerate(make_batches(3)):
                opt.param_groups[0]["rho"] = start if epoch == 0 else RHO
                scaler(partial(criterion, model, x, y), opt, need_update=index == 1)
                if index == 1:
                    opt.zero_grad()
    assert_same(*models)


def test_a_loss_in_the_place_of_its_function_is_refused() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), lr=LR)
    with pytest.raises(TypeError, match="takes the function that computes the loss"):
        no_scaling(model)(criterion(model, *make_batches(1)[0]), opt)
    with pytest.raises(ValueError, match="clip_grad needs the parameters"):
        no_scaling(model)(lambda: criterion(model, *make_batches(1)[0]), opt, clip_grad=1.0)


def test_released_gradients_are_refused() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), lr=LR, rho=RHO, release_gradients=True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="release_gradients=True applies each gradient"):
        train(model, opt, no_scaling(model), clip_grad=0.05)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_clipping_that_fails_leaves_x(enabled: bool) -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), **USAM)
    scaler = SharpnessAwareScaler(model, device="cpu", enabled=enabled)
    before = [p.detach().clone() for p in model.parameters()]
    forward = partial(criterion, model, *make_batches(1)[0])
    params = model.parameters()
    with pytest.raises(AssertionError, match="Unknown clip mode"):
        scaler(forward, opt, clip_grad=1.0, clip_mode="unknown", parameters=params)
    assert not opt.perturbed
    assert all(map(torch.equal, before, model.parameters()))


def reads_variables(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    for x, y in make_batches(2):
        yield lambda: criterion(model, x, y)  # noqa: B023


def reads_them_deeper(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    for x, y in make_batches(2):

        def inner() -> Tensor:
            return criterion(model, x, y)  # noqa: B023

        def forward(x: Tensor = x, y: Tensor = y, inner: Callable[[], Tensor] = inner) -> Tensor:
            return inner()

        yield forward


def reads_attributes(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    class Trainer:
        def compute(self) -> Tensor:
            return criterion(model, *self.batch)

    trainer = Trainer()
    for trainer.batch in make_batches(2):
        yield trainer.compute


@pytest.mark.parametrize("forwards", [reads_variables, reads_them_deeper, reads_attributes])
def test_a_variable_that_is_assigned_again_is_refused(
    forwards: Callable[[nn.Module], Iterator[Callable[[], Tensor]]],
) -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), lr=LR, rho=RHO, momentum=MOMENTUM)
    scaler = no_scaling(model)
    before = [p.detach().clone() for p in model.parameters()]
    functions = forwards(model)
    scaler(next(functions), opt, need_update=False)
    last = next(functions)
    with pytest.raises(
        RuntimeError, match=r"reads '(x|y|self.batch.0.)', which was assigned again"
    ):
        scaler(last, opt)
    assert not opt.perturbed
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("fails", [False, True])
def test_the_scaler_keeps_no_optimizer(fails: bool) -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), lr=LR, rho=RHO)
    scaler = no_scaling(model)
    calls = []

    def forward() -> Tensor:
        calls.append(1)
        if fails and len(calls) == 2:
            raise ArithmeticError
        return criterion(model, *make_batches(1)[0])

    with pytest.raises(ArithmeticError) if fails else nullcontext():
        scaler(forward, opt)
    alive = weakref.ref(opt)
    del opt
    gc.collect()
    assert alive() is None


def test_a_batch_that_was_written_is_refused() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), lr=LR, rho=RHO)
    x, y = make_batches(1)[0]

    def forward() -> Tensor:
        return criterion(model, x.mul_(2), y)

    with pytest.raises(RuntimeError, match="reads 'x', a tensor that was written in place"):
        no_scaling(model)(forward, opt)
    assert not opt.perturbed


@pytest.mark.parametrize("form", ["arguments", "partial", "default"])
def test_a_function_may_change_its_arguments_alone(form: str) -> None:
    models = make_model(), make_model()
    for model, changes in zip(models, (True, False), strict=True):
        opt = ef.USAM(model.parameters(), **USAM)
        scaler = no_scaling(model)
        torch.manual_seed(1)
        for index, (x, y) in enumerate(make_batches(4)):
            batch = {"x": x.clone()}

            def changing(batch: dict[str, Tensor], y: Tensor = y) -> Tensor:
                batch["x"] = batch["x"].mul_(2)
                return criterion(model, batch.pop("x"), y)  # noqa: B023

            def forward(x: Tensor = x, y: Tensor = y) -> Tensor:
                return criterion(model, 2 * x, y)  # noqa: B023

            need_update = index % 2 == 1
            if not changes:
                scaler(forward, opt, need_update=need_update)
            elif form == "arguments":
                scaler(changing, opt, need_update=need_update, batch=(batch,))
            elif form == "partial":
                scaler(partial(changing, batch), opt, need_update=need_update)
            else:
                scaler(lambda b=batch: changing(b), opt, need_update=False)
                with pytest.raises(RuntimeError, match="reads 'b', which was assigned again"):
                    scaler(forward, opt)
                return
            if need_update:
                opt.zero_grad()
    assert_same(*models)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_batch_is_the_arguments(kind: type) -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), lr=LR, rho=RHO)
    no_scaling(model)(partial(criterion, model), opt, batch=kind(make_batches(1)[0]))


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("batch", [torch.ones(2, 4), {"x": torch.ones(4)}, "xy"])
def test_a_batch_that_is_no_tuple_is_refused(batch: Any, ours: bool) -> None:
    model = make_model()
    opt = (ef.USAM if ours else torch.optim.SGD)(model.parameters(), lr=LR)
    with pytest.raises(TypeError, match=rf"batch is the tuple .* was given {type(batch).__name__}"):
        no_scaling(model)(lambda *batch: model(*batch).sum(), opt, batch=batch)


@dataclass
class Loss:
    """A loss of a class of its own, which counts its calls."""

    model: nn.Module
    calls: int = 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return criterion(self.model, x, y)


def test_a_function_is_not_copied() -> None:
    model = make_model()
    opt = ef.USAM(model.parameters(), lr=LR, rho=RHO)
    loss = Loss(model)
    no_scaling(model)(loss, opt, batch=make_batches(1)[0])
    assert loss.calls == 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_meter_may_be_written(accumulation: int) -> None:
    models = make_model(), make_model()
    total = torch.zeros((), dtype=torch.float64)
    for model in models:
        opt = ef.USAM(model.parameters(), **USAM)
        scaler = no_scaling(model)

        def forward(x: Tensor, y: Tensor, model: nn.Module = model) -> Tensor:
            loss = criterion(model, x, y)
            if model is models[0]:
                total.add_(loss.detach())
            return loss

        torch.manual_seed(1)
        for index, batch in enumerate(make_batches(4)):
            need_update = (index + 1) % accumulation == 0
            scaler(forward, opt, need_update=need_update, batch=batch)
            if need_update:
                opt.zero_grad()
    assert_same(*models)
    assert total > 0


def test_a_loss_module_keeps_its_buffers() -> None:
    model, loss_module = make_model(), nn.BatchNorm1d(2).double()
    opt = ef.USAM(model.parameters(), **USAM)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(loss_module(model(x)), y)

    no_scaling(model)(forward, opt, batch=make_batches(1)[0])
    assert loss_module.num_batches_tracked == 1


def train_on_rank(rank: int, accumulation: int) -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    ddp = nn.parallel.DistributedDataParallel(model)
    reductions = Counting()
    ddp.register_comm_hook(reductions, count_reductions)
    opt = ef.USAM(model.parameters(), **USAM)
    scaler = no_scaling(ddp)
    for index, (x, y) in enumerate(make_batches(16)[rank::2]):

        def forward(x: Tensor = x, y: Tensor = y) -> Tensor:
            return criterion(ddp, x, y) / accumulation

        need_update = (index + 1) % accumulation == 0
        with nullcontext() if need_update else ddp.no_sync():
            scaler(forward, opt, 0.05, parameters=ddp.parameters(), need_update=need_update)
        if need_update:
            opt.zero_grad()
    return [p.detach() for p in model.parameters()], reductions.count


class Counting:
    """Counts the reductions of gradients over the ranks."""

    count = 0


def count_reductions(state: Counting, bucket):  # whose annotations DDP would want evaluated
    state.count += 1
    return allreduce_hook(None, bucket)


@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes(run_distributed: RunDistributed, accumulation: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    plain = PlainUSAM(model, 0.05)
    for window in windows(2 * accumulation, 16):
        plain.step(window)
    for weights, reductions in run_distributed(train_on_rank, 2, accumulation):
        torch.testing.assert_close(weights, list(model.parameters()), rtol=0, atol=1e-6)
        assert reductions == 2 * 8 // accumulation  # two gradients a step, of one bucket each


def test_the_page_runs(tmp_path: Path) -> None:
    assert "4 steps, loss" in run_page(ROOT / "docs/integrations/timm.md", tmp_path)
