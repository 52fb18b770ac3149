"""Small networks to train, each with one batch of random data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, IMAGES = 10, 32
VOCABULARY, LENGTH, TEXTS = 512, 64, 8


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution if the width changes."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = 1 if width == channels else 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, channels, h, w] to [n, width, h / stride, w / stride]."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(widths: Sequence[int], stride: int = 1) -> nn.Module:
    """ResNet for 32x32 images, with a residual block from each width to the next."""
    return nn.Sequential(
        nn.Conv2d(3, widths[0], 3, stride, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
        *(Residual(channels, width) for channels, width in pairwise(widths)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], CLASSES),
    )


def resnet8() -> nn.Module:
    """ResNet-8: widths 16, 32 and 64; 78,042 parameters."""
    return resnet((16, 16, 32, 64))


def resnet18() -> nn.Module:
    """A ResNet-18 of 8 blocks, most of width 512, at half the resolution; 23,785,802 parameters."""
    return resnet((64, 64, 128, 256, *5 * [512]), stride=2)


class Block(nn.Module):
    """Causal attention and an MLP, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, length, width] to the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        values = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(values.transpose(1, 2).flatten(-2))
        change: Tensor = self.mlp(self.norm2(x))
        return x + change


class GPT(nn.Module):
    """A decoder of 4 layers, width 128, 4 heads, GELU; 932,608 parameters."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [n, length] to logits [n, vocabulary, length]."""
        x: Tensor = self.tokens(tokens) + self.positions.weight
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.transpose(1, 2)


@dataclass(frozen=True)
class Network:
    """A network and its batch; the loss is the cross-entropy of `model(inputs)` and `labels`."""

    summary: str
    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]

    def build(self, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        """Return a new model with inputs and labels, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().to(device)
            inputs, labels = self.data()
        return model, inputs.to(device), labels.to(device)


NETWORKS = {
    "resnet": Network(
        "ResNet-8 on 32 images",
        resnet8,
        lambda: (torch.randn(IMAGES, 3, 32, 32), torch.randint(CLASSES, (IMAGES,))),
    ),
    "gpt": Network(
        "4-layer GPT on 8 x 64 tokens",
        GPT,
        lambda: tuple(torch.randint(VOCABULARY, (2, TEXTS, LENGTH))),
    ),
}
