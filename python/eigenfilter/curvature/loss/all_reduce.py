"""The sum of products over the data of several processes."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from eigenfilter.curvature.loss.vectors import Sums


def reduce(sums: Sums, marks: list[float], group: dist.ProcessGroup) -> None:
    """Sum over all processes of a group in place, to the same bits in each.

    Args:
        sums: the sums of this process's batches.
        marks: checksums that are equal in all processes if parameters and vectors are.
        group: the processes.

    Raises:
        RuntimeError: the checksums differ, or a process has the weight NaN, which signals that it
            raised an error.
    """
    own = torch.tensor([sums.weight, *marks], dtype=torch.float64, device=sums.rows.device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    weights, *others = torch.stack(everyone, dim=1).tolist()
    if any(map(math.isnan, weights)):
        raise RuntimeError(
            "another process of process_group raised an error about its batches: see that error"
        )
    if any(repr(value) != repr(mark[0]) for mark in others for value in mark):
        raise RuntimeError(
            "parameters, buffers or vectors are not the same in all processes of process_group: "
            "broadcast the model's state, and draw vectors from the same seed"
        )
    sums.weight = sum(weights)
    dist.all_reduce(sums.rows, group=group)
