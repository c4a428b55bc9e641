"""Policies: maps in, levels out."""

import re

import pytest
import timm
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

import coconv_surgery as cs
from coconv_surgery.layers.arguments import kind
from coconv_surgery.planning.policies import get_policy, named_policy, settle
from coconv_surgery.tracing.observer import Call
from coconv_surgery.tracing.readers import Reader
from coconv_surgery.tracing.sites import ModuleSite
from coconv_surgery.tracing.trace import TracedConv


def traced(*sides, channels=64, groups=1, network=224):
    conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, device="meta")
    calls = tuple(Call((side, side), (side, side), Reader.LAYER) for side in sides)
    return TracedConv(ModuleSite("conv", (), conv), calls=calls, network_size=(network, network))


@pytest.mark.parametrize(("side", "levels"), [(56, 4), (28, 3), (14, 2), (7, 1)])
def test_resolution_is_table_1(side, levels):
    assert cs.ResolutionPolicy()(traced(side)).dilations == tuple(range(1, levels + 1))


@pytest.mark.parametrize(
    ("side", "channels", "splits"),
    [
        (4, 512, (512,)),
        (8, 512, (256, 256)),
        (16, 512, (172, 170, 170)),
        (32, 512, (128,) * 4),
        (64, 256, (64,) * 4),
        (128, 128, (32,) * 4),
    ],
)
def test_resolution_with_even_splits_is_table_2(side, channels, splits):
    assert cs.ResolutionPolicy(split="even")(traced(side, channels=channels)).splits == splits


@given(st.integers(1, 4096), st.integers(1, 8))
def test_resolution_grows_with_the_map_by_one_level_a_doubling(side, most):
    policy = cs.ResolutionPolicy(max_levels=most)
    here, doubled = (policy.levels(traced(s)) for s in (side, 2 * side))
    assert 1 <= here <= most
    assert doubled in (here, min(here + 1, most))


def test_five_levels_at_112():
    assert len(cs.ResolutionPolicy(max_levels=5)(traced(112)).dilations) == 5


@pytest.mark.parametrize(("side", "levels"), [(112, 4), (56, 4), (28, 3), (14, 2), (7, 1), (4, 1)])
def test_stage_goes_by_reduction(side, levels):
    assert cs.StagePolicy()(traced(side)).dilations == tuple(range(1, levels + 1))


def test_stage_rounds_odd_sizes_to_their_stage():
    assert [cs.StagePolicy().levels(traced(side, network=300)) for side in (75, 38, 19, 10)] == [4, 3, 2, 1]


@pytest.mark.parametrize(("side", "dilation"), [(56, 4), (28, 3), (14, 2), (7, 1)])
def test_top_keeps_the_highest_dilation_alone(side, dilation):
    assert settle(traced(side), cs.TopPolicy()(traced(side))) == cs.Levels((dilation,), (64,))


def test_min_channels_takes_levels_away():
    assert cs.UniformPolicy(4, min_channels=20)(traced(56)).splits == (32, 32)


def test_a_conv_never_gets_more_levels_than_channels_or_groups():
    assert cs.UniformPolicy(4)(traced(56, channels=3)).splits == (1, 1, 1)
    assert cs.UniformPolicy(4)(traced(56, channels=64, groups=2)).splits == (32, 32)


def test_a_plain_function_is_a_policy(net):
    plan = cs.plan_conversion(net, lambda conv: (1, 5) if conv.name == "stem" else 1, input_size=32)
    assert [row.dilations for row in plan.converted] == [(1, 5)]


def test_a_policy_may_give_levels_in_full(net):
    plan = cs.plan_conversion(net, lambda conv: cs.Levels((1, 3), (2, 6)), input_size=32)
    assert [(row.dilations, row.splits) for row in plan.converted] == [((1, 3), (2, 6))] * 2


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: cs.ResolutionPolicy(max_levels=0), "max_levels=0"),
        (lambda: cs.UniformPolicy(0), "count=0"),
        (lambda: cs.StagePolicy(()), r"stages=\(\)"),
        (
            lambda: get_policy("stage(4,3,2)"),
            r"stages=\(4, 3, 2\) must be four numbers of at least 1, for reductions 4",
        ),
        (lambda: cs.UniformPolicy(split="odd"), "split='odd'"),
        (lambda: cs.UniformPolicy(shared="mean"), "shared='mean'"),
        (lambda: cs.UniformPolicy(min_channels=0), "min_channels=0"),
        (lambda: get_policy("Resolution"), "did you mean 'resolution'"),
        (lambda: get_policy("resolution(0)"), r"policy 'resolution\(0\)': max_levels=0 must be at least 1"),
        (lambda: named_policy("stage", stags=(1, 2)), "policy 'stage' has no key 'stags': did you mean 'stages'"),
        (lambda: named_policy("stage(1,1,1,1)", stages=(1,)), r"policy 'stage\(1,1,1,1\)': .*stages"),
    ],
)
def test_a_wrong_setting_is_named(policy, message):
    with pytest.raises(ValueError, match=message):
        policy()


@pytest.mark.parametrize("name", ["uniform(-1)", "uniform()", "stage(4,,3)", "uniform(2)x", "uniform(2.5)", "", "(2)"])
def test_a_name_that_is_none_is_told_what_names_look_like(name):
    with pytest.raises(
        ValueError, match=rf"unknown policy '{re.escape(name)}': .*as in 'stage\(4,3,2,1\)' or 'uniform"
    ):
        get_policy(name)


def test_a_name_with_numbers_takes_settings_too():
    assert named_policy("stage(3,3,2,1)", split="even") == cs.StagePolicy((3, 3, 2, 1), split="even")


@pytest.mark.parametrize("answer", [2.0, None, "2", True, object(), {"foo": 1}, b"12"], ids=kind)
def test_an_answer_of_another_kind_is_told_what_would_do(net, answer):
    advice = r"gave stem the levels .*: give a number of levels, a sequence of dilations, or Levels\("
    with pytest.raises(ValueError, match=f"policy .*{advice}"):
        cs.plan_conversion(net, lambda conv: answer, input_size=32)
    if answer is not None:
        with pytest.raises(ValueError, match=rf"overrides\['stem'\] {advice}"):
            cs.plan_conversion(net, overrides={"stem": answer}, input_size=32)


def test_a_named_policy_takes_its_settings_from_the_conversion():
    by_settings = cs.plan_conversion(timm.create_model("test_resnet"), "resolution", split="even", max_levels=3)
    by_object = cs.plan_conversion(timm.create_model("test_resnet"), cs.ResolutionPolicy(split="even", max_levels=3))
    assert by_settings == by_object


def test_settings_do_not_go_with_a_policy_that_is_an_object():
    with pytest.raises(TypeError, match="split: settings go with the name of a policy; this one has its own"):
        cs.convert(timm.create_model("test_resnet"), cs.ResolutionPolicy(), split="even")


def test_a_misspelt_argument_that_is_not_the_policys_is_named():
    with pytest.raises(TypeError, match=r"there is no argument 'input_sise': did you mean 'input_size'"):
        cs.convert(timm.create_model("test_resnet"), input_sise=8)


def test_a_misspelt_argument_of_a_conversion_is_named_with_what_the_policy_takes():
    with pytest.raises(ValueError, match="policy 'resolution' has no key 'splits': did you mean 'split'"):
        cs.convert(timm.create_model("test_resnet"), splits="even")
