"""ResNet-18 in plain torch, as in He et al. 2015 for ImageNet and as in torchvision: 62 parameters, 11,689,512 elements with 1,000
classes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu


class Basic(nn.Module):
    """Basic residual block: two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inside: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class ResNet18(nn.Module):
    def __init__(self, classes: int = 1000, channels: int = 3):
        super().__init__()
        self.conv1, self.bn1, self.maxpool = nn.Conv2d(channels, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
        widths, inside, layers = (64, 128, 256, 512), 64, []
        for width in widths:
            layers.append(nn.Sequential(Basic(inside, width, 1 if width == 64 else 2), Basic(width, width, 1)))
            inside = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.maxpool(relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean(dim=(2, 3)))
