"""CoConv as a conv layer of mmcv, and the import that registers it."""

import pytest
import torch
import torch.nn as nn
from launching import python
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope

from coconv_surgery import CoConv2d


def coconvs(network: nn.Module) -> list[CoConv2d]:
    return [module for module in network.modules() if isinstance(module, CoConv2d)]


@pytest.mark.parametrize("scope", [None, "mmengine", "mmdet"])
def test_the_layer_is_found_from_every_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        conv = build_conv_layer({"type": "CoConv", "levels": 3}, 8, 16, 3, padding=1, bias=False)
    assert type(conv) is CoConv2d
    assert (conv.dilations, conv.splits) == ((1, 2, 3), (8, 4, 4))


@pytest.mark.parametrize("kernel", [1, 7])
def test_another_kernel_gives_a_plain_conv(kernel):
    conv = build_conv_layer({"type": "CoConv", "levels": 3}, 8, 16, kernel_size=kernel, stride=2, padding=kernel // 2)
    assert type(conv) is nn.Conv2d
    assert conv.kernel_size == (kernel, kernel)


@pytest.mark.parametrize(("channels", "groups", "dilations"), [(2, 1, (1, 2)), (1, 1, None), (8, 2, (1, 2))])
def test_a_narrow_conv_gets_fewer_levels(channels, groups, dilations):
    conv = build_conv_layer({"type": "CoConv", "levels": 4}, 8, channels, 3, groups=groups)
    assert getattr(conv, "dilations", None) == dilations


def test_dilations_are_in_units_of_the_convs_own():
    conv = build_conv_layer({"type": "CoConv", "dilations": (1, 3)}, 8, 8, 3, padding=2, dilation=2)
    assert conv.dilations == (2, 6)


@pytest.mark.parametrize(
    "levels", [{}, {"levels": 2, "dilations": (1, 2)}, {"levels": 0}, {"levels": 2, "splits": (1, 2)}, {"dilations": 2}]
)
def test_levels_that_cannot_be_are_an_error(levels):
    with pytest.raises(ValueError, match=r"levels=|splits|dilations=2 must be numbers"):
        build_conv_layer({"type": "CoConv", **levels}, 8, 8, 3)


def test_conv_cfg_reaches_every_3x3_of_a_backbone_and_nothing_else():
    backbone = MODELS.build(
        {"type": "ResNet", "depth": 18, "base_channels": 8, "conv_cfg": {"type": "CoConv", "levels": 3}}
    )
    assert len(coconvs(backbone)) == 16
    assert [tuple(feature.shape[1:]) for feature in backbone(torch.randn(1, 3, 64, 64))] == [
        (8, 16, 16),
        (16, 8, 8),
        (32, 4, 4),
        (64, 2, 2),
    ]


@pytest.mark.parametrize(("backbone", "count"), [("ResNet", 13), ("ResNeXt", 13), ("Res2Net", 39)])
def test_dcn_puts_it_into_the_stages_that_are_named(backbone, count):
    dcn = {"type": "CoConv", "levels": 3}
    network = MODELS.build(
        {"type": backbone, "depth": 50, "base_channels": 16, "dcn": dcn, "stage_with_dcn": (True, True, True, False)}
    )
    assert len(coconvs(network)) == count
    assert all(conv.levels == 3 for conv in coconvs(network))


def test_conv_modules_efficient_evaluation_gives_the_same_output(lively):
    conv = ConvModule(4, 8, 3, padding=1, conv_cfg={"type": "CoConv", "levels": 3}, norm_cfg={"type": "BN"})
    lively(conv)
    image = torch.randn(2, 4, 12, 12)
    expected = conv(image)
    conv.turn_on_efficient_conv_bn_eval(True)
    torch.testing.assert_close(conv(image), expected, atol=1e-4, rtol=1e-4)


MISSING = """
import sys
for hidden in ("mmcv", "mmdet", "mmcv._ext"):
    sys.modules[hidden] = None
    try:
        import coconv_surgery.mmdet
    except ImportError as error:
        print(error)
    del sys.modules[hidden]
"""


def test_a_missing_dependency_is_named_with_the_extra_that_brings_it():
    for message, named in zip(
        python(MISSING).stdout.splitlines(), ("mmcv", "mmdet", "compiled operators"), strict=True
    ):
        assert message.startswith("coconv_surgery.mmdet needs")
        assert named in message
        assert "pip install 'coconv-surgery[mmdet]'" in message
