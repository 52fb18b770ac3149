"""Contexts in which f is evaluated: kernels that can be differentiated, buffers, random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from eigenfilter.curvature.loss.autograd_graph import nodes
from eigenfilter.curvature.loss.cross_entropy import FusedCrossEntropy, is_large

# Operations that are replaced, by the names of their nodes, because torch's second derivative of
# them is missing or wrong (that of weight_norm is not symmetric), or slow.
_NOT_RIGHT = "its fused kernel has no right second derivative"
FUSED_OPERATIONS = {
    "ScaledDotProduct": f"scaled_dot_product_attention runs in its math backend: {_NOT_RIGHT}",
    "CudnnRnn": f"recurrent layers run without cuDNN: {_NOT_RIGHT}",
    "WeightNormInterface": f"weight_norm is written out: {_NOT_RIGHT}",
    "NllLoss": "cross_entropy of many logits has a fused product with its Hessian",
}


class _WeightNorm(TorchFunctionMode):
    """Replaces torch's fused weight normalization by its formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))

        def formula(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
            return v * (g / torch.norm_except_dim(v, 2, dim))

        return formula(*args, **(kwargs or {}))


def replaceable(roots: Iterable[Tensor]) -> set[str]:
    """Return those of `FUSED_OPERATIONS` that are to be replaced in the graph behind `roots`."""
    found = list(nodes(roots))
    names = {node.name() for node in found}
    kinds = {kind for kind in FUSED_OPERATIONS if any(name.startswith(kind) for name in names)}
    return kinds if any(map(is_large, found)) else kinds - {"NllLoss"}


@contextmanager
def differentiable_kernels(replacements: frozenset[str]) -> Iterator[None]:
    """Use operations that can be differentiated, and that give the same with and without gradients.

    The fast path of torch's transformer layers has no derivative and skips padding.
    """
    fast, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if "CudnnRnn" in replacements:
            torch.backends.cudnn.enabled = False
        with ExitStack() as stack:
            if "ScaledDotProduct" in replacements:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if "WeightNormInterface" in replacements:
                stack.enter_context(_WeightNorm())
            if "NllLoss" in replacements:
                stack.enter_context(FusedCrossEntropy())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.cudnn.enabled = cudnn


@contextmanager
def no_requires_grad(tree: nn.Module) -> Iterator[None]:
    """A context in which no parameter requires grad."""
    trained = [p for p in tree.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def spared_buffers(tree: nn.Module) -> Iterator[None]:
    """A context in which modules write to copies of their buffers; graphs keep the originals."""
    own = [(m._buffers, name, b) for m in tree.modules() for name, b in m._buffers.items()]
    copies = {id(b): None if b is None else b.detach().clone() for _, _, b in own}
    try:
        for buffers, name, b in own:
            buffers[name] = copies[id(b)]
        yield
    finally:
        for buffers, name, b in own:
            buffers[name] = b


@contextmanager
def replay_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """A context with the same random numbers each time, after which generators are restored."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield
