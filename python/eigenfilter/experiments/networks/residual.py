"""Residual networks for small images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from eigenfilter.experiments.networks import ImageTask


def resnet18(task: ImageTask) -> nn.Module:
    """Return torchvision's ResNet-18 with a 3x3 stem of stride 1 and no pooling, for small images.

    Source: K. He et al., 2016, arXiv 1512.03385.
    """
    from torchvision.models import resnet18 as original

    network: nn.Module = original(num_classes=task.classes)
    network.conv1 = nn.Conv2d(task.shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class WideBlock(nn.Module):
    """x + conv(dropout(relu(norm(conv(relu(norm(x)))))))

    A 1x1 convolution projects x if the shape changes.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        changes = stride != 1 or fan_in != fan_out
        self.project = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(z)
        z = self.conv1(z)
        z = self.conv2(self.dropout(F.relu(self.norm2(z))))
        out: Tensor = shortcut + z
        return out


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks with 16 k, 32 k and 64 k channels."""

    def __init__(self, channels: int, classes: int, depth: int, k: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        fan_in = 16
        for stage, fan_out in enumerate((16 * k, 32 * k, 64 * k)):
            for block in range((depth - 4) // 6):
                stride = 2 if stage and not block else 1
                blocks.append(WideBlock(fan_in, fan_out, stride, dropout))
                fan_in = fan_out
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(fan_in)
        self.head = nn.Linear(fan_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm(self.blocks(self.stem(x))))
        scores: Tensor = self.head(z.mean(dim=(2, 3)))
        return scores


def wide_resnet(task: ImageTask, depth: int, k: int, dropout: float) -> nn.Module:
    """Return WideResNet-depth-k, where depth = 6 n + 4 with n blocks per stage.

    Source: S. Zagoruyko and N. Komodakis, 2016, arXiv 1605.07146.
    """
    return WideResNet(task.shape[0], task.classes, depth, k, dropout)
