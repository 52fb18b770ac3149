"""Lightning and Fabric in two processes, against one process in float64."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import eigenfilter as ef
from marks import rest_slow
from run_distributed import RunDistributed

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from integrations.lightning_problem import trainer_of

pytestmark = pytest.mark.distributed

METHODS: dict[str, Any] = {
    "usam": functools.partial(ef.USAM, lr=0.1, momentum=0.9, rho=0.1),
    "sam": functools.partial(ef.SAM, lr=0.1, momentum=0.9, rho=0.1),
    "two_step_usam": functools.partial(ef.TwoStepUSAM, lr=0.1, rho=0.1),
    "torch's adamw": lambda params: ef.SharpnessAware(torch.optim.AdamW(params, lr=0.1), "sam"),
}
PASSES = {"usam": 2, "sam": 2, "two_step_usam": 3, "torch's adamw": 2}
STEPS = {1: 10, 2: 6}  # of two epochs of five batches, by accumulation


class Environment(ClusterEnvironment):
    """The processes of the fixture `run_distributed`."""

    creates_processes_externally = True
    main_address = "localhost"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


class Net(pl.LightningModule):
    """Without batch norm, so that two halves of a batch are the whole one."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.net.double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return METHODS[self.method](self.parameters())


class Sharded(Net):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        if not hasattr(self, "is_sharded"):
            self.is_sharded = True
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class CountsReductions(pl.Callback):
    """Counts the buckets that DDP reduces: this model is one bucket."""

    def __init__(self) -> None:
        self.count = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.strategy.model.register_comm_hook(None, self.hook)

    def hook(self, state, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations
        self.count += 1
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


def loader(rank: int = 0, ranks: int = 1) -> DataLoader[Any]:
    """Five batches of 12, or of this rank's part of them."""
    gen = torch.Generator().manual_seed(5)
    data = [torch.randn(60, size, generator=gen, dtype=torch.float64) for size in (4, 2)]
    return DataLoader(TensorDataset(*(t[rank::ranks] for t in data)), 12 // ranks)


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        warnings.filterwarnings("ignore", ".*`isinstance.treespec", FutureWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers")
        yield


def weights(module: nn.Module) -> list[Tensor]:
    params = [p.detach() for p in module.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in params]


def fit(
    rank: int, kind: str, method: str, accumulation: int, clips: bool
) -> tuple[list[Tensor], int, float]:
    """Train; return the weights, the number of reductions and the logged loss."""
    module: Net = Sharded(method) if kind == "fsdp2" else Net(method)
    counts = CountsReductions()
    strategy: Any = {
        "one": lambda: "auto",
        "ddp": lambda: DDPStrategy(cluster_environment=Environment()),
        "fsdp2": lambda: model_parallel(ModelParallelStrategy),
    }[kind]()
    options: dict[str, Any] = {"gradient_clip_val": 0.1} if clips else {}
    trainer = trainer_of(
        *([counts] if kind == "ddp" else []),
        strategy=strategy,
        devices=1 if kind == "one" else 2,
        precision="32-true",  # that is: as the module is
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
        **options,
    )
    with quietly():
        trainer.fit(module, loader() if kind == "one" else loader(rank, 2))
    assert trainer.global_step == STEPS[accumulation]
    return weights(module), counts.count, float(trainer.callback_metrics["loss_epoch"])


def model_parallel(kind: Any) -> Any:
    strategy = kind(data_parallel_size=2, tensor_parallel_size=1)
    strategy.cluster_environment = Environment()
    return strategy


@pytest.mark.parametrize("clips", rest_slow([True, False]))
@pytest.mark.parametrize("accumulation", rest_slow([2, 1]))
@pytest.mark.parametrize("method", rest_slow(METHODS))
def test_ddp(run_distributed: RunDistributed, method: str, accumulation: int, clips: bool) -> None:
    """Equal to one process; gradients are reduced once in every pass of a step."""
    expected, _, loss = fit(0, "one", method, accumulation, clips)
    results = run_distributed(fit, 2, "ddp", method, accumulation, clips)
    for found, reductions, found_loss in results:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert reductions == PASSES[method] * STEPS[accumulation]
        assert found_loss == pytest.approx(loss)


@pytest.mark.parametrize("clips", rest_slow([True, False]))
@pytest.mark.parametrize("accumulation", rest_slow([2, 1]))
@pytest.mark.parametrize("method", rest_slow(["sam", "usam", "torch's adamw"]))
def test_fsdp2(
    run_distributed: RunDistributed, method: str, accumulation: int, clips: bool
) -> None:
    expected, _, loss = fit(0, "one", method, accumulation, clips)
    for found, _, found_loss in run_distributed(fit, 2, "fsdp2", method, accumulation, clips):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert found_loss == pytest.approx(loss)


def go_on(rank: int, kind: str, folder: str) -> list[list[Tensor]]:
    """The weights of a whole run, and of one that goes on from a checkpoint."""
    ends = []
    for first, last, source in ((4, None, None), (2, "half", None), (4, None, "half")):
        module: Net = Sharded("usam") if kind == "fsdp2" else Net("usam")
        trainer = trainer_of(
            strategy=DDPStrategy(cluster_environment=Environment())
            if kind == "ddp"
            else model_parallel(ModelParallelStrategy),
            devices=2,
            precision="32-true",
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
            max_epochs=first,
        )
        path = None if source is None else f"{folder}/{source}"
        with quietly():
            trainer.fit(module, loader(rank, 2), ckpt_path=path)
            if last is not None:
                trainer.save_checkpoint(f"{folder}/{last}")
        ends.append(weights(module))
    return [ends[0], ends[2]]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_goes_on_exactly(run_distributed: RunDistributed, kind: str, tmp_path: Path) -> None:
    for whole, resumed in run_distributed(go_on, 2, kind, str(tmp_path)):
        assert all(map(torch.equal, whole, resumed))


def batch_norm(rank: int, callback: bool) -> tuple[Tensor, int]:
    """Train a DDP module with batch norm; return its running mean."""
    module = Net("usam")
    module.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    torch.manual_seed(3)
    for p in module.parameters():
        nn.init.normal_(p)
    if callback:
        trainer = trainer_of(
            strategy=DDPStrategy(cluster_environment=Environment()),
            devices=2,
            precision="32-true",
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
        )
        with quietly():
            trainer.fit(module, loader(rank, 2))
    else:
        ddp = nn.parallel.DistributedDataParallel(module.net)
        opt = module.configure_optimizers()
        batches = list(loader(rank, 2))
        for start in (0, 2, 4) * 2:
            opt.zero_grad()

            def evaluate(start: int = start) -> None:
                window = batches[start : start + 2]
                for n, (inputs, targets) in enumerate(window, 1):
                    with ddp.no_sync() if n < len(window) else nullcontext():
                        (nn.functional.mse_loss(ddp(inputs), targets) / 2).backward()

            evaluate()
            while opt.ascend():
                with ef.freeze_running_stats(module):
                    evaluate()
            opt.step()
    return module.net[1].running_mean, int(module.net[1].num_batches_tracked)


def test_running_statistics_of_each_rank(run_distributed: RunDistributed) -> None:
    """DDP sends those of rank 0 before each forward pass, in the passes after an ascent too."""
    found = run_distributed(batch_norm, 2, True)
    expected = run_distributed(batch_norm, 2, False)
    assert [count for _, count in found] == [10, 10]
    for (a, _), (b, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def with_fabric(rank: int, kind: str, method: str, accumulation: int, clips: bool) -> list[Tensor]:
    torch.set_default_dtype(torch.float64)  # to which Fabric converts what a model returns
    strategy: Any = "auto"
    if kind == "ddp":
        strategy = FabricDDP(cluster_environment=Environment())
    elif kind == "fsdp2":
        strategy = model_parallel(functools.partial(FabricModelParallel, shard))
    with quietly():
        fabric = Fabric(accelerator="cpu", devices=1 if kind == "one" else 2, strategy=strategy)
        fabric.launch()
        net = Net(method).net
        model = fabric.setup_module(net)
        opt: Any = fabric.setup_optimizers(METHODS[method](model.parameters()))
        batches = list(loader() if kind == "one" else loader(rank, 2))
        for _ in range(2):
            for start in range(0, len(batches), accumulation):
                fabric_step(fabric, model, opt, batches[start : start + accumulation], clips)
    torch.set_default_dtype(torch.float32)
    return weights(model)


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    return fully_shard(model, mesh=mesh["data_parallel"])


def fabric_step(fabric: Fabric, model: Any, opt: Any, window: list[Any], clips: bool) -> None:
    def evaluate() -> None:
        for n, (inputs, targets) in enumerate(window, 1):
            with fabric.no_backward_sync(model, enabled=n < len(window)):
                loss = nn.functional.mse_loss(model(inputs), targets) / len(window)
                fabric.backward(loss)

    opt.zero_grad()
    evaluate()
    while opt.ascend():
        evaluate()
    if clips:
        fabric.clip_gradients(model, opt, max_norm=0.1)
    opt.step()


@pytest.mark.parametrize("clips", rest_slow([True, False]))
@pytest.mark.parametrize("accumulation", rest_slow([2, 1]))
@pytest.mark.parametrize("method", rest_slow(["usam", "sam"]))
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_fabric(
    run_distributed: RunDistributed, kind: str, method: str, accumulation: int, clips: bool
) -> None:
    expected = with_fabric(0, "one", method, accumulation, clips)
    for found in run_distributed(with_fabric, 2, kind, method, accumulation, clips):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
