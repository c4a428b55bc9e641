"""The authors' CoResNet, written independently: their names, one convolution a level, the norm after the addition."""

from collections import OrderedDict

import torch
import torch.nn as nn


class Levels(nn.Module):
    """conv2_1, conv2_2, …: one convolution of dilation k for each level k."""

    def __init__(self, channels, widths, stride):
        super().__init__()
        for level, width in enumerate(widths, start=1):
            conv = nn.Conv2d(channels, width, 3, stride, padding=level, dilation=level, bias=False)
            self.add_module(f"conv2_{level}", conv)

    def forward(self, x):
        return torch.cat([conv(x) for conv in self.children()], 1)


WIDTHS = {64: (16, 16, 16, 16), 128: (64, 32, 32), 256: (128, 128)}


class Block(nn.Module):
    def __init__(self, inputs, width, stride, last):
        super().__init__()
        self.last = last
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if width == 512:
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        else:
            self.conv2 = Levels(width, WIDTHS[width], stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if stride != 1 or inputs != 4 * width:
            shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            self.downsample = nn.Sequential(*shortcut)

    def forward(self, x):
        shortcut = self.downsample(x) if hasattr(self, "downsample") else x
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv3(self.bn2(self.conv2(x)).relu())
        x = self.bn3(x + shortcut) if self.last else self.bn3(x) + shortcut
        return x.relu()


def authors_resnet(blocks=(3, 4, 6, 3), classes=1000):
    """A network in evaluation mode, its norms far from their initial values."""
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False), bn1=nn.BatchNorm2d(64), relu=nn.ReLU(), pool=nn.MaxPool2d(3, 2, 1)
    )
    inputs = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        stage_blocks = []
        for number in range(count):
            stride = 2 if stage > 1 and number == 0 else 1
            stage_blocks.append(Block(inputs, width, stride, last=number == count - 1))
            inputs = 4 * width
        layers[f"layer{stage}"] = nn.Sequential(*stage_blocks)
    layers.update(avgpool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(2048, classes))
    net = nn.Sequential(layers)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()
