"""Contextual convolution written as naively as possible: what the package's own is checked against."""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F


def both(value):
    """Height and width of a number or a pair."""
    return (value, value) if isinstance(value, int) else tuple(value)


def centred_padding(kernel_size, padding, dilation, level_dilation):
    """Height and width of the padding with which a level looks at the same places as the plain convolution.

    A kernel reaches ``dilation * (k // 2)`` pixels to either side of its centre. The first centre of a convolution
    padded by ``p`` lies at ``reach - p``; a kernel that reaches further needs that much more to start there.
    """
    pads = []
    for axis in (0, 1):
        half = kernel_size[axis] // 2
        reach = both(dilation)[axis] * half
        if padding == "same":
            first_centre = 0
        elif padding == "valid":
            first_centre = reach
        else:
            first_centre = reach - both(padding)[axis]
        pads.append(both(level_dilation)[axis] * half - first_centre)
    return tuple(pads)


def naive_coconv2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    dilations,
    splits,
    padding_mode="zeros",
):
    """Each group of each level as an unpadded convolution of its own, on padded input; then all concatenated."""
    if input.dim() == 3:
        arguments = (weight, bias, stride, padding, dilation, groups)
        levels = {"dilations": dilations, "splits": splits, "padding_mode": padding_mode}
        return naive_coconv2d(input[None], *arguments, **levels)[0]
    outputs_per_group = weight.shape[0] // groups
    inputs_per_group = weight.shape[1]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    level_of_channel = [level for level, channels in enumerate(splits) for _ in range(channels)]
    outputs = []
    for level, level_dilation in enumerate(dilations):
        height, width = centred_padding(weight.shape[2:], padding, dilation, level_dilation)
        padded = F.pad(input, (width, width, height, height), mode=mode)
        for group in range(groups):
            rows = [
                channel
                for channel in range(group * outputs_per_group, (group + 1) * outputs_per_group)
                if level_of_channel[channel] == level
            ]
            if rows:
                seen = padded[:, group * inputs_per_group : (group + 1) * inputs_per_group]
                row_bias = None if bias is None else bias[rows]
                outputs.append(F.conv2d(seen, weight[rows], row_bias, stride, 0, level_dilation))
    return torch.cat(outputs, dim=1)


def naive_forward(module, input, *, weight=None, bias=None):
    """What a ``CoConv2d`` should return, read off its attributes; by default with its own parameters."""
    return naive_coconv2d(
        input,
        module.weight if weight is None else weight,
        module.bias if bias is None else bias,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        dilations=module.dilations,
        splits=module.splits,
        padding_mode=module.padding_mode,
    )


def naive_levels(conv, image, dilations, splits):
    """Every level as a convolution of the same class that has the level's dilation and its part of the channels."""
    pads_by_itself = getattr(conv, "same_pad", type(conv).__name__ in ("Conv2dSame", "Conv2dAdaptivePadding"))
    outputs, start = [], 0
    for dilation, channels in zip(dilations, splits, strict=True):
        part = slice(start, start + channels)
        start += channels
        level = copy.deepcopy(conv)
        level.out_channels = channels
        for name, parameter in conv.named_parameters():
            setattr(level, name, nn.Parameter(parameter[part]))
        for name, buffer in conv.named_buffers():
            setattr(level, name, buffer[part])
        level.dilation = (dilation, dilation)
        if not pads_by_itself:
            level.padding = tuple(side + dilation - 1 for side in conv.padding)
        outputs.append(level(image))
    return torch.cat(outputs, dim=1)
