"""Blocks that merge their branches for inference: the result is right, or the merge is refused."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model

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
    """Two branches that merge into one convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.merged = None

    def forward(self, x):
        return self.merged(x) if self.merged is not None else self.first(x) + self.second(x)

    def reparameterize(self):
        self.merged = nn.Conv2d(4, 4, 3, padding=1)
        with torch.no_grad():
            self.merged.weight.copy_(self.first.weight + self.second.weight)
            self.merged.bias.copy_(self.first.bias + self.second.bias)
        del self.first, self.second


def test_branches_of_different_levels_are_refused_and_left_as_they_were():
    model = nn.Sequential(Branches(), nn.Conv2d(4, 2, 1))
    cs.convert(model, input_size=(4, 16, 16), overrides={"0.second": (1, 3)})
    image = torch.randn(1, 4, 16, 16)
    expected = model(image)
    with pytest.raises(ValueError, match="a Branches cannot be merged into one convolution: its 2 branches"):
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
    with pytest.raises(ValueError, match="a ReparamLargeKernelConv cannot be merged"):
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
