"""Kernels update the local shards of DTensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cases import UPDATES, same_bits
from eigenfilter import _core, kernels

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("wrap", [list, _core.TensorList])
def test_updates_go_to_the_local_shard(mesh: DeviceMesh, wrap: type, placement: object) -> None:
    def lists(count: int) -> list[list[Tensor]]:
        torch.manual_seed(3)
        return [[torch.rand(6, 5) + 0.5 for _ in range(3)] for _ in range(count)]

    for update in UPDATES:
        plain = lists(len(update.lists))
        sharded = [
            [distribute_tensor(t.clone(), mesh, [placement]) for t in each] for each in plain
        ]
        addresses = [t._local_tensor.data_ptr() for t in sharded[0]]
        update(plain)
        update([wrap(each) for each in sharded])
        for each, expected in zip(sharded, plain, strict=True):
            assert all(same_bits(t.to_local(), e) for t, e in zip(each, expected, strict=True))
        assert [t._local_tensor.data_ptr() for t in sharded[0]] == addresses


def test_reductions_read_the_local_shard(mesh: DeviceMesh) -> None:
    plain = [torch.randn(6, 5) for _ in range(3)]
    sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in plain]
    result = torch.zeros(1)
    kernels.flag_nonfinite(sharded, result)
    assert result == 0
    weighted = kernels.norm(sharded, weights=sharded)
    assert weighted.item() == kernels.norm(plain, weights=plain).item()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
def test_gradients_that_are_wider(mesh: DeviceMesh, placement: object) -> None:
    for dtype, wide in ((torch.float16, torch.float32), (torch.float32, torch.float64)):
        x, g, m = (torch.randn(6, 5) for _ in range(3))
        plain = [x.to(dtype), 1e5 * g.to(wide), m.to(dtype)]
        sharded = [distribute_tensor(t.clone(), mesh, [placement]) for t in plain]
        for x, g, m in (plain, sharded):
            scale = torch.tensor(1e5)
            kernels.sgd_step([x], [g], [m], lr=0.3, momentum=0.8, grad_scale=scale)
        assert plain[0].isfinite().all()
        assert all(same_bits(t.to_local(), e) for t, e in zip(sharded, plain, strict=True))
        norm = kernels.norm([sharded[1]], weights=[sharded[0]])
        assert norm == kernels.norm([plain[1]], weights=[plain[0]])


def test_dtensors_and_plain_tensors_in_one_list(mesh: DeviceMesh) -> None:
    params = [torch.ones(4), distribute_tensor(torch.ones(4), mesh, [Shard(0)]), torch.ones(4)]
    kernels.sgd_step(params, [torch.ones(4)] * 3, lr=0.5)
    for p in params:
        local = p.to_local() if isinstance(p, DTensor) else p
        assert torch.equal(local, torch.full((4,), 0.5))


@pytest.mark.parametrize("first", [0, 1])
def test_a_shard_further_on_in_its_memory(mesh: DeviceMesh, first: int) -> None:
    """FSDP2 cuts gradients out of one buffer, so that a shard begins within its storage."""
    buffer = torch.randn(40)
    parts = [buffer[20:25], buffer[:4].view(2, 2)]
    parts = parts[first:] + parts[:first]
    sharded = [DTensor.from_local(t, mesh, [Shard(0)]) for t in parts]
    assert kernels.norm(sharded) == kernels.norm(parts)
    mixed = [parts[0], sharded[1]]
    assert kernels.norm(mixed) == kernels.norm(parts)


def test_errors_name_the_dtensor(mesh: DeviceMesh) -> None:
    x = distribute_tensor(torch.ones(4, dtype=torch.int64), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"params\[0\] is int64"):
        kernels.sgd_step([x], [torch.ones(4)], lr=0.5)
