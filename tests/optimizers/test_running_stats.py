"""freeze_running_stats: buffers are those of x, outputs those of a model that is not frozen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import eigenfilter as ef

Buffers = dict[str, tuple[Tensor, Tensor]]


class InPlaceAverage(nn.Module):
    """A moving average that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.9).add_(x.mean(dim=0), alpha=0.1)
        return x - self.average.clone()


class ReplacedAverage(nn.Module):
    """A moving average that is another tensor each time, beside buffers that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("first", None)
        self.register_buffer("passing", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.mean(dim=0).detach()
        if self.first is None:
            self.first = x.mean().detach()
        if hasattr(self, "passing"):
            del self.passing
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(2))
        return x - self.average


class Resized(nn.Module):
    """A range without elements that the first pass gives some, as quantization observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        least = x.detach().amin(dim=0)
        if self.least.numel() == 0:
            self.least.resize_(least.shape).copy_(least)
        self.least.copy_(torch.minimum(self.least, least))
        return x - self.least.clone()


class Constants(nn.Module):
    """Buffers of all kinds that nothing writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expanded", torch.arange(4.0).expand(3, 4))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls the layout a beta
            self.register_buffer("compressed", torch.eye(3).to_sparse_csr())
        self.register_buffer("elsewhere", torch.ones(2, device="meta"))
        self.register_buffer("empty", torch.ones(0, 3))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def spectral_norm_by_hooks() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(nn.Linear(6, 6))


def fake_quantization() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.ao.quantization import FakeQuantize

        return FakeQuantize()


def lazy_batch_norm() -> nn.Module:
    layer = nn.LazyBatchNorm1d()
    layer(torch.randn(5, 6))
    return layer


class OverImages(nn.Module):
    """A layer for images, on six channels of two pixels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        image = torch.stack([x, x.sin()], dim=2)[..., None]
        return self.layer(image).sum(dim=(2, 3)) + image[..., 0, 0]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "synchronized": lambda: nn.SyncBatchNorm(6),
    "lazy": lazy_batch_norm,
    "instance norm": lambda: OverImages(nn.InstanceNorm2d(6, track_running_stats=True)),
    "spectral norm by hooks": spectral_norm_by_hooks,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "quantization": fake_quantization,
    "in place": InPlaceAverage,
    "replaced": ReplacedAverage,
    "resized": Resized,
}


def network(name: str) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), LAYERS[name](), nn.Tanh(), nn.Linear(6, 2))


def batch() -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(4)) + 1


def buffers(model: nn.Module) -> Buffers:
    return {name: (t, t.detach().clone()) for name, t in model.named_buffers()}


def assert_unchanged(model: nn.Module, before: Buffers) -> None:
    now = dict(model.named_buffers())
    assert now.keys() == before.keys()
    for name, (t, value) in before.items():
        assert now[name] is t, name
        assert t.shape == value.shape, name
        assert torch.equal(t, value), name


def changes(model: nn.Module, before: Buffers) -> bool:
    now = dict(model.named_buffers())
    return now.keys() != before.keys() or not all(
        torch.equal(now[name], value) for name, (_, value) in before.items()
    )


@pytest.mark.parametrize("primed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_buffers_stay_and_outputs_do_not_change(name: str, primed: bool) -> None:
    model, data = network(name), batch()
    if primed:
        model(data)
    other = network(name)
    if primed:
        other(data)
    before = buffers(model)
    with ef.freeze_running_stats(model):
        frozen = model(data * 3)
        assert changes(model, before)
    assert_unchanged(model, before)
    assert torch.equal(frozen, other(data * 3))
    assert torch.equal(model(data * 3), frozen)
    assert changes(model, before)


@pytest.mark.parametrize("name", LAYERS)
def test_an_error_and_nesting(name: str) -> None:
    model, data = network(name), batch()
    model(data)
    before = buffers(model)

    def fail() -> None:
        with ef.freeze_running_stats(model):
            model(data * 3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_unchanged(model, before)
    with ef.freeze_running_stats(model):
        model(data * 2)
        inner = buffers(model)
        with ef.freeze_running_stats(model):
            model(data * 3)
        assert_unchanged(model, inner)
        model(data)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"spectral norm by hooks"}))
def test_a_step_leaves_the_statistics_of_x(name: str) -> None:
    model, data = network(name), batch()
    model(data)
    plain = copy.deepcopy(model)
    opt = ef.TwoStepUSAM(model.parameters(), lr=0.1, rho=5.0)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(data * 2).square().mean()
        loss.backward()
        return loss

    closure()
    while opt.ascend():
        with ef.freeze_running_stats(model):
            closure()
    opt.step()
    plain(data * 2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for (key, t), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(t, expected), key


@pytest.mark.parametrize("name", ["batch norm", "cumulative", "instance norm", "spectral norm"])
def test_a_graph_may_be_differentiated_outside(name: str) -> None:
    model, data = network(name), batch()
    other = network(name)
    with ef.freeze_running_stats(model):
        loss = model(data).square().sum()
    loss.backward()
    other(data).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_what_a_graph_needs_is_not_changed_unseen() -> None:
    model = nn.Linear(6, 6)
    model.register_buffer("scale", torch.ones(6))
    x = torch.randn(3, 6)
    with ef.freeze_running_stats(model):
        model.scale.add_(1)
        loss = (model(x) * model.scale).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_buffers_that_nothing_writes_to() -> None:
    model, data = Constants(), batch()
    before = dict(model.named_buffers())
    with ef.freeze_running_stats(model):
        assert torch.equal(model(data), data * 2)
    assert all(t is before[name] for name, t in model.named_buffers())
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


class MomentumEncoder(nn.Module):
    """An encoder that follows another one in the forward pass."""

    def __init__(self, *, replaced: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6)
        self.key.requires_grad_(False)
        self.replaced = replaced

    def forward(self, x: Tensor) -> Tensor:
        for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
            if self.replaced:
                mine.data = mine.data * 0.9 + other.data * 0.1
            else:
                mine.data.mul_(0.9).add_(other.data, alpha=0.1)
        return self.query(x) - self.key(x)


@pytest.mark.parametrize("replaced", [False, True])
def test_parameters_that_are_not_trained_are_kept_on_request(replaced: bool) -> None:
    torch.manual_seed(3)
    model, data = MomentumEncoder(replaced=replaced), batch()
    originals = [(p, p.detach().clone()) for p in model.key.parameters()]
    with ef.freeze_running_stats(model, parameters=True):
        frozen = model(data)
        assert not any(torch.equal(p, before) for p, before in originals)
    frozen.sum().backward()
    now = list(model.key.parameters())
    assert all(
        p is q and torch.equal(p, before) for q, (p, before) in zip(now, originals, strict=True)
    )
    assert torch.equal(model(data), frozen)
    with ef.freeze_running_stats(model):
        model(data)
    assert not any(torch.equal(p, before) for p, before in originals)


def test_in_evaluation_mode_nothing_changes() -> None:
    model, data = network("batch norm"), batch()
    model(data)
    model.eval()
    expected = model(data)
    with ef.freeze_running_stats(model):
        assert torch.equal(model(data), expected)
        assert not model.training
    assert torch.equal(model(data), expected)


def test_a_buffer_that_two_modules_share() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].running_mean = model[0].running_mean
    before = buffers(model)
    with ef.freeze_running_stats(model):
        model(batch())
    assert_unchanged(model, before)
    assert model[1].running_mean is model[0].running_mean


def test_called_through_functional_call_and_a_compiler() -> None:
    model, data = network("batch norm"), batch()
    compiled = torch.compile(model, backend="eager")
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    before = buffers(model)
    with ef.freeze_running_stats(model):
        torch.func.functional_call(model, own, (data,))
    assert_unchanged(model, before)
    with ef.freeze_running_stats(compiled):
        compiled(data)
    assert_unchanged(model, before)


def test_layers_that_track_nothing_stay_so() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False))
    with ef.freeze_running_stats(model):
        model(batch())
    assert not model[1].track_running_stats
    assert model[1].running_mean is None


def test_a_lazy_layer_without_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyBatchNorm1d())
    with (
        pytest.raises(RuntimeError, match="run one batch through the model before"),
        ef.freeze_running_stats(model),
    ):
        pass
    model(batch())
    before = buffers(model)
    with ef.freeze_running_stats(model):
        model(batch())
    assert_unchanged(model, before)


def test_the_former_name() -> None:
    assert ef.freeze_batch_norm is ef.freeze_running_stats


class Keeping(nn.Module):
    """A module that keeps its last batch in a buffer, not a copy of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3, 4))
        self.layer = nn.Linear(4, 2)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "data":
            self.last.data = x.data
        else:
            with torch.no_grad():
                self.last.set_(x)
        return self.layer(x)


@pytest.mark.parametrize("how", ["data", "set_"])
def test_a_batch_that_became_a_buffer_keeps_its_values(how: str) -> None:
    model, x = Keeping(how), torch.randn(3, 4)
    before, memory = x.clone(), model.last.data_ptr()
    with ef.freeze_running_stats(model):
        model(x)
    assert torch.equal(x, before)
    assert not model.last.any()
    assert model.last.data_ptr() == memory


def test_buffers_that_are_conjugate_or_negative_views() -> None:
    model = nn.Module()
    model.register_buffer("phase", torch.polar(torch.ones(3), torch.arange(3.0)).conj())
    model.register_buffer("minus", torch._neg_view(torch.ones(3)))
    before = [b.clone() for b in model.buffers()]
    with ef.freeze_running_stats(model):
        for b in model.buffers():
            b.mul_(2.0)
    assert all(map(torch.equal, model.buffers(), before))
