"""The steps of a Trainer, its counts, and its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from eigenfilter.experiments import datasets
from eigenfilter.experiments.config import Config
from eigenfilter.experiments.trainer import Trainer
from experiments.test_train import SMALL, Killed, assert_same


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_is_the_optimizers(channels_last: bool) -> None:
    """The step uses the right batch, frozen statistics and clipping."""
    config = Config(
        **SMALL | {"model": "wrn-10-1", "batch_size": 16, "optimizer": "usam"},
        clip=0.3,
        channels_last=channels_last,
    )
    data = datasets.load("digits")
    trainer = Trainer(config, data, torch.device("cpu"))
    twin = Trainer(config, data, torch.device("cpu"))
    trainer.advance()
    images, labels = twin._batches.batch(0, 0)
    model, optimizer = twin.model, twin.optimizer
    for perturbed in (False, True):
        if perturbed:
            optimizer.ascend()
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 0.0
        torch.nn.functional.cross_entropy(model(images), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    for (name, a), b in zip(
        trainer.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        if "num_batches" not in name:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert trainer.drain()["loss"] > 0


def test_evaluation_uses_all_images() -> None:
    trainer = Trainer(Config(**SMALL), datasets.load("digits"), torch.device("cpu"))
    metrics = trainer.evaluate()
    data = trainer.data
    images = trainer._normalizer(data.test_images)
    with torch.no_grad():
        scores = trainer.model(images)
    loss = torch.nn.functional.cross_entropy(scores.double(), data.test_labels)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["accuracy"] == float((scores.argmax(1) == data.test_labels).double().mean())


def test_an_exception_within_a_step_leaves_the_weights_at_x() -> None:
    trainer = Trainer(Config(**SMALL), datasets.load("digits"), torch.device("cpu"))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    loss_fn, calls = trainer.loss_fn, iter((False, True))

    def failing(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls):
            raise Killed
        return loss_fn(scores, labels)

    trainer.loss_fn = failing
    with pytest.raises(Killed):
        trainer.advance()
    assert not trainer.optimizer.perturbed
    assert_same(before, [p.detach() for p in trainer.model.parameters()])


def test_a_state_of_another_model() -> None:
    data = datasets.load("digits")
    state = Trainer(Config(**SMALL), data, torch.device("cpu")).state_dict()
    other = Trainer(Config(**SMALL | {"model": "mlp-13"}), data, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"size mismatch for 1\.weight"):
        other.load_state_dict(state)


def steps(count: int, **options: Any) -> Trainer:
    """Return a trainer after a number of steps."""
    config = Config(**SMALL | {"activation": "tanh"} | options)
    trainer = Trainer(config, datasets.load("digits"), torch.device("cpu"))
    for _ in range(count):
        trainer.advance()
    return trainer


@pytest.mark.parametrize(
    ("options", "gradients"),
    [
        ({"optimizer": "sgd"}, 6.0),
        ({"optimizer": "usam"}, 12.0),
        ({"optimizer": "usam", "rho_schedule": "every", "rho_every": 3}, 8.0),
        ({"optimizer": "two_step_usam"}, 18.0),
        ({"optimizer": "hessian_usam", "rho": 1e-3, "ascent_part": 0.25}, 9.0),
        ({"optimizer": "usam", "ascent_part": 0.25}, 7.5),
        ({"optimizer": "usam", "ascent_part": 0.001}, 6.0 + 6 / 32),
    ],
)
def test_gradients_are_counted(options: dict[str, Any], gradients: float) -> None:
    trainer = steps(6, **options)
    assert trainer.gradients == gradients
    other = steps(0, **options)
    other.load_state_dict(trainer.state_dict())
    assert other.gradients == gradients


def test_ascents_may_take_a_part_of_the_batch() -> None:
    """The ascent uses the first images of the batch, and the descent uses all."""
    trainer, twin = steps(1, optimizer="usam", ascent_part=0.25), steps(0, optimizer="usam")
    images, labels = twin._batches.batch(0, 0)
    for some in (slice(8), slice(32)):
        scores = twin.model(images[some])
        loss = torch.nn.functional.cross_entropy(scores, labels[some])
        torch.autograd.backward(loss)
        if some.stop == 8:
            accuracy = float((scores.argmax(dim=1) == labels[some]).double().mean())
            first = float(loss.detach())
            assert twin.optimizer.ascend()
    twin.optimizer.step()
    assert_same(
        [p.detach() for p in twin.model.parameters()],
        [p.detach() for p in trainer.model.parameters()],
    )
    assert trainer.drain() == {"loss": first, "accuracy": accuracy}


def test_an_extrapolated_network_is_evaluated_at_x() -> None:
    options: dict[str, Any] = {"optimizer": "sgd", "extrapolation": 0.5, "lr": 0.01}
    trainer, plain = steps(4, **options), steps(0, optimizer="sgd")
    state = trainer.optimizer.state
    with torch.no_grad():
        pairs = zip(plain.model.parameters(), trainer.model.parameters(), strict=True)
        for x, y in pairs:
            x.copy_(y + 0.5 * state[y]["momentum_buffer"])
    measured = plain.evaluate()
    assert trainer.evaluate() == measured
    plain.model.load_state_dict(trainer.model.state_dict())
    assert plain.evaluate() != measured
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.evaluate()
    assert_same(before, [p.detach() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"optimizer": "adamw", "extrapolation": 0.05, "lr": 0.01}, "extrapolation"),
        ({"optimizer": "sgd", "extrapolation": 0.05, "lr": 0.01}, "extrapolation"),
        ({"optimizer": "msam", "rho": 2.0, "lr": 0.01}, "rho"),
    ],
)
def test_an_evaluation_is_at_x_and_changes_nothing(options: dict[str, Any], wanted: str) -> None:
    """Not even where a controller or a schedule has just set another e, or another rho."""
    trainer = steps(4, **options)
    [group] = trainer.optimizer.param_groups
    group[wanted] *= 3
    before = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
    measured = trainer.evaluate()
    assert_same(before, (trainer.model.state_dict(), trainer.optimizer.state_dict()))
    plain = steps(0, optimizer="sgd")
    plain.model.load_state_dict(trainer.model.state_dict())
    assert plain.evaluate() != measured
    trainer.optimizer.eval()
    plain.model.load_state_dict(trainer.model.state_dict())
    assert plain.evaluate() == measured


STATES: dict[str, dict[str, Any]] = {
    **{model: {"model": model} for model in ("cnn-2", "wrn-10-1", "vit-32")},
    **{name: {"optimizer": name} for name in ("sgd", "asam", "two_step_usam", "hessian_usam")},
    **{
        f"torch.optim.{name}": {"optimizer": f"torch.optim.{name}", "lr": 1e-3}
        for name in ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "NAdam", "Rprop", "SGD")
    },
    "no momentum": {"optimizer": "sgd", "momentum": 0.0},
    "extrapolation": {"optimizer": "sgd", "extrapolation": 0.05},
    "adamw, extrapolation": {"optimizer": "adamw", "extrapolation": 0.05, "lr": 0.01},
    "schedules": {"lr_schedule": "cosine", "warmup": 1, "rho_schedule": "every", "rho_every": 2},
    "rho follows lr": {"lr_schedule": "cosine", "warmup": 1, "rho_schedule": "lr"},
    "ascent_rho follows lr": {
        "optimizer": "torch.optim.Adadelta",
        "method": "sam",
        "lr": 0.5,
        "rho_schedule": "lr",
    },
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("steps", [0, 3])
def test_every_state_is_that_of_its_trainer(name: str, steps: int) -> None:
    """A state with the right structure is loaded; one without an entry is rejected."""
    config = Config(
        **{"model": "mlp-4", "samples": 32, "batch_size": 16, "epochs": 2} | STATES[name]
    )
    data = datasets.load("digits")
    trainer, other = (Trainer(config, data, torch.device("cpu")) for _ in range(2))
    for _ in range(steps):
        trainer.advance()
    state = copy.deepcopy(trainer.state_dict())
    if state["optimizer"]["state"]:
        broken = state | {"optimizer": dict(state["optimizer"])}
        broken["optimizer"]["state"] = dict(list(state["optimizer"]["state"].items())[1:])
        before = [p.detach().clone() for p in other.model.parameters()]
        with pytest.raises(ValueError, match="state of optimizer of the trainer has no entry 0"):
            other.load_state_dict(broken)
        assert_same(before, [p.detach() for p in other.model.parameters()])
    other.load_state_dict(state)
    for each in (trainer, other):
        each.advance()
    assert_same(trainer.state_dict(), other.state_dict())
