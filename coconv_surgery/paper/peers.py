"""The networks that Tables 4 and 5 compare CoResNet with, all of them timm's."""

from functools import partial
from typing import cast

import timm
import torch.nn as nn
from timm.layers import NonLocalAttn, SEModule


def resnet(depth: int) -> nn.Module:
    """ResNet: 50, 101 or 152 layers, like all that follow."""
    return _create(f"resnet{depth}")


def preact_resnet(depth: int) -> nn.Module:
    """Pre-activation ResNet: timm's ResNetV2, whose shortcuts have no norm."""
    return _create(f"resnetv2_{depth}")


def se_resnet(depth: int) -> nn.Module:
    """SE-ResNet, its squeeze and excitation without biases: the parameters of Table 5 are those of that form."""
    return _create(f"seresnet{depth}", block_args={"attn_layer": partial(SEModule, bias=False)})


def nonlocal_resnet(depth: int) -> nn.Module:
    """Non-local ResNet: a non-local block of half the channels after every stage, which gives Table 5's parameters."""
    model = _create(f"resnet{depth}")
    for stage, channels in enumerate((256, 512, 1024, 2048), start=1):
        cast(nn.Sequential, model.get_submodule(f"layer{stage}")).append(NonLocalAttn(channels, rd_ratio=1 / 2))
    return model


def dilated_resnet(depth: int) -> nn.Module:
    """DRN-style ResNet: stages 3 and 4 at output stride 8, with the dilations 2 and 4 for the missing strides."""
    return _create(f"resnet{depth}", output_stride=8)


def _create(name: str, **arguments: object) -> nn.Module:
    model: nn.Module = timm.create_model(name, **arguments)
    return model
