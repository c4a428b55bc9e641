"""The modules that a deployed network is made of besides torch's own: they hold nothing but plain convolutions."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn as nn
from timm.layers import pad_same

from coconv_surgery.layers.arguments import Pair


class ConvLevels(nn.Module):
    """A contextual convolution written out: a plain convolution for each level, and a concatenation.

    Args:
        levels: The convolutions.
        dim: The dimension of the channels: 1 for ``(N, C, H, W)``, 0 for ``(C, H, W)``. A number from the front,
            because runtimes do not all look for one from behind.
        padding: Of the plain convolution.
        dilation: Of the plain convolution.
    """

    __jit_unused_properties__ = ("weight", "bias")

    def __init__(self, levels: Sequence[nn.Conv2d], dim: int, padding: Pair, dilation: Pair) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.dim = dim
        # What code may ask a convolution for.
        self.in_channels, self.groups = levels[0].in_channels, levels[0].groups
        self.out_channels = sum(level.out_channels for level in levels)
        self.kernel_size, self.stride = levels[0].kernel_size, levels[0].stride
        self.padding, self.dilation, self.padding_mode = padding, dilation, levels[0].padding_mode

    @property
    def weight(self) -> torch.Tensor:
        """The kernels of all levels."""
        return torch.cat([cast(torch.Tensor, level.weight) for level in self.levels])

    @property
    def bias(self) -> torch.Tensor | None:
        """The biases of all levels, if they have any."""
        biases = [cast(torch.Tensor, level.bias) for level in self.levels if level.bias is not None]
        return torch.cat(biases) if biases else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)``, or ``(C, H, W)`` where it was made for that."""
        return torch.cat([level(input) for level in self.levels], dim=self.dim)


class GroupedConvLevels(ConvLevels):
    """The same for a grouped convolution, of whose input channels each level takes its own."""

    def __init__(self, levels: Sequence[nn.Conv2d], dim: int, padding: Pair, dilation: Pair) -> None:
        super().__init__(levels, dim, padding, dilation)
        self.channels = [level.in_channels for level in levels]
        self.in_channels, self.groups = sum(self.channels), sum(level.groups for level in levels)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)``, or ``(C, H, W)`` where it was made for that."""
        pieces = input.split_with_sizes(self.channels, dim=self.dim)
        outputs = []
        for index, level in enumerate(self.levels):
            outputs.append(level(pieces[index]))
        return torch.cat(outputs, dim=self.dim)


class SamePadding(nn.Module):
    """Dynamic "same" padding, as in TensorFlow, before a convolution that does not pad.

    Args:
        kernel_size: Of the convolution, as all that follow.
        stride: Height and width.
        dilation: Height and width.
    """

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = list(kernel_size), list(stride), list(dilation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pad ``(N, C, H, W)``."""
        padded: torch.Tensor = pad_same(input, self.kernel_size, self.stride, self.dilation)
        return padded
