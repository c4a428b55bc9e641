"""Convolutions that do more than convolve: each level is what the class would compute at the level's dilation."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import naive_levels
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSameExport
from torch.nn.utils import parametrizations

import coconv_surgery as cs
from coconv_surgery.layers.switch import register_coconv, to_coconv_, to_conv_

VARIANTS = [Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]


@given(
    cls=st.sampled_from(VARIANTS),
    stride=st.integers(1, 3),
    height=st.integers(5, 18),
    width=st.integers(5, 18),
    dilations=st.sampled_from([(1, 2), (1, 2, 3, 4), (2, 3), (3,)]),
    bias=st.booleans(),
)
def test_every_level_is_the_class_itself_at_its_dilation(cls, stride, height, width, dilations, bias):
    padding = {"padding": "same"} if cls.__name__.endswith("Same") else {}
    conv = cls(4, 8, 3, stride=stride, bias=bias, **padding)
    for parameter in conv.parameters():
        nn.init.normal_(parameter)
    splits = (8 // len(dilations),) * (len(dilations) - 1)
    splits = (*splits, 8 - sum(splits))
    image = torch.randn(2, 4, height, width)
    expected = naive_levels(conv, image, dilations, splits)
    to_coconv_(conv, dilations, splits)
    torch.testing.assert_close(conv(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", VARIANTS)
def test_a_variant_keeps_its_class_parameters_and_output_at_one_level_and_comes_back(cls):
    conv = cls(4, 8, 3, stride=2)
    image, attributes = torch.randn(1, 4, 9, 12), dict(vars(conv))
    expected = conv(image)
    to_coconv_(conv, (1,), (8,))
    assert isinstance(conv, cls)
    assert isinstance(conv, cs.CoConv2d)
    torch.testing.assert_close(conv(image), expected, atol=0, rtol=0)
    to_conv_(conv)
    assert type(conv) is cls
    assert vars(conv) == attributes


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("nf_resnet26", ScaledStdConv2d),
        ("dm_nfnet_f0", ScaledStdConv2dSame),
        ("resnetv2_50x1_bit", StdConv2d),
        ("vit_small_r26_s32_224", StdConv2dSame),
        ("tf_efficientnetv2_b0", Conv2dSame),
    ],
)
def test_timms_variants_are_converted_in_its_networks(name, cls):
    with torch.device("meta"):
        model = timm.create_model(name)
        cs.convert(model)
    converted = [module for module in model.modules() if isinstance(module, cs.CoConv2d) and isinstance(module, cls)]
    assert converted
    left = {row.reason for row in cs.get_plan(model).in_question if not row.converted}
    assert left <= {"one level: the conv itself"}


def test_gradients_reach_a_variants_gain():
    conv = ScaledStdConv2d(4, 8, 3)
    to_coconv_(conv, (1, 2), (4, 4))
    conv(torch.randn(1, 4, 8, 8)).square().sum().backward()
    assert conv.gain.grad.abs().sum() > 0
    assert conv.weight.grad.abs().sum() > 0


def test_a_parametrized_variant_keeps_both():
    conv = parametrizations.weight_norm(StdConv2d(4, 8, 3))
    image = torch.randn(1, 4, 8, 8)
    plain = StdConv2d(4, 8, 3)
    plain.weight = nn.Parameter(conv.weight.detach())
    to_coconv_(conv, (1, 2), (4, 4))
    torch.testing.assert_close(conv(image), naive_levels(plain, image, (1, 2), (4, 4)))
    to_conv_(conv)
    torch.testing.assert_close(conv(image), plain(image))


# -- Classes of one's own -----------------------------------------------------------------------------------------


class Renamed(nn.Conv2d):
    """Inherits its forward; has something of its own."""

    def doubled(self):
        return 2 * self.weight


class Halved(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, self.weight / 2, self.bias, self.stride, self.padding, self.dilation, self.groups)


class RenamedStd(StdConv2d):
    pass


def two(first):
    return nn.Sequential(first, nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("cls", [Renamed, RenamedStd])
def test_a_subclass_that_inherits_its_forward_needs_no_registration(cls):
    model = two(cls(4, 8, 3, padding=1))
    image = torch.randn(1, 4, 16, 16)
    expected = naive_levels(model[0], image, (1, 2, 3), (4, 2, 2))
    cs.convert(model, input_size=(4, 16, 16))
    assert isinstance(model[0], cls)
    torch.testing.assert_close(model[0](image), expected)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again[0]) is type(model[0])
        assert torch.equal(again(image), model(image))
    cs.revert(model)
    assert type(model[0]) is cls


def test_an_unknown_forward_is_left_alone_until_it_is_registered():
    model = two(Halved(4, 8, 3, padding=1))
    row = cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0]
    assert row.reason == "Halved has a forward of its own that register_coconv() does not know"

    @register_coconv
    class CoHalved(cs.CoConv2d, Halved):
        def forward(self, input):
            return self._conv_forward(input, self.weight / 2, self.bias)

    image = torch.randn(1, 4, 16, 16)
    expected = naive_levels(model[0], image, (1, 2, 3), (4, 2, 2))
    cs.convert(model, input_size=(4, 16, 16))
    assert type(model[0]) is CoHalved
    torch.testing.assert_close(model[0](image), expected)
    assert type(cs.revert(model)[0]) is Halved


@pytest.mark.parametrize("wrong", [nn.Conv2d, cs.CoConv2d, "CoHalved", type("Own", (cs.CoConv2d,), {})], ids=str)
def test_a_wrong_registration_says_what_to_derive_from(wrong):
    with pytest.raises(TypeError, match=r"must derive from CoConv2d and then from the convolution class it stands for"):
        register_coconv(wrong)


def test_an_unknown_forward_cannot_be_switched_by_hand_or_by_a_plan():
    conv = Conv2dSameExport(4, 8, 3)
    with pytest.raises(TypeError, match="Conv2dSameExport has a forward of its own"):
        to_coconv_(conv, (1, 2), (4, 4))
    assert type(conv) is Conv2dSameExport
    plan = cs.plan_conversion(two(nn.Conv2d(4, 8, 3)), input_size=(4, 16, 16))
    with pytest.raises(cs.PlanError, match="Conv2dSameExport has a forward of its own"):
        cs.apply_plan(two(conv), plan)


def test_from_conv_refuses_a_subclass_whose_forward_it_would_drop():
    with pytest.raises(ValueError, match="a StdConv2d does more than"):
        cs.CoConv2d.from_conv(StdConv2d(4, 8, 3), 2)


class Mixin:
    """Something to stand between."""


def test_what_stands_between_is_no_class_to_register_for():
    class Quartered(nn.Conv2d):
        def forward(self, input):
            return super().forward(input) / 4

    @register_coconv
    class CoQuartered(cs.CoConv2d, Mixin, Quartered):
        pass

    conv = Quartered(4, 8, 3)
    to_coconv_(conv, (1, 2), (4, 4))
    assert type(conv) is CoQuartered
    to_conv_(conv)
    assert type(conv) is Quartered


def test_what_was_converted_comes_back_after_another_class_was_registered():
    model = two(Halved(4, 8, 3, padding=1))

    def register():
        @register_coconv
        class CoHalved(cs.CoConv2d, Halved):
            def forward(self, input):
                return self._conv_forward(input, self.weight / 2, self.bias)

    register()
    cs.convert(model, input_size=(4, 16, 16))
    register()
    cs.revert(model)
    assert type(model[0]) is Halved


def test_a_parametrized_conv_of_a_subclass_refuses_to_be_pickled_as_torchs_does():
    conv = parametrizations.weight_norm(Renamed(4, 8, 3))
    to_coconv_(conv, (1, 2), (4, 4))
    with pytest.raises(RuntimeError, match="parametrized modules is only supported through state_dict"):
        pickle.dumps(conv)
