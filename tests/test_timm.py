"""Real timm networks of every kind: planned, converted, run, reverted."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from reference import naive_coconv2d

import coconv_surgery as cs

FAMILIES = [
    "botnet26t_256",
    "coatnet_0_rw_224",
    "convnext_atto",
    "cs3darknet_s",
    "cspresnet50",
    "densenet121",
    "dla34",
    "dm_nfnet_f0",
    "dpn68",
    "ecaresnet26t",
    "edgenext_xx_small",
    "efficientnet_b0",
    "fastvit_t8",
    "gernet_s",
    "ghostnet_100",
    "halonet26t",
    "hardcorenas_a",
    "hrnet_w18_small",
    "inception_v3",
    "inception_v4",
    "levit_conv_128s",
    "mixnet_s",
    "mobilenetv3_small_100",
    "mobileone_s0",
    "mobilevit_s",
    "nf_resnet26",
    "pvt_v2_b0",
    "regnety_008",
    "repvgg_a0",
    "res2net50_26w_4s",
    "resnest14d",
    "resnet18",
    "resnet50d",
    "resnetv2_50",
    "resnext50_32x4d",
    "rexnet_100",
    "selecsls42",
    "seresnet50",
    "skresnet18",
    "tf_efficientnetv2_b0",
    "tresnet_m",
    "vgg16_bn",
    "vovnet39a",
    "xception41",
]
WITHOUT_3X3 = {"convnext_atto"}


@pytest.mark.filterwarnings("ignore::coconv_surgery.NoChangeWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_timm_family_converts_with_weights_keys_and_shapes_kept(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        image = torch.empty(2, *model.pretrained_cfg["input_size"])
    shape, parameters, keys = model(image).shape, dict(model.named_parameters()), list(model.state_dict())
    kinds = {path: type(module) for path, module in model.named_modules()}
    cs.convert(model)
    plan = cs.get_plan(model)
    assert bool(plan.converted) == (name not in WITHOUT_3X3)
    assert model(image).shape == shape
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[path] for path, parameter in model.named_parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters
    cs.revert(model)
    assert {path: type(module) for path, module in model.named_modules()} == kinds


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "repvgg_a0", "regnety_002"])
def test_one_level_everywhere_is_the_network_itself(name):
    model = timm.create_model(name).eval()
    image = torch.randn(1, 3, 64, 64)
    before = model(image)
    with pytest.warns(cs.NoChangeWarning):
        cs.convert(model, cs.UniformPolicy(1), input_size=64)
    assert torch.equal(model(image), before)


class Naive(nn.Module):
    """A planned conv, computed by the reference."""

    def __init__(self, conv, row):
        super().__init__()
        self.conv, self.row = conv, row

    def forward(self, x):
        conv = self.conv
        arguments = (conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return naive_coconv2d(x, *arguments, dilations=self.row.dilations, splits=self.row.splits)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "resnext26ts"])
def test_a_converted_network_computes_what_its_plan_says(name):
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    naive = copy.deepcopy(model)
    image = torch.randn(1, 3, 96, 96)
    plain = model(image)
    cs.convert(model, input_size=96)
    for row in cs.get_plan(model).converted:
        naive.set_submodule(row.name, Naive(naive.get_submodule(row.name), row))
    assert (model(image) - plain).norm() > 0.01 * plain.norm()
    torch.testing.assert_close(model(image), naive(image), rtol=1e-5, atol=1e-5)
