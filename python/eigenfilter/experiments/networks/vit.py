"""A small vision transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eigenfilter.experiments.networks.small import ACTIVATIONS

if TYPE_CHECKING:
    from eigenfilter.experiments.networks import ImageTask

HEAD = 32  # width of an attention head


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: attention, then two fully connected layers, with shortcuts.

    Attention is written out in elementary operations, because fused kernels have no second
    derivatives on some devices.
    """

    def __init__(self, width: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.heads = width // HEAD

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.out(self._attend(self.norm1(x))))
        out: Tensor = x + self.dropout(self.feed(self.norm2(x)))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * HEAD**-0.5).softmax(dim=-1)
        out: Tensor = (weights @ v).transpose(1, 2).reshape(b, t, width)
        return out


class VisionTransformer(nn.Module):
    """Patch embedding, learned positions, transformer blocks, and the mean over patches."""

    def __init__(
        self, task: ImageTask, patch: int, width: int, depth: int, activation: str, dropout: float
    ) -> None:
        super().__init__()
        channels, height, length = task.shape
        self.patches = nn.Conv2d(channels, width, patch, patch)
        places = (height // patch) * (length // patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, places, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, activation, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.head(self.norm(self.blocks(z)).mean(dim=1))
        return scores


def vit(task: ImageTask, width: int, depth: int, activation: str, dropout: float) -> nn.Module:
    """Return a vision transformer over patches of 4x4 pixels, or 2x2 for images below 16x16.

    Raises:
        ValueError: the width is not a multiple of 32, or the patches do not fill the image.

    Source: A. Dosovitskiy et al., 2021, arXiv 2010.11929.
    """
    side = min(task.shape[1:])
    patch = 4 if side >= 16 else 2
    if width % HEAD:
        raise ValueError(f"the width of vit must be a multiple of {HEAD}, not {width}")
    if any(length % patch for length in task.shape[1:]):
        raise ValueError(f"vit needs images whose sides are multiples of {patch}")
    return VisionTransformer(task, patch, width, depth, activation, dropout)
