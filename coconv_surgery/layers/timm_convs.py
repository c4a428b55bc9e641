"""The contextual forms of timm's convolutions that do more than convolve.

Standardised weights are computed for each output channel by itself, so levels do not change them. Dynamic "same"
padding is the one of the plain convolution, and every level adds what its dilation needs more: for a stride up to the
kernel size, this is the padding that a convolution of the level's dilation would take.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.switch import register_coconv


@register_coconv
class CoConv2dSame(CoConv2d, Conv2dSame):  # type: ignore[misc]
    """Dynamic "same" padding, as in TensorFlow."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pad and convolve ``(N, C, H, W)``."""
        return self._conv_forward(_pad_same(self, input), self.weight, self.bias)


@register_coconv
class CoStdConv2d(CoConv2d, StdConv2d):  # type: ignore[misc]
    """Weight standardisation (Qiao et al., 2019)."""

    eps: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)`` with standardised weights."""
        return self._conv_forward(input, _standardise(self.weight, self.eps), self.bias)

    def parameters_for(self, kernels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weights of the same direction; standardised kernels have one length."""
        return {"weight": _like(self.weight, kernels)}


@register_coconv
class CoStdConv2dSame(CoConv2d, StdConv2dSame):  # type: ignore[misc]
    """Weight standardisation with dynamic "same" padding where that is not static."""

    eps: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pad, and convolve ``(N, C, H, W)`` with standardised weights."""
        padded = _pad_same(self, input) if self.same_pad else input
        return self._conv_forward(padded, _standardise(self.weight, self.eps), self.bias)

    parameters_for = CoStdConv2d.parameters_for


@register_coconv
class CoScaledStdConv2d(CoConv2d, ScaledStdConv2d):  # type: ignore[misc]
    """Weight standardisation with a learned gain (Brock et al., 2021)."""

    eps: float
    gain: torch.Tensor
    scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)`` with standardised and scaled weights."""
        weight = _standardise(self.weight, self.eps, self.gain * self.scale)
        return self._conv_forward(input, weight, self.bias)

    def parameters_for(self, kernels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weights of the same direction, and their lengths as gains."""
        weight = _like(self.weight, kernels)
        length = _centred(kernels).flatten(1).norm(dim=1)
        unit = _standardise(weight, self.eps).flatten(1).norm(dim=1)
        return {"weight": weight, "gain": (length / (unit * self.scale)).view_as(self.gain)}


@register_coconv
class CoScaledStdConv2dSame(CoConv2d, ScaledStdConv2dSame):  # type: ignore[misc]
    """Weight standardisation with a learned gain, and dynamic "same" padding where that is not static."""

    eps: float
    gain: torch.Tensor
    scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Pad, and convolve ``(N, C, H, W)`` with standardised and scaled weights."""
        padded = _pad_same(self, input) if self.same_pad else input
        weight = _standardise(self.weight, self.eps, self.gain * self.scale)
        return self._conv_forward(padded, weight, self.bias)

    parameters_for = CoScaledStdConv2d.parameters_for


def _pad_same(conv: nn.Conv2d, input: torch.Tensor) -> torch.Tensor:
    padded: torch.Tensor = pad_same(input, conv.kernel_size, conv.stride, conv.dilation)
    return padded


def _standardise(weight: torch.Tensor, eps: float, gain: torch.Tensor | None = None) -> torch.Tensor:
    """Give every output channel's weights mean 0 and variance 1, then its gain."""
    rows = weight.flatten(1).unsqueeze(0)  # batch_norm over the rows, as timm has it, so that numbers agree to the bit
    scale = None if gain is None else gain.flatten()
    return F.batch_norm(rows, None, None, scale, training=True, momentum=0.0, eps=eps).view_as(weight)


def _centred(kernels: torch.Tensor) -> torch.Tensor:
    return kernels - kernels.mean((1, 2, 3), keepdim=True)


def _like(weight: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Kernels without their mean, in the lengths that the weights have, so that eps counts as little as before."""
    own, new = (_centred(each).flatten(1).norm(dim=1)[:, None, None, None] for each in (weight, kernels))
    return torch.where(new > 0, _centred(kernels) * (own / new), weight)
