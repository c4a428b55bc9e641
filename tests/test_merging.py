"""Blocks that merge their branches for inference: the result is right, or the merge is refused."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch.nn.utils.fusion import fuse_conv_bn_weights

import coconv_surgery as cs


@pytest.fixture(autouse=True)
def _no_grad():
    # Some networks cache what they compute, and torch copies no tensor that has a history.
    with torch.no_grad():
        yield


def lively(model):
    """Norms whose statistics make a mistake in merging show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [
        "repvgg_a0",
        "mobileone_s0",
        "repvit_m1",
        "repghostnet_050",
        "ghostnetv3_050",
        "levit_conv_128s",
        "efficientvit_m0",
        "tiny_vit_5m_224",
        "shvit_s1",
    ],
)
def test_a_converted_network_computes_the_same_after_reparameterization(name):
    model = lively(timm.create_model(name))
    image = torch.randn(1, *model.pretrained_cfg["input_size"])
    cs.convert(model)
    contextual = len(cs.get_plan(model).converted)
    assert contextual
    expected = model(image)
    merged = reparameterize_model(model)
    assert cs.get_plan(merged).converted
    torch.testing.assert_close(merged(image), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)
    assert len(cs.get_plan(model).converted) == contextual, "the model itself is left as it was"


def test_a_plain_network_reparameterizes_as_before():
    model = lively(timm.create_model("repvgg_a0"))
    cs.revert(cs.convert(model))
    image = torch.randn(1, 3, 224, 224)
    merged = reparameterize_model(model)
    assert not cs.get_plan(merged).converted
    torch.testing.assert_close(merged(image), model(image), atol=1e-3, rtol=1e-3)


class Branches(nn.Module):
    """Two branches that merge into one convolution, in one way or another."""

    def __init__(self, way="new", second=None):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = second or nn.Conv2d(4, 4, 3, padding=1)
        self.way, self.merged = way, None

    def forward(self, x):
        return self.merged(x) if self.merged is not None else self.first(x) + self.second(x)

    def reparameterize(self):
        weight, bias = self.first.weight + self.second.weight, self.first.bias + self.second.bias
        merged = self.first if self.way == "in place" else nn.Conv2d(4, 4, 3, padding=1)
        merged.weight.data, merged.bias.data, self.merged = weight, bias, merged
        if self.way != "branches kept":
            del self.first, self.second


class Pooled(nn.Conv2d):
    """A branch that is no convolution, with the weights that stand for it."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.weight)
        self.weight[range(4), range(4)] = 1 / 9

    def forward(self, x):
        return F.avg_pool2d(x, 3, 1, 1)


class TwoPairs(nn.Module):
    """Two convolutions in a row, each merged with the norm that follows it."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x

    def fuse(self):
        for index in range(2):
            self.convs[index] = fuse_conv_bn_weights_into(self.convs[index], self.norms[index])
            self.norms[index] = nn.Identity()
        return self


def fuse_conv_bn_weights_into(conv, norm):
    merged = nn.Conv2d(4, 4, 3, padding=1)
    weights = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    merged.weight, merged.bias = fuse_conv_bn_weights(*weights)
    return merged


def test_branches_of_different_levels_are_refused_and_left_as_they_were():
    model = nn.Sequential(Branches(), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16), overrides={"0.second": (1, 3)})
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    with pytest.raises(ValueError, match="merged, this Branches would not compute the same"):
        reparameterize_model(model, inplace=True)
    assert torch.equal(model(image), expected)


def test_branches_of_one_plan_merge_with_their_levels():
    model = nn.Sequential(Branches(), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    reparameterize_model(model, inplace=True)
    assert model[0].merged.dilations == (1, 2, 3)
    torch.testing.assert_close(model(image), expected)


def test_a_large_kernel_that_holds_a_contextual_one_is_refused():
    model = cs.convert(timm.create_model("fastvit_t8"))
    before = copy.deepcopy(cs.get_plan(model))
    with pytest.raises(ValueError, match="merged, this ReparamLargeKernelConv would not compute the same"):
        reparameterize_model(model)
    assert cs.get_plan(model) == before


def test_a_fastvit_without_its_large_kernels_merges():
    model = lively(timm.create_model("fastvit_t8"))
    cs.convert(model, exclude=["*.small_conv"])
    image = torch.randn(1, 3, 256, 256)
    expected = model(image)
    merged = reparameterize_model(model)
    assert cs.get_plan(merged).converted
    torch.testing.assert_close(merged(image), expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("way", ["in place", "branches kept"])
def test_a_merge_that_would_lose_levels_in_another_way_is_refused(way):
    model = nn.Sequential(Branches(way), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16), exclude=["0.second"])
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    with pytest.raises(ValueError, match="merged, this Branches would not compute the same"):
        reparameterize_model(model, inplace=True)
    assert torch.equal(model(image), expected)


def test_a_pool_that_is_folded_into_a_contextual_branch_is_refused():
    model = nn.Sequential(Branches(second=Pooled()), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16))
    with pytest.raises(ValueError, match="merged, this Branches would not compute the same"):
        reparameterize_model(model)


def test_branches_of_one_plan_may_merge_in_place():
    model = nn.Sequential(Branches("in place"), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16))
    image = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(reparameterize_model(model)(image), model(image))


def test_pairs_of_different_levels_keep_their_own():
    model = lively(nn.Sequential(TwoPairs(), nn.Conv2d(4, 2, 1)))
    cs.convert(model, input_size=(4, 16, 16), overrides={"0.convs.1": (1, 3)})
    image = torch.randn(1, 4, 16, 16)
    merged = reparameterize_model(model)
    assert [conv.dilations for conv in merged[0].convs] == [(1, 2, 3), (1, 3)]
    torch.testing.assert_close(merged(image), model(image))


def test_methods_of_that_name_that_are_no_merges_are_not_touched():
    class Other(nn.Module):
        fuse = False

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def reparameterize(self, x):
            return self.conv(x)

        @staticmethod
        def switch_to_deploy():
            return "static"

        def forward(self, x):
            return self.reparameterize(x)

    before = dict(vars(Other))
    cs.convert(nn.Sequential(Other(), nn.Conv2d(4, 2, 1)), input_size=(4, 16, 16))
    assert dict(vars(Other)) == before


def test_a_network_on_the_meta_device_merges():
    with torch.device("meta"):
        model = cs.convert(timm.create_model("repvgg_a0").eval())
        assert len(cs.get_plan(reparameterize_model(model)).converted) == 21
