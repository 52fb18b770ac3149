"""skorch's nets against USAM in plain torch."""

from __future__ import annotations

import functools
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigenfilter as ef
from pages import ROOT, run_page
from plain_usam import LR, USAM, Batch, PlainUSAM, WithModes, assert_same, make_batches, make_model

pytest.importorskip("skorch")
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetRegressor
from skorch.callbacks import Callback, EpochScoring, GradientNormClipping

from eigenfilter.integrations.skorch import (
    SharpnessAwareClassifier,
    SharpnessAwareMixin,
    SharpnessAwareRegressor,
)

SIZE, COUNT, EPOCHS = 6, 10, 2
OPTIMIZER = {f"optimizer__{name}": value for name, value in USAM.items()}


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def data() -> Batch:
    x, y = zip(*make_batches(COUNT, SIZE), strict=True)
    return torch.cat(x), torch.cat(y)


class Steps(Callback):
    """Counts the gradients that callbacks see."""

    def __init__(self) -> None:
        self.count = 0

    def on_grad_computed(self, net: Any, **kwargs: Any) -> None:
        assert net.optimizer_.phase == "descent"
        self.count += 1


def make_net(**kwargs: Any) -> SharpnessAwareRegressor:
    settings = {
        "optimizer": ef.USAM,
        "max_epochs": EPOCHS,
        "batch_size": SIZE,
        "train_split": None,
        "verbose": 0,
        "iterator_train__shuffle": False,
        **OPTIMIZER,
    }
    net = SharpnessAwareRegressor(**({"module": Module} | settings | kwargs))
    net.initialize()
    torch.manual_seed(1)
    return net


def epoch(accumulation: int) -> list[list[Batch]]:
    """The windows of an epoch, from a loader: it draws a random number, as skorch's does."""
    batches = list(DataLoader(TensorDataset(*data()), batch_size=SIZE))
    return [batches[start : start + accumulation] for start in range(0, COUNT, accumulation)]


def by_hand(
    accumulation: int, max_norm: float | None = None, validates: bool = False
) -> tuple[nn.Module, list[float]]:
    model = make_model()
    plain = PlainUSAM(model, max_norm)
    torch.manual_seed(1)
    losses = []
    for _ in range(EPOCHS):
        for window in epoch(accumulation):
            losses += plain.step(window)
        if validates:
            epoch(1)
    return model, losses


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_run_is_usam(accumulation: int, max_norm: float | None) -> None:
    callbacks = [GradientNormClipping(max_norm)]
    net = make_net(accumulation_steps=accumulation, callbacks=callbacks)
    net.partial_fit(*data())
    model, losses = by_hand(accumulation, max_norm)
    assert_same(net.module_.layers, model)
    recorded = [loss for epoch in net.history[:, "batches", :, "train_loss"] for loss in epoch]
    torch.testing.assert_close(recorded, losses, rtol=1e-9, atol=0)


def test_callbacks_see_one_gradient_a_step() -> None:
    net = make_net(accumulation_steps=4, callbacks=[("steps", Steps())])
    net.partial_fit(*data())
    assert dict(net.callbacks_)["steps"].count == EPOCHS * 3  # of 4, 4 and 2 batches


def test_without_the_mixin_statistics_and_clipping_differ() -> None:
    """What the mixin is for: skorch's own closure changes both."""
    model, _ = by_hand(1, 0.05)
    net = NeuralNetRegressor(
        Module,
        optimizer=ef.USAM,
        batch_size=SIZE,
        max_epochs=EPOCHS,
        train_split=None,
        verbose=0,
        iterator_train__shuffle=False,
        callbacks=[GradientNormClipping(0.05)],
        **OPTIMIZER,
    )
    net.initialize()
    torch.manual_seed(1)
    net.partial_fit(*data())
    own = net.module_.layers.state_dict()
    assert (own["0.weight"] - model.state_dict()["0.weight"]).abs().max() > 1e-3
    assert own["1.num_batches_tracked"] == 2 * model.state_dict()["1.num_batches_tracked"]


def test_an_optimizer_of_torch_accumulates_too() -> None:
    plain = make_model()
    opt = torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.5)
    torch.manual_seed(1)
    for _ in range(EPOCHS):
        for window in epoch(4):
            opt.zero_grad()
            for x, y in window:
                (nn.functional.mse_loss(plain(x), y) / len(window)).backward()
            opt.step()
    base = functools.partial(torch.optim.SGD, momentum=0.5)
    net = make_net(optimizer=lambda params, lr, **_: base(params, lr=lr), accumulation_steps=4)
    net.partial_fit(*data())
    assert_same(net.module_.layers, plain)


def test_validation_between_epochs_changes_nothing() -> None:
    scoring = EpochScoring("neg_mean_squared_error", on_train=False)
    net = make_net(callbacks=[scoring], accumulation_steps=4)
    net.train_split = lambda dataset, y=None, **_: (dataset, dataset)
    net.partial_fit(*data())
    model, _ = by_hand(4, validates=True)
    assert_same(net.module_.layers, model)


def test_a_run_goes_on_from_its_files(tmp_path: Path) -> None:
    net = make_net(accumulation_steps=4, max_epochs=1)
    net.partial_fit(*data())
    files = {f"f_{part}": tmp_path / part for part in ("params", "optimizer", "history")}
    net.save_params(**files)
    state = torch.get_rng_state()
    other = make_net(accumulation_steps=4, max_epochs=1)
    other.load_params(**files)
    torch.set_rng_state(state)
    other.partial_fit(*data())
    assert_same(other.module_.layers, by_hand(4)[0])


def test_scikit_learns_tools() -> None:
    net = make_net(accumulation_steps=2)
    assert net.get_params()["accumulation_steps"] == 2
    assert clone(net).accumulation_steps == 2
    net.partial_fit(*data())
    again = pickle.loads(pickle.dumps(net))
    assert_same(again.module_.layers, net.module_.layers)
    net.set_params(optimizer__rho=0.0)
    assert net.optimizer_.param_groups[0]["rho"] == 0.0
    search = GridSearchCV(
        make_net(max_epochs=1),
        {"optimizer__rho": [0.0, 0.2], "accumulation_steps": [1, 2]},
        cv=2,
        scoring="neg_mean_squared_error",
    )
    x, y = data()
    search.fit(x.numpy(), y.numpy())
    assert len({round(score, 9) for score in search.cv_results_["mean_test_score"]}) == 4


def test_the_modes_of_a_schedule_free_optimizer() -> None:
    net = make_net(optimizer=WithModes, train_split=lambda dataset, y=None, **_: (dataset, dataset))
    net.partial_fit(*data())
    assert net.optimizer_.calls == ["train", "eval"] * EPOCHS


def test_a_classifier() -> None:
    torch.manual_seed(0)
    net = SharpnessAwareClassifier(
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=-1)),
        optimizer=ef.SAM,
        lr=0.1,
        optimizer__rho=0.05,
        accumulation_steps=2,
        max_epochs=3,
        verbose=0,
    )
    x = torch.randn(60, 4)
    net.fit(x, (x[:, 0] > 0).long())
    losses = net.history[:, "train_loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("steps", [0, 1.5])
def test_a_wrong_number_of_steps_is_refused(steps: float) -> None:
    with pytest.raises(ValueError, match="accumulation_steps is a positive integer"):
        make_net(accumulation_steps=steps)


@pytest.mark.parametrize("steps", [0, -1, 1.5])
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_wrong_number_of_steps_is_refused_after_initialize(method: str, steps: float) -> None:
    net = make_net(warm_start=True).set_params(accumulation_steps=steps)
    before = [p.detach().clone() for p in net.module_.parameters()]
    dataset = TensorDataset(*data())
    with pytest.raises(ValueError, match="accumulation_steps is a positive integer"):
        getattr(net, method)(dataset, None)
    assert all(map(torch.equal, before, net.module_.parameters()))
    net.set_params(accumulation_steps=2)
    net.partial_fit(dataset, None)
    assert not torch.equal(before[0], next(net.module_.parameters()))


def test_released_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="release_gradients=True applies each gradient"):
        make_net(optimizer__release_gradients=True)


def test_several_optimizers_are_refused() -> None:
    class TwoOptimizers(SharpnessAwareMixin):
        def initialize_optimizer(self, triggered_directly: bool | None = None) -> Any:
            super().initialize_optimizer()
            self.second_optimizer_ = ef.USAM(self.module_.parameters(), lr=0.1)
            return self

    net = TwoOptimizers(Module, nn.MSELoss, optimizer=ef.USAM, second_optimizer=ef.USAM)
    with pytest.raises(TypeError, match="takes one optimizer"):
        net.initialize()


def test_accelerate_is_refused() -> None:
    class Accelerated(SharpnessAwareMixin):
        accelerator = None

    with pytest.raises(TypeError, match="calls backward itself"):
        Accelerated(Module, nn.MSELoss).initialize()


def test_a_net_may_change_its_batch() -> None:
    class Replacing(SharpnessAwareRegressor):
        def train_step_single(self, batch: Any, **fit_params: Any) -> Any:
            batch[0]["x"] = batch[0]["x"].add_(1)
            return super().train_step_single(batch, **fit_params)

    nets = []
    x, y = data()
    for cls, shift in ((Replacing, 0.0), (SharpnessAwareRegressor, 1.0)):
        torch.manual_seed(1)
        net = cls(Module, optimizer=ef.USAM, train_split=None, verbose=0, **OPTIMIZER)
        nets.append(net.initialize())
        net.partial_fit({"x": x + shift}, y)
    first, second = (list(net.module_.parameters()) for net in nets)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Failing(Callback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_grad_computed(self, net: Any, **kwargs: Any) -> None:
        assert net.optimizer_.perturbed
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_callback_that_fails_before_the_step_leaves_x(error: type[BaseException]) -> None:
    net = make_net(callbacks=[("failing", Failing(error))])
    before = [p.detach().clone() for p in net.module_.parameters()]
    swallows = error is KeyboardInterrupt  # as skorch does, to end a training early
    with nullcontext() if swallows else pytest.raises(error):
        net.partial_fit(*data())
    assert not net.optimizer_.perturbed
    assert all(map(torch.equal, before, net.module_.parameters()))


def test_the_page_runs(tmp_path: Path) -> None:
    assert "accuracy" in run_page(ROOT / "docs/integrations/skorch.md", tmp_path)
