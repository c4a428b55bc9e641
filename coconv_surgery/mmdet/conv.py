"""CoConv as a conv layer of mmcv, for ``conv_cfg`` and ``dcn``, and the contextual forms of mmcv's conv layers."""

from collections.abc import Callable, Sequence
from typing import Any

import mmcv.cnn
import mmcv.cnn.bricks
import torch
import torch.nn as nn
from timm.layers import pad_same

from coconv_surgery.layers.arguments import whole_number, whole_numbers
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.levels import (
    SplitRule,
    complete_levels,
    is_plain,
    level_units,
    scale_dilations,
)
from coconv_surgery.layers.switch import register_coconv, to_coconv_


def build_coconv(
    *args: Any,
    levels: int | None = None,
    dilations: Sequence[int] | None = None,
    splits: Sequence[int] | SplitRule = "pow2",
    **kwargs: Any,
) -> nn.Conv2d:
    """Build the conv layer that ``dict(type='CoConv', levels=3)`` stands for.

    A ``conv_cfg`` reaches every convolution of a network, so only a 3×3 becomes a CoConv; any other kernel gives a
    plain convolution. With fewer output channels (or groups) than levels, each gets one level, the lowest dilations
    first, so that depthwise and very narrow layers build too. A ``conv_cfg`` also reaches prediction layers, and
    ignores map sizes: where these matter, convert the detector with ``CoConvSurgery`` instead.

    Args:
        *args: As in :class:`torch.nn.Conv2d`.
        levels: Number of levels: level k has k times the convolution's own dilation.
        dilations: Dilation of each level instead, in units of the convolution's own.
        splits: Output channels of each level, or a split rule.
        **kwargs: As in :class:`torch.nn.Conv2d`.

    Returns:
        A :class:`~coconv_surgery.CoConv2d`, or a plain ``nn.Conv2d`` where the kernel is not 3×3 or one level is left.

    Raises:
        ValueError: If neither or both of ``levels`` and ``dilations`` are given, or the convolution cannot be split
            this way.

    >>> build_coconv(64, 64, 3, padding=1, levels=2)
    CoConv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilations=(1, 2), splits=(32, 32))
    >>> build_coconv(64, 64, 1, levels=2)
    Conv2d(64, 64, kernel_size=(1, 1), stride=(1, 1))
    """
    if (levels is None) == (dilations is None):
        raise ValueError(
            "a conv layer of type CoConv takes either levels= (a number) or dilations= (one for each level)"
        )
    if dilations is not None:
        form = "must be numbers of at least 1, one for each level"
        factors: Sequence[int] = whole_numbers(dilations, "dilations", form)
    else:
        factors = range(1, whole_number(levels, "levels", at_least=1) + 1)
    conv = nn.Conv2d(*args, **kwargs)
    if conv.kernel_size != (3, 3):
        return conv
    units, _ = level_units(conv)
    chosen = complete_levels(conv, dilations=scale_dilations(conv.dilation, factors[:units]), splits=splits)
    if not is_plain(conv, chosen.dilations):
        to_coconv_(conv, *chosen)
    return conv


@register_coconv
class CoConv2dWrapper(CoConv2d, mmcv.cnn.bricks.Conv2d):  # type: ignore[misc]
    """mmcv's Conv2d, which convolves as torch's does on any torch since 1.5."""


@register_coconv
class CoConv2dAdaptivePadding(CoConv2d, mmcv.cnn.bricks.Conv2dAdaptivePadding):  # type: ignore[misc]
    """Dynamic "same" padding: the plain convolution's, plus what the dilation of each level needs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad and convolve ``(N, C, H, W)``."""
        return self._conv_forward(pad_same(x, self.kernel_size, self.stride, self.dilation), self.weight, self.bias)


@register_coconv
class CoConvWS2d(CoConv2d, mmcv.cnn.ConvWS2d):  # type: ignore[misc]
    """Weight standardisation (Qiao et al., 2019), for each output channel by itself."""

    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)`` with standardised weights."""
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (deviation + self.eps), self.bias)


@register_coconv
class CoConvAWS2d(CoConv2d, mmcv.cnn.ConvAWS2d):  # type: ignore[misc]
    """Adaptive weight standardisation (DetectoRS), for each output channel by itself."""

    _get_weight: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)`` with standardised and rescaled weights."""
        return self._conv_forward(x, self._get_weight(self.weight), self.bias)
