"""What a step communicates, counted: the table in docs/optimizers.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import eigenfilter as ef
from run_distributed import RunDistributed

pytestmark = pytest.mark.distributed

WORLD = 4
PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
KINDS = ("all-gather", "reduce-scatter", "all-reduce")
OPTIMIZERS: dict[str, Any] = {
    "SGD": ef.SGD,
    "USAM": ef.USAM,
    "SAM": ef.SAM,
    "TwoStepUSAM": ef.TwoStepUSAM,
    "HessianUSAM": ef.HessianUSAM,
}


def table() -> list[list[str]]:
    """The rows of the table on the page."""
    text = PAGE.read_text()
    head = "| wrapper | optimizer | ascents | all-gather | reduce-scatter | all-reduce |\n"
    rows = re.match(r"\|( --- \|)+\n((\|.*\|\n)+)", text[text.index(head) + len(head) :])
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|\n").split("|")] for row in rows[2].splitlines()]


class Traffic(TorchDispatchMode):
    """Counts the bytes of the larger buffer of every collective, by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_collective = func.namespace in ("c10d", "_c10d_functional")
        if is_collective and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            size = max(map(_bytes_of, (*args, result)))
            self.bytes[name] = self.bytes.get(name, 0) + size
        return result


def _bytes_of(arg: Any) -> int:
    if isinstance(arg, Tensor):
        return arg.numel() * arg.element_size()
    return sum(map(_bytes_of, arg)) if isinstance(arg, (list, tuple)) else 0


NAMES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))


def wrap(wrapper: str) -> nn.Module:
    model = network()
    if wrapper == "DDP, buffers":
        model.append(nn.BatchNorm1d(8, affine=False))
    if wrapper.startswith("DDP"):
        return DistributedDataParallel(model)
    if wrapper.startswith("FSDP2"):
        mesh = init_device_mesh("cpu", (WORLD,))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def count(rank: int, wrapper: str, name: str, local: bool, settings: Any = ()) -> dict[str, int]:
    """Bytes of a step, after two others in which DDP orders its buckets."""
    model = wrap(wrapper)
    opt = OPTIMIZERS[name](model.parameters(), lr=0.1, **dict(settings))
    if local:
        ef.ascent_sync(model, opt, enabled=False)
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(rank))

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(inputs).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
    with Traffic() as traffic:
        opt.step(closure)
    return traffic.bytes


@pytest.mark.parametrize("row", table(), ids=lambda row: " ".join(row[:3]))
def test_the_table(run_distributed: RunDistributed, row: list[str]) -> None:
    wrapper, name, ascents, *cells = row
    total = 4 * sum(p.numel() for p in network().parameters())
    expected = {}
    for kind, cell in zip(KINDS, cells, strict=True):
        number = cell.removesuffix(" P")
        assert (cell == "0") == (number == "0")
        if cell != "0":
            expected[kind] = float(number) * total
    for counted in run_distributed(count, WORLD, wrapper, name, ascents == "local"):
        assert {NAMES[name]: size for name, size in counted.items()} == expected


@pytest.mark.parametrize("local", [False, True])
def test_norms_gather_a_number_of_each_shard(run_distributed: RunDistributed, local: bool) -> None:
    wrapper = "HSDP, 2 replicas of 2 shards"
    plain = run_distributed(count, WORLD, wrapper, "USAM", local)[0]
    for counted in run_distributed(count, WORLD, wrapper, "SAM", local):
        assert counted == plain | {"all_gather_into_tensor": 2 * 8}


def test_a_flag_is_one_number(run_distributed: RunDistributed) -> None:
    flagged = (("skip_nonfinite", True),)
    plain = run_distributed(count, WORLD, "DDP", "USAM", True)[0]
    for counted in run_distributed(count, WORLD, "DDP", "USAM", True, flagged):
        assert counted["allreduce_"] - plain["allreduce_"] == 2 * 4


@pytest.mark.parametrize("local", [False, True])
def test_buffers_are_broadcast_once_in_a_step_with_local_ascents(
    run_distributed: RunDistributed, local: bool
) -> None:
    each = 2 * 8 * 4 + 8  # mean and variance, and the number of batches
    for counted in run_distributed(count, WORLD, "DDP, buffers", "TwoStepUSAM", local):
        assert counted["broadcast_"] == (1 if local else 3) * each
