"""Norms over all tensors of all buckets, on every rank that holds a shard of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from eigenfilter import _distributed
from eigenfilter.kernels.conventions import power_of_two
from eigenfilter.optimizers._shards import FLAT_NORM
from eigenfilter.optimizers.buckets import Gradients, ParamBucket, conform_if_needed


def total_norms(
    lists: Sequence[tuple[ParamBucket, Sequence[Tensor]]],
    *,
    weights: bool = False,
    key: str | None = None,
) -> dict[torch.device, Tensor]:
    """Euclidean norm over all tensors of all buckets, as a 0-dim float64 tensor on each device.

    Args:
        lists: buckets, each with tensors like its parameters.
        weights: whether the tensors are multiplied by the parameters first, elementwise.
        key: of the state, if the tensors are the buffers there, which may be codes.
    """
    if any(bucket.is_flat for bucket, _ in lists):
        raise RuntimeError(FLAT_NORM)
    norms: dict[torch.device, list[Tensor]] = {bucket.device: [] for bucket, _ in lists}
    for bucket, tensors in lists:
        scales = None if key is None else bucket.scales(key)
        for placement, indices in bucket.placements:
            some = None if len(bucket.placements) == 1 else indices
            # float64, because the norm of float32 gradients may overflow float32.
            norm = torch.empty((), dtype=torch.float64, device=bucket.device)
            bucket.kernels.norm(
                _at(some, tensors),
                norm,
                weights=_at(some, bucket.tensors) if weights else None,
                momentum_scales=None if scales is None else _at(some, scales),
            )
            norms[bucket.device].append(_distributed.gather_from_shards(norm, placement))
    sums = {device: combined_norm(terms) for device, terms in norms.items()}
    return {device: combined_norm([s.to(device) for s in sums.values()]) for device in sums}


def _at(indices: Sequence[int] | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors at some indices; None: all."""
    return tensors if indices is None else [tensors[i] for i in indices]


def combined_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of tensors that have these norms, safe where their squares overflow float64."""
    if len(norms) == 1 and norms[0].numel() == 1:
        return norms[0].reshape(())
    terms = torch.cat([n.reshape(-1) for n in norms])
    scale = power_of_two(terms.amax())
    return (terms / scale).square().sum().sqrt() * scale


@torch.no_grad()
def clip(gradients: Gradients, max_norm: float) -> Tensor:
    """Clip to a norm in float64, because a narrower one may overflow; return the norm before."""
    norms = total_norms(conform_if_needed(gradients))
    for bucket, _ in gradients:
        factor = (max_norm / (norms[bucket.device] + 1e-6)).clamp(max=1.0)
        local_grads = [_distributed.local(cast(Tensor, p.grad)) for p in bucket.params]
        torch._foreach_mul_(local_grads, factor)
    return next(iter(norms.values()), torch.zeros((), dtype=torch.float64))
