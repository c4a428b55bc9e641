"""The convolutions of a block: those that levels can be of."""

from typing import Any

import torch.nn as nn

from coconv_surgery.layers.conv import CoConv2d


def is_contextual(module: nn.Module) -> bool:
    """Whether a module is or holds a contextual convolution."""
    return any(isinstance(sub, CoConv2d) for sub in module.modules())


def spatial_convs(block: nn.Module) -> list[nn.Conv2d]:
    """Those that see more than one pixel."""
    return [module for module in block.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]


def plain_convs(block: nn.Module) -> list[nn.Conv2d]:
    """Those of them without levels."""
    return [conv for conv in spatial_convs(block) if not isinstance(conv, CoConv2d)]


def kind(conv: nn.Conv2d) -> tuple[Any, ...]:
    """The kernel's size and the levels: convolutions of one kind can be summed."""
    return conv.kernel_size, getattr(conv, "dilations", None), getattr(conv, "splits", None)


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether only the centre of the kernel counts, as in an identity or a 1×1 convolution padded with zeros."""
    if isinstance(conv, CoConv2d) or conv.weight.is_meta:
        return False
    height, width = conv.kernel_size
    centre = conv.weight[..., height // 2, width // 2]
    return bool(conv.weight.count_nonzero() == centre.count_nonzero())
