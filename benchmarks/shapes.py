"""The shapes that benchmarks run on, and tensors of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

Shape = tuple[int, ...]


def resnet18() -> list[Shape]:
    """ResNet-18's 62 parameters, 11.7 million elements."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        shapes += _block(channels, width) + _block(width, width)
        channels = width
    return [*shapes, (1000, 512), (1000,)]


def _block(channels: int, width: int) -> list[Shape]:
    norm: list[Shape] = [(width,), (width,)]
    shapes = [(width, channels, 3, 3), *norm, (width, width, 3, 3), *norm]
    return shapes if channels == width else [*shapes, (width, channels, 1, 1), *norm]


def resnet50() -> list[Shape]:
    """ResNet-50's 161 parameters, 25.6 million elements."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(depth):
            out = 4 * width
            for kernel in ((width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)):
                shapes += [kernel, kernel[:1], kernel[:1]]
            if channels != out:
                shapes += [(out, channels, 1, 1), (out,), (out,)]
            channels = out
    # In a model the shortcut comes with its stage's first block; the order is of no account here.
    return [*shapes, (1000, channels), (1000,)]


def vit_b16() -> list[Shape]:
    """ViT-B/16's 152 parameters, 86.6 million elements."""
    d = 768
    shapes: list[Shape] = [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d)]
    for _ in range(12):
        shapes += _transformer_block(d)
    return [*shapes, (d,), (d,), (1000, d), (1000,)]


def gpt2() -> list[Shape]:
    """GPT-2's 148 parameters, 124 million elements."""
    d = 768
    shapes: list[Shape] = [(50257, d), (1024, d)]
    for _ in range(12):
        shapes += _transformer_block(d)
    return [*shapes, (d,), (d,)]


def _transformer_block(d: int) -> list[Shape]:
    attention: list[Shape] = [(3 * d, d), (3 * d,), (d, d), (d,)]
    mlp: list[Shape] = [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(d,), (d,), *attention, (d,), (d,), *mlp]


def small() -> list[Shape]:
    """2,000 tensors of 256: as good as no arithmetic, all overhead."""
    return [(256,)] * 2000


def large(device: torch.device) -> list[Shape]:
    """Four tensors that no cache holds: 50 million elements together, 100 million on a GPU."""
    return [(12_500_000 if device.type == "cpu" else 25_000_000,)] * 4


@dataclass(frozen=True)
class Problem:
    """Parameters and gradients of given shapes: standard normal, the same for every contender."""

    shapes: Sequence[Shape]
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def moved(self, accesses: int) -> int:
        """Bytes moved where every element is read or written `accesses` times."""
        return self.elements * self.dtype.itemsize * accesses

    def tensors(self, seed: int) -> list[Tensor]:
        """New tensors; equal ones for equal seeds."""
        random = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(shape, generator=random, device=self.device).to(self.dtype)
            for shape in self.shapes
        ]

    def parameters(self, seed: int = 0) -> list[Parameter]:
        """New parameters; equal ones for equal seeds."""
        return [Parameter(t) for t in self.tensors(seed)]


def give(params: Sequence[Parameter], gradients: Sequence[Tensor]) -> None:
    """Set every parameter's gradient to a copy of its own, as a backward pass would."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()
