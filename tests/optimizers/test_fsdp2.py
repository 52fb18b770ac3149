"""FSDP2 (`fully_shard`) in two processes is the single process's run, and both skip together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import eigenfilter as ef
from eigenfilter._distributed import fsdp_groups
from eigenfilter.optimizers import in_backward
from optimizers.distributed_problem import (
    OPTIMIZERS,
    PLAIN,
    SETTINGS,
    STEPS,
    WORLD,
    batch,
    descent_norm_alone,
    error_message,
    evaluation,
    flattened,
    full,
    network,
    share,
    step_with_released_gradients,
    train,
    train_alone,
)
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed


def sharded(**options: Any) -> nn.Sequential:
    """The network under FSDP2: a group for each layer, one for the whole."""
    model = network()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def train_shards(rank: int) -> list[Tensor]:
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    params = train(opt, model, share(rank))
    assert all(s["momentum_buffer"].placements for s in opt.state.values())
    return params


def run_forward_before_the_ascent(rank: int) -> list[Tensor]:
    """A forward pass alone, between the gradient and the ascent, leaves parameters gathered."""
    model = sharded(reshard_after_forward=False)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    inputs, _ = batch(share(rank))
    for _ in range(STEPS):
        closure()
        model(inputs)
        while opt.ascend():
            closure()
        model(inputs)
        opt.step()
    return full(model.parameters())


def load_a_checkpoint(rank: int) -> list[Tensor]:
    """Saved and loaded by torch.distributed.checkpoint into a new optimizer, half way."""
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    for _ in range(STEPS // 2):
        opt.step(closure)
    opt.zero_grad()
    saved = checkpoint.get_optimizer_state_dict(model, opt)
    other = ef.USAM(model.parameters(), **SETTINGS | {"lr": 7.0})
    checkpoint.set_optimizer_state_dict(model, other, saved)
    closure = evaluation(other, model, share(rank))
    for _ in range(STEPS - STEPS // 2):
        other.step(closure)
    return full(model.parameters())


@pytest.mark.parametrize(
    "scenario", [train_shards, run_forward_before_the_ascent, load_a_checkpoint]
)
def test_the_single_processs_run(run_distributed: RunDistributed, scenario: Any) -> None:
    first, second = run_distributed(scenario, 2)
    torch.testing.assert_close(first, train_alone(), rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, first, second))


def train_gathered(rank: int, name: str) -> list[Tensor]:
    """Backward leaves parameters gathered: after each of several ascents these are stale."""
    model = sharded()
    model.set_reshard_after_backward(False)
    return train(OPTIMIZERS[name](model.parameters()), model, share(rank))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_single_processs_run_of_every_method(
    run_distributed: RunDistributed, name: str
) -> None:
    first, second = run_distributed(train_gathered, 2, name)
    rounding = 1e-7 if name == "difference" else 1e-12
    expected = train_alone(OPTIMIZERS[name])
    torch.testing.assert_close(first, expected, rtol=rounding, atol=rounding)
    assert all(map(torch.equal, first, second))


def test_rho_matters_in_that_run() -> None:
    """By far more than what is tolerated: a gradient at the old point would show."""
    others = train_alone(lambda params: ef.USAM(params, **SETTINGS | {"rho": 0.0}))
    pairs = zip(train_alone(), others, strict=True)
    assert min((a - b).abs().max() for a, b in pairs) > 1e-4


RELEASING: dict[str, Any] = {
    "sgd": lambda params, **kw: ef.SGD(params, **PLAIN, **kw),
    "usam": lambda params, **kw: ef.USAM(params, **SETTINGS, **kw),
    "sam": lambda params, **kw: ef.SAM(params, **SETTINGS, **kw),
    "sequential": lambda params, **kw: ef.TwoStepUSAM(params, **SETTINGS, **kw),
    "anchored": lambda params, **kw: ef.TwoStepUSAM(params, **SETTINGS, ascent="anchored", **kw),
}


def release_gradients(rank: int, gathered: bool) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """The parameters of every method after some steps, without and with released gradients."""
    trained = {}
    for name, make in RELEASING.items():
        runs = []
        for release in (False, True):
            model = sharded()
            model.set_reshard_after_backward(not gathered)
            opt = make(model.parameters(), release_gradients=release)
            runs.append(train(opt, model, share(rank)))
            assert all((p.grad is None) == release for p in model.parameters())
        trained[name] = tuple(runs)
    return trained


@pytest.mark.parametrize("gathered", [False, True])
def test_released_gradients_are_reduced_first(
    run_distributed: RunDistributed, gathered: bool
) -> None:
    for trained in run_distributed(release_gradients, 2, gathered):
        for name, (whole, each) in trained.items():
            assert all(map(torch.equal, whole, each)), name


def release_as_backward_goes(rank: int, name: str) -> list[bool]:
    """Whether shards are at x when backward comes to the first layer: of the first, the last.

    The smallest gradient waits: that of the last bias.
    """
    in_backward.BATCH_BYTES, before = 0, in_backward.BATCH_BYTES
    try:
        model = sharded()
        shards: list[Any] = list(model.parameters())
        opt = RELEASING[name](shards, release_gradients=True)
        x = [p.to_local().clone() for p in shards]
        at_x: list[bool] = []

        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            pairs = zip(shards, x, strict=True)
            output.register_hook(
                lambda _: at_x.extend(torch.equal(p.to_local(), y) for p, y in pairs)
            )

        model[0].register_forward_hook(look)
        with opt.evaluation():
            evaluation(opt, model, share(rank))()
        return at_x
    finally:
        in_backward.BATCH_BYTES = before


def test_shards_change_while_backward_goes_on(run_distributed: RunDistributed) -> None:
    for name in ("sgd", "usam"):
        first, second = run_distributed(release_as_backward_goes, 2, name)
        assert first == [True, True, False, True]  # the last layer's output has one row
        assert second[:2] == [True, True]


def release_a_layer_that_is_used_thrice(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(6, 6).double()
        model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer, nn.Linear(6, 1).double())
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = RELEASING["sequential"](model.parameters(), release_gradients=release)
        runs.append(train(opt, model, share(rank)))
    return runs[0], runs[1]


def accumulate_and_release(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Micro-batches whose gradients stay unsharded until the last one's, in one evaluation."""
    runs = []
    for release in (False, True):
        model = sharded()
        opt = RELEASING["sequential"](model.parameters(), release_gradients=release)

        def closure(opt: Any = opt, model: Any = model) -> Tensor:
            opt.zero_grad()
            inputs, targets = batch(share(rank))
            for i in range(2):
                model.set_requires_gradient_sync(i == 1)
                loss = (model(inputs[i::2]) - targets[i::2]).square().mean()
                loss.backward()
            return loss

        for _ in range(STEPS):
            opt.step(closure)
        runs.append(full(model.parameters()))
    return runs[0], runs[1]


@pytest.mark.parametrize("scenario", [accumulate_and_release, release_a_layer_that_is_used_thrice])
def test_released_gradients_are_complete(run_distributed: RunDistributed, scenario: Any) -> None:
    for whole, each in run_distributed(scenario, 2):
        assert all(map(torch.equal, whole, each))


def clip_what_waits(rank: int) -> list[str]:
    """Messages for gradients that are clipped in the closure, whose versions do not tell of it."""
    messages = []
    for batch_bytes in (0, in_backward.BATCH_BYTES):
        in_backward.BATCH_BYTES, before = batch_bytes, in_backward.BATCH_BYTES
        model = sharded()
        opt = RELEASING["usam"](model.parameters(), release_gradients=True)
        compute = evaluation(opt, model, share(rank))

        def closure(model: nn.Module = model, compute: Any = compute) -> Tensor:
            loss: Tensor = compute()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-4, foreach=True)
            return loss

        messages.append(error_message(lambda opt=opt, act=closure: opt.step(act)))  # type: ignore[misc]
        in_backward.BATCH_BYTES = before
    return messages


def test_clipping_of_released_shards_is_refused(run_distributed: RunDistributed) -> None:
    for message in itertools.chain(*run_distributed(clip_what_waits, 2)):
        assert "changed after backward, as by clipping" in message


def add_to_earlier_gradients(rank: int) -> list[str]:
    """Messages for a closure that does not clear them, and for one that does."""
    messages = []
    for release in (False, True):
        for clears in (False, True):
            model = sharded()
            opt = RELEASING["usam"](model.parameters(), release_gradients=release)
            inputs, targets = batch(share(rank))

            def closure(
                opt: Any = opt,
                model: nn.Module = model,
                clears: bool = clears,
                inputs: Tensor = inputs,
                targets: Tensor = targets,
            ) -> Tensor:
                if clears:
                    opt.zero_grad()
                loss = (model(inputs) - targets).square().mean()
                loss.backward()
                return loss

            closure()
            messages.append(error_message(lambda opt=opt, act=closure: opt.step(act)))  # type: ignore[misc]
    return messages


def test_a_closure_that_adds_to_earlier_gradients(run_distributed: RunDistributed) -> None:
    for messages in run_distributed(add_to_earlier_gradients, 2):
        refused = ["still part of those it left" in message for message in messages]
        assert refused == [True, False] * 2
        assert messages[1::2] == ["", ""]


def release_partial_gradients(rank: int, how: str) -> str:
    model: nn.Module = network()
    mesh = init_device_mesh("cpu", (WORLD,))
    if how == "flattened":
        model = flattened(True)
    elif how == "tensor parallel":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif how == "offloaded":  # as CPUOffloadPolicy() has it, which needs a GPU
        model = sharded()
        (group,) = fsdp_groups(model.get_submodule("0"))
        group.fsdp_params[0].offload_to_cpu = group.fsdp_params[0].pin_memory = True
    else:
        fully_shard(model.get_submodule("0"), mesh=mesh)
    return step_with_released_gradients(model, rank)


@pytest.mark.parametrize("how", ["flattened", "tensor parallel", "sharded in part", "offloaded"])
def test_released_gradients_that_are_partial_are_refused(
    run_distributed: RunDistributed, how: str
) -> None:
    for message in run_distributed(release_partial_gradients, 2, how):
        assert "leave it False in a distributed job" in message


def skip_by_one_shard(rank: int) -> dict[str, Any]:
    """The element that is not finite lies in one process's shard: all skip."""
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS, skip_nonfinite=True)
    closure = evaluation(opt, model, share(rank))
    before, counts, unchanged = full(model.parameters()), [], []
    for spoiled in ("ascent", "descent", "neither"):
        for phase in ("ascent", "descent"):
            closure()
            if phase == spoiled and rank == 0:
                next(model.parameters()).grad.to_local()[1, 1] = torch.inf
            opt.ascend() if phase == "ascent" else opt.step()
        counts.append(opt.skipped)
        unchanged.append(all(map(torch.equal, full(model.parameters()), before)))
    return {"skipped": counts, "unchanged": unchanged, "params": full(model.parameters())}


def test_all_skip_together(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(skip_by_one_shard, 2)
    assert first["skipped"] == second["skipped"] == [1, 2, 2]
    assert first["unchanged"] == second["unchanged"] == [True, True, False]
    assert all(map(torch.equal, first["params"], second["params"]))


def scale_losses(rank: int) -> dict[str, Any]:
    """scaler.step looks at the local shard; what it finds has to stop every process."""
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    inputs, targets = batch(share(rank))
    before, unchanged = full(model.parameters()), []
    for spoiled in (True, False):
        for phase in ("ascent", "descent"):
            opt.zero_grad()
            scaler.scale((model(inputs) - targets).square().mean()).backward()
            if phase == "descent" and spoiled and rank == 0:
                next(model.parameters()).grad.to_local()[1, 1] = torch.nan
            opt.ascend(grad_scaler=scaler) if phase == "ascent" else scaler.step(opt)
        scaler.update()
        unchanged.append(all(map(torch.equal, full(model.parameters()), before)))
    return {
        "skipped": opt.skipped,
        "unchanged": unchanged,
        "scale": scaler.get_scale(),
        "params": full(model.parameters()),
    }


def test_a_scaler_stops_every_process(run_distributed: RunDistributed) -> None:
    first, second = run_distributed(scale_losses, 2)
    assert first["skipped"] == second["skipped"] == 1
    assert first["unchanged"] == second["unchanged"] == [True, False]
    assert first["scale"] == second["scale"] == 32.0
    assert all(map(torch.equal, first["params"], second["params"]))


def restore(rank: int) -> bool:
    """x and its loss are restored bit for bit: no copy of the perturbed point stays."""
    model = sharded()
    model.set_reshard_after_backward(False)
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    before = full(model.parameters())
    loss = closure().item()
    opt.ascend()
    perturbed = closure().item()
    opt.restore()
    again = closure().item()
    same = all(map(torch.equal, full(model.parameters()), before))
    return same and loss == again and loss != perturbed


def test_shards_are_restored(run_distributed: RunDistributed) -> None:
    assert run_distributed(restore, 2) == [True, True]


def clip(rank: int) -> dict[str, Any]:
    """The norm is that of the whole gradient, not of a shard."""
    model = sharded()
    opt = ef.USAM(model.parameters(), **SETTINGS)
    closure = evaluation(opt, model, share(rank))
    closure()
    opt.ascend()
    closure()
    total = opt.clip_grad_norm_(0.125)
    (total,) = full([total])
    grads = torch.cat([g.flatten() for g in full([p.grad for p in model.parameters()])])
    return {"total": total.item(), "clipped": grads.norm().item()}


def test_clipping_sees_the_whole_gradient(run_distributed: RunDistributed) -> None:
    for result in run_distributed(clip, 2):
        assert result["total"] == pytest.approx(descent_norm_alone(), rel=1e-10)
        assert result["clipped"] == pytest.approx(0.125, rel=1e-4)
