"""Layers whose learning rate is equalised (Karras et al., ICLR 2018, section 4.1).

A weight is stored with variance 1 and multiplied by He's constant, ``gain / sqrt(fan-in)``, whenever it is used, so
that an optimizer which normalises its steps, such as Adam, changes all layers at the same speed.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.switch import register_coconv


class EqualizedConv2d(nn.Conv2d):
    """A convolution with an equalised learning rate.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: As in :class:`torch.nn.Conv2d`.
        padding: As in :class:`torch.nn.Conv2d`.
        gain: Of He's constant: √2 where a rectifier follows, 1 where none does.

    Attributes:
        scale (float): What the weight is multiplied with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        padding: int | Pair = 0,
        *,
        gain: float = math.sqrt(2),
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.scale = gain / math.sqrt(math.prod(self.weight.shape[1:]))

    def reset_parameters(self) -> None:
        """Draw the weight from a standard normal distribution; the bias is zero."""
        _reset(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)``."""
        output: torch.Tensor = self._conv_forward(input, self.weight * self.scale, self.bias)
        return output


@register_coconv
class CoEqualizedConv2d(CoConv2d, EqualizedConv2d):
    """The contextual form of :class:`EqualizedConv2d`."""

    scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)``."""
        return self._conv_forward(input, self.weight * self.scale, self.bias)

    def parameters_for(self, kernels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight that is these kernels once it is scaled."""
        return {"weight": kernels / self.scale}


class EqualizedLinear(nn.Linear):
    """A linear layer with an equalised learning rate.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        gain: As of :class:`EqualizedConv2d`.

    Attributes:
        scale (float): What the weight is multiplied with.
    """

    def __init__(self, in_features: int, out_features: int, *, gain: float = math.sqrt(2)) -> None:
        super().__init__(in_features, out_features)
        self.scale = gain / math.sqrt(in_features)

    def reset_parameters(self) -> None:
        """Draw the weight from a standard normal distribution; the bias is zero."""
        _reset(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(N, in_features)``."""
        return F.linear(input, self.weight * self.scale, self.bias)


class LatentToMap(nn.ConvTranspose2d):
    """Makes a small square map of a latent: a linear layer with one bias a channel, at an equalised learning rate.

    Args:
        latent: Size of the latent.
        channels: Channels of the map.
        side: Sides of the map.
        gain: As of :class:`EqualizedConv2d`.

    Attributes:
        scale (float): What the weight is multiplied with.
    """

    def __init__(self, latent: int, channels: int, side: int, *, gain: float) -> None:
        super().__init__(latent, channels, side)
        self.scale = gain / math.sqrt(latent)

    def reset_parameters(self) -> None:
        """Draw the weight from a standard normal distribution; the bias is zero."""
        _reset(self)

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Make maps ``(N, channels, side, side)`` of latents ``(N, latent)``."""
        return F.conv_transpose2d(input[:, :, None, None], self.weight * self.scale, self.bias)


def _reset(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
