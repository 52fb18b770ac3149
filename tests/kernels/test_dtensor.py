"""DTensors go by their local shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cases import same_bits
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
    def lists(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [torch.randn(6, 5) for _ in range(3)]

    plain = [lists(seed) for seed in range(4)]
    sharded = [[distribute_tensor(t, mesh, [placement]) for t in lists(i)] for i in range(4)]
    addresses = [t._local_tensor.data_ptr() for t in sharded[0]]
    for x, g, m, b in (plain, [wrap(tensors) for tensors in sharded]):
        kernels.ascend(x, g, b, 0.2)
        kernels.descend(x, g, m, b, lr=0.1, momentum=0.9, weight_decay=0.01)
    for role in (0, 2, 3):
        for t, expected in zip(sharded[role], plain[role], strict=True):
            assert same_bits(t.to_local(), expected)
    assert [t._local_tensor.data_ptr() for t in sharded[0]] == addresses
    found = torch.zeros(1)
    kernels.flag_nonfinite(sharded[0], found)
    assert found == 0


def test_dtensors_and_plain_tensors_in_one_list(mesh: DeviceMesh) -> None:
    params = [torch.ones(4), distribute_tensor(torch.ones(4), mesh, [Shard(0)]), torch.ones(4)]
    kernels.descend(params, [torch.ones(4)] * 3, lr=0.5)
    for p in params:
        local = p.to_local() if isinstance(p, DTensor) else p
        assert torch.equal(local, torch.full((4,), 0.5))


def test_errors_name_the_dtensor(mesh: DeviceMesh) -> None:
    x = distribute_tensor(torch.ones(4, dtype=torch.int64), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"params\[0\] is int64"):
        kernels.descend([x], [torch.ones(4)], lr=0.5)
