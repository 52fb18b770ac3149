"""The sharpest directions of a model with distributed data and, with --fsdp, sharded parameters.

    torchrun --standalone --nproc-per-node 2 examples/curvature_torchrun.py
    torchrun --standalone --nproc-per-node 2 examples/curvature_torchrun.py --fsdp

Every process reads its own samples. With DistributedDataParallel each process has whole vectors,
and products are exact. With FSDP2 it has slices of vectors, and products are finite differences.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from eigenfilter import curvature

K = 3


def network(device: torch.device) -> nn.Sequential:
    """Build the same network in all processes, from the same seed."""
    torch.manual_seed(0)
    layers = [nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)]
    return nn.Sequential(*layers).to(device)


def own_share(rank: int, size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Load every size-th sample in a fixed order.

    The DistributedSampler that is usual in training would pad and shuffle the samples.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(501, 20, generator=generator)
    data = TensorDataset(x, x[:, :5].argmax(dim=1))
    return DataLoader(Subset(data, range(rank, len(data), size)), batch_size=64)


def operator(fsdp: bool, device: torch.device) -> curvature.HessianOperator:
    """Return the Hessian over the data of all processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, loss, data = network(device), nn.CrossEntropyLoss(), own_share(rank, size)
    if not fsdp:
        wrapped = DistributedDataParallel(model)
        group = dist.group.WORLD
        return curvature.HessianOperator(wrapped, loss, data, process_group=group)
    mesh = init_device_mesh(device.type, (size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return curvature.HessianOperator(model, loss, data, engine="finite_difference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="shard parameters and vectors")
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    op = operator(args.fsdp, device)
    result = curvature.eigsh(op, K, tol=1e-3)
    print(
        f"process {dist.get_rank()}: {len(result.vectors):,} of {op.shape[0]:,} elements per "
        f"vector; eigenvalues {' '.join(f'{value:.3f}' for value in result.values.tolist())}",
        flush=True,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # torch's caches for FSDP2 keep the process group alive. If a thread of Gloo still holds a
    # tensor when the interpreter shuts down, torch aborts the process (pytorch/pytorch#190489).
    # Exiting here avoids the shutdown.
    sys.stdout.flush()
    os._exit(0)
