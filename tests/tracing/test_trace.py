"""The trace: where each convolution runs, how large its map is, and who reads it."""

import contextlib
import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.ao.nn.qat as qat
import torch.ao.nn.quantized as quantized
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from forwards import NO_FLEX_ATTENTION, Model, attend, fails_on_torch_2_4, needs_modes_for_functions
from timm.layers import CondConv2d
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations
from torchvision.ops import DeformConv2d

import coconv_surgery as cs
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.readers import Reader
from coconv_surgery.tracing.trace import trace_network

QCONFIG = get_default_qat_qconfig()


def conv(inputs=4, outputs=4):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def trace(model, side=16, channels=4):
    traced = trace_network(model, find_sites(model), Inputs((torch.ones(1, channels, side, side),))).convs
    return {entry.name: entry for entry in traced}


def reader(forward, **parts):
    (call,) = trace(Model(forward, conv=conv(), **parts))["conv"].calls
    return call.reader


# -- Who reads the output -----------------------------------------------------------------------------------------


def test_a_conv_before_another_layer_feeds_it():
    assert reader(lambda m, x: m.mix(m.conv(x).relu()), mix=nn.Conv2d(4, 2, 1)) is Reader.LAYER


def test_a_conv_before_a_linear_layer_feeds_it():
    assert reader(lambda m, x: m.mix(m.conv(x).mean((2, 3))), mix=nn.Linear(4, 2, bias=False)) is Reader.LAYER


def test_a_conv_before_a_last_norm_is_a_feature():
    assert reader(lambda m, x: m.norm(m.conv(x)).relu(), norm=nn.BatchNorm2d(4)) is Reader.LAYER


def test_a_conv_before_a_frozen_layer_feeds_it():
    assert reader(lambda m, x: m.mix(m.conv(x)), mix=nn.Conv2d(4, 2, 1).requires_grad_(False)) is Reader.LAYER


def blur(channels):
    """A fixed filter with a learned bias."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    filter = layer.weight.detach().fill_(1 / 9)
    del layer.weight
    layer.register_buffer("weight", filter)
    return layer


def diagonal(kind):
    layer = kind(4, 4, 1)
    layer.weight.data = torch.diag(torch.rand(4))[:, torch.randperm(4)].view(4, 4, 1, 1)
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 8, 3, groups=4, bias=False),
        pytest.param(blur(4), marks=fails_on_torch_2_4("keeps no shapes in its record")),
        nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4),
        nn.ConvTranspose2d(4, 8, 2, 2, groups=4),
        diagonal(nn.Conv2d),
        diagonal(nn.ConvTranspose2d),
    ],
    ids=str,
)
def test_a_layer_that_takes_each_channel_alone_mixes_nothing(layer):
    assert reader(lambda m, x: m.layer(m.conv(x)), layer=layer) is Reader.NOBODY
    mix = nn.Conv2d(layer.out_channels, 2, 1)
    assert reader(lambda m, x: m.mix(m.layer(m.conv(x))), layer=layer, mix=mix) is Reader.LAYER


def test_a_depthwise_layer_that_writes_its_kernels_mixes_nothing():
    def forward(model, x):
        y = model.layer(model.conv(x))
        with torch.no_grad():
            model.layer.weight.mul_(0.9)
        return y

    assert reader(forward, layer=nn.Conv2d(4, 4, 3, padding=1, groups=4)) is Reader.NOBODY


def test_a_diagonal_that_is_trained_mixes():
    layer = diagonal(nn.Conv2d).requires_grad_(True)
    assert reader(lambda m, x: m.layer(m.conv(x)), layer=layer) is Reader.LAYER


def test_what_is_frozen_before_it_is_loaded_mixes():
    layer = nn.Conv2d(4, 4, 1).requires_grad_(False)
    nn.init.zeros_(layer.weight)
    assert reader(lambda m, x: m.layer(m.conv(x)), layer=layer) is Reader.LAYER


def test_a_layer_along_channels_mixes_them():
    forward = lambda m, x: m.layer(m.conv(x).unsqueeze(1)).squeeze(2)  # noqa: E731
    assert reader(forward, layer=nn.Conv3d(1, 4, (4, 3, 3))) is Reader.LAYER


def test_a_layer_whose_kernels_are_gated_mixes():
    def forward(model, x):
        y = model.conv(x)
        return F.conv2d(y, model.layer.weight * y.mean((2, 3)).sigmoid().view(1, 4, 1, 1), model.layer.bias)

    assert reader(forward, layer=nn.Conv2d(4, 4, 1)) is not Reader.NOBODY


@pytest.mark.parametrize("activate", [F.relu, F.leaky_relu])
def test_features_that_are_correlated_are_features(activate):
    def forward(model, x):
        y = activate(model.conv(x))
        return model.mix(F.conv2d(y, y.mean((2, 3)).view(4, 1, 1, 1), groups=4))

    assert reader(forward, mix=conv()) is Reader.LAYER


def test_the_last_conv_is_a_prediction_layer():
    assert reader(lambda m, x: m.conv(x).sigmoid()) is Reader.NOBODY


def test_a_single_learned_factor_behind_a_conv_mixes_nothing():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.factor

    assert reader(lambda m, x: m.scale(m.conv(x)).exp(), scale=Scale()) is Reader.NOBODY


def test_a_detached_map_is_read_all_the_same():
    model = Model(lambda m, x: m.mix(m.conv(m.first(x).detach())), first=conv(), conv=conv(), mix=conv(4, 2))
    assert [entry.calls[0].reader for entry in trace(model).values()] == [Reader.LAYER, Reader.LAYER, Reader.NOBODY]


def test_offsets_and_mask_of_a_deformable_conv_are_read_by_position():
    model = Model(
        lambda m, x: m.mix(m.deform(x, m.offset(x), m.mask(x).sigmoid())),
        offset=conv(4, 18),
        mask=conv(4, 9),
        deform=DeformConv2d(4, 4, 3, padding=1),
        mix=nn.Conv2d(4, 2, 1),
    )
    traced = trace(model)
    assert traced["offset"].calls[0].reader is traced["mask"].calls[0].reader is Reader.POSITION


def test_a_conv_that_makes_kernels_is_read_by_position():
    model = Model(lambda m, x: F.conv2d(x, m.conv(x).mean((2, 3)).view(1, 4, 1, 1)), conv=conv())
    assert trace(model)["conv"].calls[0].reader is Reader.POSITION


def test_a_conv_that_makes_a_sampling_grid_is_read_by_position():
    forward = lambda m, x: m.mix(F.grid_sample(x, m.conv(x)[:, :2].permute(0, 2, 3, 1)))  # noqa: E731
    assert reader(forward, mix=nn.Conv2d(4, 2, 1)) is Reader.POSITION


def sampled(x, field):
    return F.grid_sample(x, field.permute(0, 2, 3, 1), align_corners=False)


def test_a_field_that_is_activated_by_halves_is_read_by_position():
    parts = {"conv": conv(4, 2), "mix": nn.Conv2d(6, 2, 1)}

    def forward(model, x):
        field = F.leaky_relu(model.conv(x), 0.1)
        return model.mix(torch.cat([sampled(x, field), field], 1))

    assert trace(Model(forward, **parts))["conv"].calls[0].reader is Reader.POSITION


@fails_on_torch_2_4("keeps no shapes in its record")
def test_a_field_that_a_layer_makes_larger_is_read_by_position():
    parts = {"conv": conv(4, 2), "larger": nn.ConvTranspose2d(2, 2, 4, 2, 1), "mix": nn.Conv2d(6, 2, 1)}

    def forward(model, x):
        field = model.larger(model.conv(x))
        return model.mix(torch.cat([sampled(x, 0.6 * field), field], 1))

    assert trace(Model(forward, **parts))["conv"].calls[0].reader is Reader.POSITION


def test_features_of_which_a_layer_makes_a_field_are_features():
    def forward(model, x):
        y = model.conv(x)
        return model.mix(torch.cat([sampled(x, model.field(y)), y], 1))

    parts = {"conv": conv(4, 8), "field": nn.Conv2d(8, 2, 1), "mix": nn.Conv2d(12, 2, 1)}
    assert trace(Model(forward, **parts))["conv"].calls[0].reader is Reader.LAYER


def test_prediction_layers_are_left_alone_unless_overridden():
    model = Model(lambda m, x: m.predict(m.conv(x).relu()), conv=conv(), predict=conv())
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    assert [(row.name, row.converted) for row in plan.rows] == [("conv", True), ("predict", False)]
    assert "prediction layer" in plan.rows[1].reason
    plan = cs.plan_conversion(model, input_size=(4, 16, 16), overrides={"predict": (1, 3)})
    assert plan.rows[1].dilations == (1, 3)


# -- What the graph shows -----------------------------------------------------------------------------------------


def test_every_call_of_a_shared_conv_is_a_node():
    model = Model(lambda m, x: m.mix(m.conv(m.conv(x))), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    entry = trace(model)["conv"]
    assert entry.nodes == ("conv", "conv_1")
    assert [call.output_size for call in entry.calls] == [(16, 16), (16, 16)]


def test_an_untraceable_block_is_one_node_and_its_reason_is_kept():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(conv())

        def forward(self, x):
            return self.inner(x) if x.shape[0] == 1 and x.float().flatten()[0] > -9 else x

    model = Model(lambda m, x: m.mix(m.block(m.first(x))), first=conv(), block=Block(), mix=nn.Conv2d(4, 2, 1))
    traced = trace(model)
    assert traced["first"].untraced is None
    assert "block" not in traced
    assert traced["block.inner.0"].nodes == ("_0",), "the block's children are traced apart"
    assert traced["block.inner.0"].calls[0].output_size == (16, 16), "the real forward pass gives the size"
    assert traced["block.inner.0"].calls[0].reader is Reader.LAYER


def test_a_conv_called_straight_from_an_untraceable_block_tells_why_it_has_no_node():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return self.conv(x) if x.sum() != 0 else x

    model = Model(lambda m, x: m.mix(m.block(x)), block=Block(), mix=nn.Conv2d(4, 2, 1))
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    assert plan.rows[0].converted
    assert "block" in plan.rows[0].untraced
    assert "TraceError" in plan.rows[0].untraced


def test_a_conv_inside_a_leaf_of_timm_says_so():
    with torch.device("meta"):
        plan = cs.plan_conversion(timm.create_model("vgg11"))
    assert {row.untraced for row in plan.rows} == {None, "torch.fx takes pre_logits as one node"}


def test_a_conv_that_does_not_run_is_in_the_plan_as_such():
    model = Model(lambda m, x: m.mix(x), mix=nn.Conv2d(4, 2, 1), idle=conv())
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    assert plan.rows[1].reason == "did not run in evaluation mode"


def test_a_weight_that_is_read_outside_its_conv_leaves_it_alone():
    model = Model(
        lambda m, x: m.mix(m.conv(x) + F.conv2d(x, m.conv.weight, padding=1)), conv=conv(), mix=nn.Conv2d(4, 2, 1)
    )
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    assert plan.rows[0].reason == "its weight is also used outside its own forward"


def test_a_weight_whose_type_is_asked_for_is_no_obstacle():
    model = Model(lambda m, x: m.mix(m.conv(x.to(m.conv.weight.dtype))), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    assert cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].converted


@pytest.mark.parametrize("pad", [nn.ReflectionPad2d(1), nn.ReplicationPad2d(1)])
def test_padding_by_another_layer_leaves_a_conv_alone(pad):
    model = Model(lambda m, x: m.mix(m.conv(m.pad(x))), pad=pad, conv=nn.Conv2d(4, 4, 3), mix=nn.Conv2d(4, 2, 1))
    assert "padding by another layer" in cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].reason


def test_a_replaced_forward_is_left_alone():
    model = Model(lambda m, x: m.mix(m.conv(x)), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    model.conv.forward = model.conv.forward
    assert (
        cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].reason == "its forward was replaced on the instance"
    )


# -- What is no plain convolution ---------------------------------------------------------------------------------


class Partial(nn.Conv2d):
    """A partial convolution: renormalises by the share of its input that is not masked."""

    def forward(self, input):
        seen = (input != 0).float().mean(1, keepdim=True)
        return super().forward(input) / (seen + 1)


class Conditional(nn.Module):
    """Calls timm's conditional convolution with routing weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.route = CondConv2d(4, 4, 3, padding="same", num_experts=2), nn.Linear(4, 2)

    def forward(self, x):
        return self.conv(x, self.route(x.mean((2, 3))).sigmoid())


class Deformable(nn.Module):
    """Calls a deformable convolution with offsets of nothing."""

    def __init__(self):
        super().__init__()
        self.conv = DeformConv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x, x.new_zeros(x.shape[0], 18, *x.shape[2:]))


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [
        (Deformable, "part.conv", "DeformConv2d is not an nn.Conv2d"),
        (Conditional, "part.conv", "CondConv2d is not an nn.Conv2d"),
        (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), "part", "ConvTranspose2d is not an nn.Conv2d"),
        (lambda: Partial(4, 4, 3, padding=1), "part", "Partial has a forward of its own"),
        (lambda: qat.Conv2d(4, 4, 3, padding=1, qconfig=QCONFIG), "part", "torch.ao.nn.qat.modules.conv.Conv2d has a"),
    ],
    ids=["deformable", "conditional", "transposed", "partial", "quantisation-aware"],
)
def test_another_kind_of_convolution_is_in_the_plan_with_its_reason(build, name, reason):
    model = Model(lambda m, x: m.mix(m.part(x)), part=build(), mix=nn.Conv2d(4, 2, 1))
    classes = [type(module) for module in model.modules()]
    rows = {row.name: row for row in cs.plan_conversion(model, input_size=(4, 16, 16)).rows}
    assert rows[name].reason.startswith(reason)
    assert (rows[name].signature.kernel_size, rows[name].output_sizes) == ((3, 3), ((16, 16),))
    with pytest.warns(cs.NoChangeWarning):
        cs.convert(model, input_size=(4, 16, 16))
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(ValueError, match=f"overrides.*cannot be split: {reason}"):
        cs.convert(model, input_size=(4, 16, 16), overrides={name: 2})


def test_a_quantised_conv_is_in_the_plan_with_its_reason():
    model = Model(
        lambda m, x: m.mix(m.part(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)).dequantize()),
        part=quantized.Conv2d(4, 4, 3, padding=1),
        mix=nn.Conv2d(4, 2, 1),
    )
    row = cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0]
    assert (row.name, row.reason) == ("part", "torch.ao.nn.quantized.modules.conv.Conv2d is not an nn.Conv2d")


def test_a_plan_with_other_convolutions_replays_from_its_file(tmp_path):
    model = Model(lambda m, x: m.mix(m.conv(m.part(x))), part=Deformable(), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    plan.to_json(tmp_path / "plan.json")
    assert cs.Plan.from_json(tmp_path / "plan.json") == plan
    cs.apply_plan(model, cs.Plan.from_json(tmp_path / "plan.json"))
    assert cs.get_plan(model).diff(plan) == []
    forced = cs.Plan.from_json(plan.to_json().replace('"reason": "DeformConv2d is not an nn.Conv2d"', '"reason": null'))
    forced = replace(
        forced, rows=tuple(replace(r, dilations=(1, 2), splits=(2, 2)) for r in forced.rows[:1]) + forced.rows[1:]
    )
    with pytest.raises(cs.PlanError, match=r"part.conv \(DeformConv2d is not an nn.Conv2d\)"):
        cs.apply_plan(model, forced)


def test_a_weight_that_an_untraceable_block_reads_leaves_its_conv_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            scale = 2 if x.sum() != 0 else 1
            return self.conv(x) + F.conv2d(x, self.conv.weight * scale, padding=1)

    model = Model(lambda m, x: m.mix(m.block(x)), block=Block(), mix=nn.Conv2d(4, 2, 1))
    row = cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0]
    assert row.reason == "its weight is also used outside its own forward"


def test_a_conv_whose_module_is_never_called_but_whose_weight_is_says_so():
    model = Model(lambda m, x: m.mix(F.conv2d(x, m.conv.weight, padding=1)), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    row = cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0]
    assert row.reason == "its weight is also used outside its own forward"


@pytest.mark.parametrize(
    "reads",
    [
        lambda m, x: F.conv2d(x, torch.cat([m.conv.weight[:2], m.conv.weight[2:]]), padding=1),
        lambda m, x: F.conv2d(x, torch.cat([m.conv.weight]), padding=1),
        lambda m, x: x * m.conv.weight.mean(),
    ],
)
@pytest.mark.parametrize("parametrized", [False, True])
def test_a_weight_that_takes_part_outside_its_conv_leaves_it_alone(reads, parametrized):
    model = Model(lambda m, x: m.mix(m.conv(x) + reads(m, x)), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    if parametrized:
        parametrizations.weight_norm(model.conv)
    row = cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0]
    assert row.reason == "its weight is also used outside its own forward"


@pytest.mark.parametrize(
    "looks",
    [
        lambda m, x: x.type_as(m.conv.weight),
        lambda m, x: x.to(m.conv.weight),
        lambda m, x: x + 0 * float(m.conv.weight.detach().sum() > 9),
        lambda m, x: (m.conv.weight.norm(), x)[1],
    ],
)
def test_a_weight_that_is_looked_at_is_no_obstacle(looks):
    model = Model(lambda m, x: m.mix(m.conv(looks(m, x))), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    assert cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].converted


def test_an_output_that_is_handed_on_as_it_is_is_no_read():
    model = Model(lambda m, x: m.mix(m.conv(x).type_as(x).contiguous()), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    assert cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].converted


def test_a_conv_whose_exception_is_caught_hides_no_read():
    def forward(m, x):
        with contextlib.suppress(RuntimeError):
            m.conv(x[:, :3])
        return m.mix(F.conv2d(x, m.other.weight, padding=1) + m.other(x))

    model = Model(forward, conv=conv(), other=conv(), mix=nn.Conv2d(4, 2, 1))
    rows = {row.name: row.reason for row in cs.plan_conversion(model, input_size=(4, 16, 16)).rows}
    assert rows["other"] == "its weight is also used outside its own forward"


class Odd(nn.Module):
    """Something that describes itself in a convolution's words, and means other things by them."""

    def __init__(self, **attributes):
        super().__init__()
        self.in_channels = self.out_channels = 4
        self.kernel_size, self.weight = (3, 3), nn.Parameter(torch.ones(4))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, pair, scale=1.0):
        return pair[0] * self.weight[:, None, None] * scale, None


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"stride": None},
        {"padding": (1, 1, 1, 1)},
        {"padding": [[1, 1], [1, 1]]},
        {"stride": (1,)},
        {"groups": None},
    ],
    ids=str,
)
def test_a_module_that_is_odd_stops_no_plan(attributes):
    model = Model(lambda m, x: m.mix(m.conv(m.odd(pair=(x, x))[0])), odd=Odd(**attributes), conv=conv(), mix=conv(4, 2))
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    assert [(row.name, row.converted) for row in plan.rows][:2] == [("odd", False), ("conv", True)]
    assert plan.rows[0].reason == "Odd is not an nn.Conv2d"
    assert cs.Plan.from_json(plan.to_json()) == plan
    cs.apply_plan(model, plan)


def test_a_prediction_that_steers_offsets_through_two_layers_is_a_prediction():
    def forward(m, x):
        boxes = m.predict(x)
        return boxes, m.mix(m.deform(x, m.offset(m.hidden(boxes).relu())))

    model = Model(
        forward,
        predict=conv(4, 4),
        hidden=conv(4, 4),
        offset=nn.Conv2d(4, 18, 1),
        deform=DeformConv2d(4, 4, 3, padding=1),
        mix=nn.Conv2d(4, 2, 1),
    )
    rows = {row.name: row.converted for row in cs.plan_conversion(model, input_size=(4, 16, 16)).rows}
    assert (rows["predict"], rows["hidden"]) == (False, True)


def test_convs_that_share_a_weight_get_the_same_levels():
    model = Model(
        lambda m, x: m.mix(m.second(F.max_pool2d(m.first(x), 2))), first=conv(), second=conv(), mix=nn.Conv2d(4, 2, 1)
    )
    model.second.weight = model.first.weight
    cs.convert(model, input_size=(4, 16, 16))
    assert model.first.dilations == model.second.dilations == (1, 2)
    assert model.first.weight is model.second.weight
    assert type(cs.revert(model).first) is nn.Conv2d


# -- Padding that is not the conv's ---------------------------------------------------------------------------------


def test_levels_asked_for_whose_reflect_padding_is_wider_than_the_map_are_an_error_before_anything_changes():
    model = Model(
        lambda m, x: m.mix(m.conv(x)),
        conv=nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"),
        mix=nn.Conv2d(4, 2, 1),
    )
    with pytest.raises(ValueError, match=r"conv.*reflect padding of 5 at dilation 4 needs more than a side of 5"):
        cs.convert(model, overrides={"conv": (1, 4)}, input_size=(4, 5, 5))
    assert type(model.conv) is nn.Conv2d


def test_a_named_policy_gives_no_more_levels_than_fit_on_the_map():
    for mode, side in (("reflect", 4), ("circular", 4), ("zeros", 4)):
        first = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
        plan = cs.plan_conversion(
            nn.Sequential(first, nn.Conv2d(4, 2, 1)), cs.UniformPolicy(4), input_size=(4, side, side)
        )
        assert plan.rows[0].dilations == (1, 2, 3)


# -- Networks and their inputs ------------------------------------------------------------------------------------


NESTED = {
    "a linear layer": lambda linear, ragged: linear(ragged),
    "products": lambda linear, ragged: linear(torch.matmul(torch.matmul(ragged, ragged.transpose(1, 2)), ragged)),
    "one of them": lambda linear, ragged: linear(ragged.select(0, 1))[None],
    "all apart": lambda linear, ragged: torch.nested.as_nested_tensor([linear(rows) for rows in ragged.unbind()]),
    "attention": lambda linear, ragged: linear(F.scaled_dot_product_attention(*[ragged.unsqueeze(1)] * 3).squeeze(1)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("reads", NESTED.values(), ids=NESTED.keys())
def test_maps_whose_rows_differ_in_length_have_no_positions(reads):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

        def forward(self, x):
            tokens = self.conv(x).relu().flatten(2).transpose(1, 2)
            ragged = torch.nested.as_nested_tensor([tokens[0, :10], tokens[0, :5]])
            out = reads(self.head, ragged)
            return torch.nested.to_padded_tensor(out, 0.0) if out.is_nested else out

    assert Nested()(torch.ones(1, 3, 32, 32)).shape[-1] == 4
    assert [row.name for row in cs.plan_conversion(Nested(), input_size=32).converted] == ["conv"]


def test_feature_extractors_that_hook_themselves_are_traced():
    model = timm.create_model("vgg11", features_only=True, feature_cls="hook")
    shapes = [feature.shape for feature in model(torch.ones(1, 3, 64, 64))]
    cs.convert(model, input_size=64)
    assert len(cs.get_plan(model).converted) > 0
    assert [feature.shape for feature in model(torch.ones(1, 3, 64, 64))] == shapes


OLD_TIMM = pytest.mark.xfail(not timm.is_model("csatv2"), reason="of a newer timm", strict=True)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 1), ("tresnet_m", 3), pytest.param("csatv2", 3, marks=OLD_TIMM), ("convnext_atto", 5)],
)
def test_the_number_of_image_channels_is_read_off_the_stem(name, channels):
    with torch.device("meta"):
        plan = cs.plan_conversion(timm.create_model(name, in_chans=channels))
    assert plan.input.startswith(f"1×{channels}×")


def test_inputs_may_say_how_to_call_the_network():
    class TwoStage(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.mix = conv(), conv(), nn.Conv2d(4, 2, 1)
            self.proposals = 1000

        def propose(self, x):
            return self.first(x).expand(self.proposals, -1, -1, -1)

        def refine(self, x):
            return self.mix(self.second(x))

    def call(model, x):
        model.proposals = 2
        return model.refine(model.propose(x))

    model = TwoStage()
    inputs = cs.Inputs((torch.ones(1, 4, 16, 16),), call=call)
    assert [row.converted for row in cs.plan_conversion(model, example_inputs=inputs).rows] == [True, True, False]
    assert model.proposals == 1000, "what is called is a copy"


@pytest.mark.parametrize(("needs_numbers", "sizes"), [(False, "shapes alone"), (True, "a real forward pass")])
def test_a_plan_says_how_it_was_found(needs_numbers, sizes):
    model = Model(lambda m, x: m.mix(m.conv(x)), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    inputs = cs.Inputs((torch.ones(1, 4, 16, 16),), needs_numbers=needs_numbers)
    plan = cs.plan_conversion(model, example_inputs=inputs)
    assert plan.traced == f"torch.fx, whole; sizes from {sizes}"
    assert plan.traced in str(plan)


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.conv.weight.mul_(0.99),
        lambda m: m.conv.weight.clamp_(min=0),
        lambda m: m.mix.bias.add_(m.conv.bias.sum()),
    ],
)
def test_a_forward_that_writes_its_weights_leaves_those_of_the_network_alone(write):
    def forward(m, x):
        with torch.no_grad():
            write(m)
        return m.mix(m.conv(x))

    model = Model(forward, conv=conv(), mix=nn.Conv2d(4, 2, 1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs = cs.Inputs((torch.ones(1, 4, 16, 16),), needs_numbers=True)
    assert cs.plan_conversion(model, example_inputs=inputs).traced.endswith("a real forward pass")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_real_forward_pass_leaves_gradients_and_buffers_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x if x.sum() != 0 else -x

    model = Model(lambda m, x: m.mix(m.conv(m.count(x))), count=Counting(), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    model.conv.weight.requires_grad_(False)
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    assert plan.traced.endswith("a real forward pass")
    assert model.count.calls == 0
    assert not model.conv.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_may_be_arguments_by_name():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mix = conv(), nn.Conv2d(4, 2, 1)

        def forward(self, left, right=None, flip=False):
            x = left if right is None else left + right
            return self.mix(self.conv(x.flip(-1) if flip else x))

    images = {"left": torch.ones(1, 4, 32, 32), "right": torch.ones(1, 4, 32, 32), "flip": True}
    plan = cs.plan_conversion(Pair(), example_inputs=images)
    assert (plan.rows[0].levels, plan.rows[0].untraced, plan.input) == (4, None, "1×4×32×32, 1×4×32×32")
    assert cs.plan_conversion(Pair(), example_inputs=(images["left"],)).rows[0].levels == 4
    assert cs.plan_conversion(Pair(), example_inputs=images["left"]).rows[0].levels == 4


@NO_FLEX_ATTENTION
@needs_modes_for_functions
def test_an_operator_that_takes_functions_stops_no_plan_and_keeps_no_positions():
    layers = {"conv": nn.Conv2d(16, 16, 3), "mix": nn.Conv2d(16, 4, 1)}
    model = Model(lambda m, x: m.mix(m.conv(attend(F.pad(x, (1, 1, 2, 0)))).relu()), **layers)
    assert cs.plan_conversion(model, input_size=(16, 16, 16)).rows[0].reason is None


def test_a_cached_result_in_a_module_does_not_stop_the_trace():
    model = Model(lambda m, x: m.mix(m.conv(x)), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    model.cache = model(torch.ones(1, 4, 16, 16))
    assert cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].converted


KEPT = {}


def kept_in_an_attribute(model, x):
    if model.kept is None:
        model.kept = x.new_ones(1)
    return model.kept


def moved_to_where_the_image_is(model, x):
    model.table = model.table.to(x.device)
    return model.table


def kept_in_a_list(model, x):
    model.all_kept.append(x.mean())
    return model.all_kept[0]


def kept_outside(model, x):
    if "factor" not in KEPT:
        KEPT["factor"] = x.new_ones(1)
    return KEPT["factor"]


@pytest.mark.parametrize("branches", [False, True], ids=["", "branches by numbers"])
@pytest.mark.parametrize(
    "factor",
    [kept_in_an_attribute, moved_to_where_the_image_is, kept_in_a_list, kept_outside],
    ids=lambda f: f.__name__,
)
def test_what_a_network_keeps_of_one_look_at_it_is_not_there_at_the_next(factor, branches):
    def forward(model, x):
        y = model.conv(x) * factor(model, x)
        return model.mix(-y if branches and y.sum() < -1e9 else y)

    model = Model(forward, conv=conv(), mix=nn.Conv2d(4, 2, 1), kept=None, table=torch.ones(1), all_kept=[])
    assert [row.reason for row in cs.plan_conversion(model, input_size=(4, 16, 16)).rows] == [None, "kernel 1×1"]
    assert (model.kept, model.all_kept, KEPT) == (None, [], {})


def test_a_conv_that_runs_the_first_time_alone_is_converted():
    def forward(model, x):
        model.runs += 1
        return model.mix(model.conv(x) if model.runs == 1 else x)

    model = Model(forward, conv=conv(), mix=nn.Conv2d(4, 2, 1), runs=0)
    assert cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].converted


def test_a_norm_that_holds_a_process_group_does_not_stop_the_trace():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        norm = nn.SyncBatchNorm(4, process_group=dist.new_group())
        model = Model(lambda m, x: m.mix(m.norm(m.conv(x))), conv=conv(), norm=norm, mix=nn.Conv2d(4, 2, 1))
        assert cs.plan_conversion(model, input_size=(4, 16, 16)).rows[0].converted
    finally:
        dist.destroy_process_group()


def test_a_function_written_in_python_whose_output_nobody_keeps_does_not_stop_the_trace():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return Double.apply(x)

    def forward(m, x):
        m.twice(m.conv(x))
        return m.mix(m.conv(x))

    model = Model(forward, conv=conv(), twice=Doubling(), mix=nn.Conv2d(4, 2, 1))
    assert [row.converted for row in cs.plan_conversion(model, input_size=(4, 16, 16)).rows] == [False, False]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_callers_context_makes_no_difference(context):
    model = Model(lambda m, x: m.predict(m.conv(x).relu()), conv=conv(), predict=conv())
    plan = cs.plan_conversion(model, input_size=(4, 16, 16))
    image = torch.ones(1, 4, 16, 16)
    with context():
        assert cs.plan_conversion(model, input_size=(4, 16, 16)) == plan
        assert cs.plan_conversion(model, example_inputs=image).diff(plan) == []
        assert cs.plan_conversion(model, example_inputs=image.clone()).diff(plan) == []
    assert [row.converted for row in plan.rows] == [True, False]


@pytest.mark.parametrize("build", [nn.ConvTranspose2d, nn.Conv1d, nn.Conv3d], ids=lambda build: build.__name__)
def test_looking_at_a_network_evaluates_no_parametrization(build):
    dimensions = {nn.ConvTranspose2d: 2, nn.Conv1d: 1, nn.Conv3d: 3}[build]
    other = parametrizations.spectral_norm(build(4, 4, 3, padding=1)).train()
    model = Model(lambda m, x: m.mix(m.conv(x)), conv=conv(), mix=nn.Conv2d(4, 2, 1), other=other)
    before = copy.deepcopy(other.state_dict())
    random_state = torch.get_rng_state()
    cs.get_plan(model)
    cs.convert(model, input_size=(4, 16, 16))
    cs.revert(model)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dimensions == len(other.kernel_size)


def test_a_property_that_raises_does_not_stop_planning():
    class Raising(nn.Module):
        @property
        def weight(self):
            raise RuntimeError("not yet")

        kernel_size = in_channels = out_channels = weight

        def forward(self, x):
            return x

    model = Model(lambda m, x: m.mix(m.conv(m.part(x))), part=Raising(), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    assert [row.name for row in cs.plan_conversion(model, input_size=(4, 16, 16)).converted] == ["conv"]


def test_planning_leaves_the_generators_of_python_and_numpy_alone():
    class Noisy(nn.Module):
        def forward(self, x):
            return x * random.random() + np.random.rand()

    model = Model(lambda m, x: m.mix(m.conv(m.noise(x))), noise=Noisy(), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    cs.plan_conversion(model, input_size=(4, 16, 16))
    assert (random.random(), np.random.rand()) == expected


def test_hooks_on_saved_tensors_see_nothing_of_planning():
    seen = []
    model = Model(lambda m, x: m.mix(m.conv(x)), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    with torch.autograd.graph.saved_tensors_hooks(seen.append, lambda tensor: tensor):
        cs.plan_conversion(model, input_size=(4, 16, 16))
    assert seen == []


def test_planning_leaves_the_random_generator_alone():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if x.sum() != 0 else x

    model = Model(lambda m, x: m.mix(m.conv(m.noise(x))), noise=Noisy(), conv=conv(), mix=nn.Conv2d(4, 2, 1))
    state = torch.get_rng_state()
    cs.plan_conversion(model, input_size=(4, 16, 16))
    assert torch.equal(torch.get_rng_state(), state)
