"""Real timm networks of every kind: planned, converted, run, reverted."""

import copy
import json

import pytest
import timm
import torch
import torch.nn as nn
from reference import naive_coconv2d
from sampling import few

import coconv_surgery as cs
from coconv_surgery.sweep.check import check
from coconv_surgery.sweep.collections import COLLECTIONS

SAMPLE = [
    "adv_inception_v3",
    "botnet26t_256",
    "cait_xxs24_224",
    "coatnet_0_rw_224",
    "convmixer_768_32",
    "convnext_atto",
    "cs3darknet_s",
    "csatv2",
    "cspresnet50",
    "davit_tiny",
    "densenet121",
    "dla34",
    "dm_nfnet_f0",
    "dpn68",
    "ecaresnet26t",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientnet_b0",
    "efficientvit_b0",
    "efficientvit_m0",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gernet_s",
    "ghostnet_100",
    "halonet26t",
    "hardcorenas_a",
    "hgnet_tiny",
    "hrnet_w18_small",
    "inception_next_tiny",
    "inception_v4",
    "levit_conv_128s",
    "maxvit_pico_rw_256",
    "mixnet_s",
    "mobilenetv3_small_100",
    "mobileone_s0",
    "mobilevit_s",
    "nasnetalarge",
    "nextvit_small",
    "nf_resnet26",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnety_008",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m1",
    "res2net50_26w_4s",
    "resnest14d",
    "resnet18",
    "resnet50d",
    "resnetv2_50",
    "resnetv2_50x1_bit",
    "resnext50_32x4d",
    "rexnet_100",
    "selecsls42",
    "seresnet50",
    "skresnet18",
    "tf_efficientnetv2_b0",
    "tiny_vit_5m_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg16_bn",
    "vit_small_r26_s32_224",
    "vovnet39a",
    "xception41",
]


def test_sixty_networks_are_tried():
    assert len(SAMPLE) >= 60


@pytest.mark.parametrize("name", few(SAMPLE, 12))
def test_a_network_keeps_its_weights_keys_and_shapes(name):
    row = check(COLLECTIONS["timm"], name)
    assert row.sound, row
    assert row.outputs_before, "its forward runs without data"
    assert row.converted + row.one_level + sum(json.loads(row.left_alone).values()) >= row.convs_3x3


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
