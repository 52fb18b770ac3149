"""The shapes of the tensors that benchmarks run on."""

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
    # In a model the shortcut is part of its stage's first block. The order does not matter here.
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
    """2,000 tensors of 256 elements: hardly any arithmetic, all overhead."""
    return [(256,)] * 2000


def large(device: torch.device) -> list[Shape]:
    """Four tensors too large for caches: 50 million elements together, 100 million on a GPU."""
    return [(12_500_000 if device.type == "cpu" else 25_000_000,)] * 4


@dataclass(frozen=True)
class TensorProblem:
    """Parameters and gradients of some shapes: standard normal, the same for every contender."""

    shapes: Sequence[Shape]
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """The number of elements of all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def traffic(self, accesses: int) -> int:
        """The bytes that are read and written if every element is accessed `accesses` times."""
        return self.elements * self.dtype.itemsize * accesses

    def tensors(self, seed: int) -> list[Tensor]:
        """Make new tensors; equal seeds give equal values."""
        random = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(shape, generator=random, device=self.device).to(self.dtype)
            for shape in self.shapes
        ]

    def parameters(self, seed: int = 0) -> list[Parameter]:
        """Make new parameters; equal seeds give equal values."""
        return [Parameter(t) for t in self.tensors(seed)]


def set_gradients(params: Sequence[Parameter], gradients: Sequence[Tensor]) -> None:
    """Set each parameter's gradient to a new copy of a tensor, as a backward pass would."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()
