"""Theoretical receptive fields, against what a network responds to, pixel by pixel."""

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from forwards import NO_FLEX_ATTENTION, attend, needs_modes_for_functions

import coconv_surgery as cs

SIZE = 24


def responds_to(model, conv):
    """Pixels whose change to NaN reaches the middle of a convolution's output: every operation passes that on."""
    seen, outputs = np.zeros((SIZE, SIZE), bool), []
    handle = conv.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    model = model.eval().double()
    with torch.no_grad():
        for place in range(SIZE * SIZE):
            image = torch.rand(1, 3, SIZE, SIZE, dtype=torch.float64)
            image[0, :, place // SIZE, place % SIZE] = torch.nan
            outputs.clear()
            model(image)
            height, width = outputs[0].shape[-2:]
            seen[place // SIZE, place % SIZE] = outputs[0][0, :, height // 2, width // 2].isnan().any()
    handle.remove()
    return seen


def conv(channels_in, channels_out, kernel=3, **arguments):
    return nn.Conv2d(channels_in, channels_out, kernel, **{"padding": kernel // 2, **arguments})


class Functional(nn.Module):
    """A network of which forward is a function of the last convolution."""

    def __init__(self, body):
        super().__init__()
        self.first, self.last, self.body = conv(3, 8), conv(8, 4), body

    def forward(self, x):
        return self.last(self.body(self.first(x)))


def gated(x):
    return x * x.mean((2, 3), keepdim=True).sigmoid()


def strips(x):
    return x + x.mean(3, keepdim=True)


def tokens(x):
    flat = x.flatten(2).transpose(1, 2)
    return (flat @ torch.ones(8, 8, dtype=x.dtype)).transpose(1, 2).reshape(x.shape)


def attention(x):
    flat = x.flatten(2).transpose(1, 2)
    return ((flat @ flat.transpose(1, 2)).softmax(-1) @ flat).transpose(1, 2).reshape(x.shape)


def in_place(x):
    F.relu_(x)
    return x.add_(F.max_pool2d(x, 3, 1, 1))


def halves(x):
    top, bottom = x.split(12, dim=2)
    return torch.cat([F.avg_pool2d(top, 3, 1, 1), bottom], dim=2)


BODIES = {
    "identity": lambda x: x,
    "in place": in_place,
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "nearest": lambda x: F.interpolate(F.avg_pool2d(x, 4), scale_factor=2),
    "bilinear": lambda x: F.interpolate(F.avg_pool2d(x, 3), scale_factor=2.0, mode="bilinear"),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 7),
    "gate": gated,
    "strips": strips,
    "tokens": tokens,
    "attention": attention,
    "halves": halves,
    "crop": lambda x: x[:, :, 3:, ::2],
    "reflect": lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect"),
    "pad": lambda x: F.pad(x, (2, 1, 0, 3)),
    "channels last": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "instance norm": F.instance_norm,
    "transposed": lambda x: F.conv_transpose2d(x, torch.ones(8, 8, 3, 3, dtype=x.dtype), stride=2, padding=1),
    "shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2)[:, :, 1:-1, 1:-1], 2),
}


@pytest.mark.parametrize("body", BODIES)
def test_a_field_is_the_pixels_that_the_unit_responds_to(body):
    model = Functional(BODIES[body])
    field = cs.receptive_fields(model, SIZE, names="last").rows[0]
    assert field.unknown is None
    np.testing.assert_array_equal(field.mask, responds_to(model, model.last))


def test_levels_have_holes_that_are_counted():
    model = nn.Sequential(conv(3, 8), conv(8, 8, stride=2), conv(8, 8), conv(8, 8, 1))
    cs.convert(model, input_size=SIZE, overrides={"2": (1, 3)})
    field = cs.receptive_fields(model, SIZE)["2"]
    np.testing.assert_array_equal(field.mask, responds_to(model, model[2]))
    height, width = field.size
    assert field.pixels == field.mask.sum() < height * width


def test_reverted_is_the_network_before_and_nothing_of_it_changes():
    plain = timm.create_model("resnet18")
    model = cs.convert(timm.create_model("resnet18"))
    plan, state = cs.get_plan(model), {name: value.clone() for name, value in model.state_dict().items()}
    before, after = cs.receptive_fields(model, reverted=True), cs.receptive_fields(model)
    assert str(before) == str(cs.receptive_fields(plain))
    assert after["layer1.0.conv1"].size > before["layer1.0.conv1"].size
    assert model.training
    assert cs.get_plan(model) == plan
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def recursion(layers):
    """The standard one: every kernel adds (k - 1) times the stride so far."""
    size, stride = 1, 1
    for kernel, step in layers:
        size, stride = size + (kernel - 1) * stride, stride * step
    return size


def test_vgg_and_resnet_have_the_known_fields():
    vgg = cs.receptive_fields(timm.create_model("vgg16"))
    stages = [layer for count in (2, 2, 3, 3) for layer in [(3, 1)] * count + [(2, 2)]]
    assert vgg["features.28"].size == (196, 196) == (recursion(stages + [(3, 1)] * 3),) * 2
    resnet = cs.receptive_fields(timm.create_model("resnet50"))
    blocks = [(3, 1)] * 3 + [(3, 2)] + [(3, 1)] * 3 + [(3, 2)] + [(3, 1)] * 5 + [(3, 2)] + [(3, 1)] * 2
    assert resnet["layer4.2.conv3"].size == (427, 427) == (recursion([(7, 2), (3, 2), *blocks]),) * 2


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_atto", "hrnet_w18_small", "tresnet_m"])
def test_every_field_of_a_family_is_known_or_the_operation_is_named(name):
    report = cs.receptive_fields(timm.create_model(name))
    unknown = {row.unknown for row in report.rows} - {None}
    assert unknown == ({"no rule for view"} if name == "tresnet_m" else set())
    assert any(row.whole for row in report.rows) or unknown


def test_squeeze_and_excitation_sees_the_whole_image_and_says_through_what():
    field = cs.receptive_fields(timm.create_model("efficientnet_b0"), 64, names="conv_head").rows[0]
    assert field.size == (64, 64)
    assert field.whole
    assert field.through == ("mean",)
    assert field.remark == "through mean: whole image"


def test_what_no_rule_knows_is_said_and_left_alone():
    model = Functional(lambda x: x.flip(2))
    field = cs.receptive_fields(model, SIZE)["last"]
    assert field.size is field.pixels is field.mask is None
    assert field.unknown == "no rule for flip"


@NO_FLEX_ATTENTION
@needs_modes_for_functions
def test_an_operator_that_takes_functions_is_named_as_unknown():
    field = cs.receptive_fields(Functional(attend), SIZE)["last"]
    assert field.unknown == "no rule for flex_attention"


def test_a_write_by_way_of_a_part_is_not_overlooked():
    def body(x):
        x[:, :4, 2:].add_(x[:, :4, :-2].clone())
        return x

    field = cs.receptive_fields(Functional(body), SIZE)["last"]
    assert field.unknown == "no rule for a write in place"


def test_a_network_that_does_not_run_is_named():
    with pytest.raises(ValueError, match="Sequential does not run on these inputs"):
        cs.receptive_fields(nn.Sequential(conv(3, 8), nn.Flatten(), nn.Linear(5, 5)), SIZE)


def test_a_convolution_that_is_not_called_is_in_the_report():
    model = Functional(lambda x: x)
    model.spare = conv(3, 3)
    assert cs.receptive_fields(model, SIZE)["spare"].remark == "unknown: it is not called"
