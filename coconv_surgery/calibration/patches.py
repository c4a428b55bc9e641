"""What a convolution sees at some positions of its output, and what it puts there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from coconv_surgery.layers.functional import Dilation, level_padding, pair
from coconv_surgery.tracing.signature import Signature


class Positions(NamedTuple):
    """Positions of a map, ``(P,)`` each.

    Attributes:
        image: Which image of the batch.
        row: Its row.
        column: Its column.
    """

    image: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


class Level(NamedTuple):
    """One level of a convolution.

    Attributes:
        dilation: Its dilation.
        channels: Its output channels.
        groups: Its groups, of those of the plain convolution.
    """

    dilation: Dilation
    channels: slice
    groups: slice


def each_level(conv: Signature, dilations: Sequence[Dilation], splits: Sequence[int]) -> list[Level]:
    """The levels of a convolution, one by one."""
    found, start = [], 0
    for dilation, channels in zip(dilations, splits, strict=True):
        stop = start + channels
        per_group = conv.out_channels // conv.groups
        groups = slice(0, 1) if conv.groups == 1 else slice(start // per_group, stop // per_group)
        found.append(Level(dilation, slice(start, stop), groups))
        start = stop
    return found


def sample_positions(shape: torch.Size, limit: int, seed: int, device: torch.device) -> Positions:
    """Choose positions of a map at random, the same ones for the same seed.

    Args:
        shape: ``(N, C, H, W)`` of the map.
        limit: How many at most.
        seed: Decides which.
        device: Where they are used.
    """
    images, _, height, width = shape
    total = images * height * width
    chosen = torch.arange(total)
    if total > limit:
        chosen = torch.randperm(total, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:limit]
    chosen = chosen.to(device)
    return Positions(chosen // (height * width), chosen // width % height, chosen % width)


def values_at(map: torch.Tensor, at: Positions) -> torch.Tensor:
    """Read a map ``(N, C, H, W)``.

    Returns:
        ``(P, C)``, in single precision or better.
    """
    return wide(map.permute(0, 2, 3, 1)[at])


def patches_at(input: torch.Tensor, conv: Signature, level: Level, at: Positions) -> torch.Tensor:
    """What the kernels of a level are multiplied with.

    Args:
        input: ``(N, C, H, W)``.
        conv: The plain convolution.
        level: The level.
        at: Positions of the output.

    Returns:
        ``(groups, P, C / groups · kH · kW)`` in the order of a flattened kernel, in single precision or better.
    """
    (kernel_h, kernel_w), (step_h, step_w), (dilation_h, dilation_w) = (
        conv.kernel_size,
        conv.stride,
        pair(level.dilation),
    )
    pad_h, pad_w = level_padding(conv.kernel_size, conv.padding, conv.dilation, pair(level.dilation))
    width = conv.in_channels // conv.groups
    if conv.groups > 1:
        input = input[:, level.groups.start * width : level.groups.stop * width]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(input, (pad_w, pad_w, pad_h, pad_h), mode=mode).permute(0, 2, 3, 1).contiguous()
    row, column = at.row * step_h, at.column * step_w
    taps = [
        padded[at.image, row + i * dilation_h, column + j * dilation_w]
        for i in range(kernel_h)
        for j in range(kernel_w)
    ]
    patches = wide(torch.stack(taps, dim=-1))
    return patches.view(len(patches), -1, width * kernel_h * kernel_w).transpose(0, 1)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The same in single precision or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
