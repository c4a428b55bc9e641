"""mmcv's convolutions that do more than convolve: each level is what the class would compute at its dilation."""

import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvAWS2d, ConvWS2d
from mmcv.cnn.bricks import Conv2d, Conv2dAdaptivePadding
from mmcv.ops import SAConv2d
from reference import naive_levels

import coconv_surgery as cs
from coconv_surgery.layers.switch import to_coconv_, to_conv_

VARIANTS = [Conv2d, Conv2dAdaptivePadding, ConvAWS2d, ConvWS2d]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("cls", VARIANTS)
def test_every_level_is_the_class_itself_at_its_dilation(cls, stride):
    conv = cls(4, 8, 3, stride=stride, padding=1)
    for tensor in (*conv.parameters(), *conv.buffers()):
        nn.init.normal_(tensor)
    image = torch.randn(2, 4, 13, 10)
    expected = naive_levels(conv, image, (1, 2, 4), (4, 2, 2))
    to_coconv_(conv, (1, 2, 4), (4, 2, 2))
    assert isinstance(conv, cls)
    assert isinstance(conv, cs.CoConv2d)
    torch.testing.assert_close(conv(image), expected, atol=1e-5, rtol=1e-5)
    to_conv_(conv)
    assert type(conv) is cls


def test_standardised_weights_are_right_in_half_precision():
    conv = ConvWS2d(8, 8, 3, padding=1).half()
    nn.init.normal_(conv.weight, std=3e-4)
    image = torch.randn(1, 8, 8, 8).half()
    expected = conv(image)
    to_coconv_(conv, (1,), (8,))
    torch.testing.assert_close(conv(image), expected, atol=1e-2, rtol=1e-2)


def test_switchable_atrous_convolution_is_left_alone():
    model = nn.Sequential(SAConv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1))
    row = cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0]
    assert row.reason == "SAConv2d has a forward of its own that register_coconv() does not know"
