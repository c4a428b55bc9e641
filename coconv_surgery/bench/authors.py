"""The layout of the CoConv authors' code, to compare with: one convolution module a level, and a concatenation."""

import torch
import torch.nn as nn

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import level_padding, pair


class LevelConvs(nn.Module):
    """One convolution for each level of a contextual one, with its weights.

    Args:
        conv: A contextual convolution with zero padding.
    """

    def __init__(self, conv: CoConv2d) -> None:
        super().__init__()
        kernel, grouped = pair(conv.kernel_size), conv.groups > 1
        self.levels = nn.ModuleList()
        self.inputs: list[int] | None = [] if grouped else None
        biases = [None] * conv.levels if conv.bias is None else torch.split(conv.bias, list(conv.splits))
        for dilation, weight, bias in zip(
            conv.dilations, torch.split(conv.weight, list(conv.splits)), biases, strict=True
        ):
            groups = weight.shape[0] * conv.groups // conv.out_channels if grouped else 1
            padding = level_padding(kernel, conv.padding, pair(conv.dilation), pair(dilation))
            shape = (weight.shape[1] * groups, weight.shape[0], kernel, pair(conv.stride), padding, dilation, groups)
            level = nn.Conv2d(*shape, bias=bias is not None)
            level.weight = nn.Parameter(weight.detach().clone())
            level.bias = None if bias is None else nn.Parameter(bias.detach().clone())
            self.levels.append(level)
            if self.inputs is not None:
                self.inputs.append(level.in_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)`` once a level."""
        parts = [x] * len(self.levels) if self.inputs is None else torch.split(x, self.inputs, 1)
        return torch.cat([level(part) for level, part in zip(self.levels, parts, strict=True)], 1)


class LevelsAlone(nn.Module):
    """The convolutions of the levels and nothing else: a lower bound for every form that calls one for each level.

    Nothing is sliced, concatenated or, in the backward pass, added up.

    Args:
        conv: A contextual convolution with zero padding.
    """

    def __init__(self, conv: CoConv2d) -> None:
        super().__init__()
        layout = LevelConvs(conv)
        self.levels, self.inputs = layout.levels, layout.inputs
        self.parts: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Convolve once a level, always the ``(N, C, H, W)`` of the first call."""
        if not self.parts:
            if self.inputs is None:
                self.parts = [x.detach() for _ in self.levels]
            else:
                self.parts = [part.detach().clone() for part in torch.split(x, self.inputs, 1)]  # keeps the layout
        for part in self.parts:
            part.requires_grad_(x.requires_grad).grad = None
        return [level(part) for level, part in zip(self.levels, self.parts, strict=True)]


def use_authors_layout(model: nn.Module) -> nn.Module:
    """Replace every contextual convolution of a network with one module a level.

    Returns:
        The same network, or the replacement if ``model`` itself is a contextual convolution.
    """
    if isinstance(model, CoConv2d):
        return LevelConvs(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, CoConv2d):
            model.set_submodule(name, LevelConvs(module))
    return model
