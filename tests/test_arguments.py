"""Every public argument, given nonsense: it is taken, or refused by a message that names the argument."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from nonsense import NONSENSE, check
from timm.models.resnet import Bottleneck

import coconv_surgery as cs
from coconv_surgery.layers.levels import check_levels, complete_levels
from coconv_surgery.zoo.authors import is_authors_checkpoint
from coconv_surgery.zoo.progan import Generator

IMAGES = torch.linspace(0, 1, 4 * 3 * 16 * 16).sin().view(4, 3, 16, 16)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.last(self.conv(x))


def plan(**arguments):
    return cs.plan_conversion(Tiny(), **{"input_size": 16, **arguments})


def calibrate(**arguments):
    return cs.calibrate(cs.convert(Tiny(), input_size=16), **{"images": IMAGES, **arguments})


def conv(**arguments):
    return cs.CoConv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1, **arguments})


def convolve(**arguments):
    tensors = {"input": torch.ones(1, 4, 9, 9), "weight": torch.ones(8, 4, 3, 3)}
    return cs.coconv2d(**{**tensors, "dilations": (1, 2), "splits": (4, 4), "padding": 1, **arguments})


def coresnet(**arguments):
    with torch.device("meta"):
        return cs.CoResNet(Bottleneck, (1, 1, 1, 1), **arguments)


def row(**arguments):
    signature = plan().rows[0].signature
    return cs.PlanRow(**{"name": "x", "signature": signature, "dilations": (1,), "splits": (8,), **arguments})


def planned(**arguments):
    return cs.Plan(**{"rows": (), "policy": "x", "input": "x", "parameters": 0, **arguments})


# Each argument, and what of the nonsense it takes.
PLAIN = nn.Conv2d(4, 8, 3, padding=1)
ARGUMENTS = [
    ("model", lambda v: cs.plan_conversion(v), ()),
    ("policy", lambda v: plan(policy=v), ()),
    ("input_size", lambda v: plan(input_size=v), {"array"}),
    ("example_inputs", lambda v: plan(input_size=None, example_inputs=v), ()),
    ("include", lambda v: plan(include=v), {"None", "[]"}),
    ("exclude", lambda v: plan(exclude=v), {"None", "[]"}),
    ("overrides", lambda v: plan(overrides=v), {"None", "{}"}),
    ("overrides", lambda v: plan(overrides={"conv": v}), {"None", "array"}),
    ("overrides", lambda v: plan(overrides={"conv": cs.Levels(v)}), ()),
    ("overrides", lambda v: plan(overrides={"conv": cs.Levels((1, 2), v)}), ()),
    ("policy", lambda v: plan(policy=lambda conv: v), {"array"}),
    ("policy", lambda v: plan(policy=lambda conv: cs.Levels(v)), ()),
    ("policy", lambda v: plan(policy=lambda conv: cs.Levels((1, 2), v)), ()),
    ("model", lambda v: cs.convert(v), ()),
    ("inplace", lambda v: cs.convert(Tiny(), input_size=16, inplace=v), {"True"}),
    ("model", lambda v: cs.apply_plan(v, plan()), ()),
    ("plan", lambda v: cs.apply_plan(Tiny(), v), ()),
    ("images", lambda v: cs.convert(Tiny(), input_size=16, calibrate=v), {"None"}),
    ("model", lambda v: cs.calibrate(v, IMAGES), ()),
    ("images", lambda v: calibrate(images=v), ()),
    ("max_images", lambda v: calibrate(max_images=v), {"array"}),
    ("arrange", lambda v: calibrate(arrange=v), {"True"}),
    ("also", lambda v: calibrate(also=v), {"None", "[]"}),
    ("frozen", lambda v: calibrate(frozen=v), {"True"}),
    ("positions", lambda v: calibrate(positions=v), {"array"}),
    ("progress", lambda v: calibrate(progress=v), {"True"}),
    ("model", cs.revert, ()),
    ("model", cs.get_plan, ()),
    ("split", lambda v: cs.UniformPolicy(split=v), ()),
    ("min_channels", lambda v: cs.UniformPolicy(min_channels=v), {"array"}),
    ("shared", lambda v: cs.UniformPolicy(shared=v), ()),
    ("count", cs.UniformPolicy, {"array"}),
    ("max_levels", cs.ResolutionPolicy, {"array"}),
    ("stages", cs.StagePolicy, ()),
    ("stages", cs.TopPolicy, ()),
    ("in_channels", lambda v: conv(in_channels=v), {"array"}),
    ("out_channels", lambda v: conv(out_channels=v), {"array"}),
    ("kernel_size", lambda v: conv(kernel_size=v), {"array"}),
    ("stride", lambda v: conv(stride=v), {"array"}),
    ("padding", lambda v: conv(padding=v), {"array", "0"}),
    ("dilation", lambda v: conv(dilation=v), {"array"}),
    ("groups", lambda v: conv(groups=v), {"array"}),
    ("bias", lambda v: conv(bias=v), {"True"}),
    ("padding_mode", lambda v: conv(padding_mode=v), ()),
    ("levels", lambda v: conv(levels=v), {"None", "array"}),
    ("dilations", lambda v: conv(dilations=v), {"None"}),
    ("splits", lambda v: conv(levels=2, splits=v), ()),
    ("conv", lambda v: cs.CoConv2d.from_conv(v, levels=2), ()),
    ("levels", lambda v: cs.CoConv2d.from_conv(PLAIN, v), {"array"}),
    ("dilations", lambda v: cs.CoConv2d.from_conv(PLAIN, dilations=v), ()),
    ("splits", lambda v: cs.CoConv2d.from_conv(PLAIN, levels=2, splits=v), ()),
    ("conv", lambda v: cs.to_coconv_(v, (1, 2)), ()),
    ("dilations", lambda v: cs.to_coconv_(nn.Conv2d(4, 8, 3, padding=1), v), ()),
    ("splits", lambda v: cs.to_coconv_(nn.Conv2d(4, 8, 3, padding=1), (1, 2), v), ()),
    ("coconv", cs.to_conv_, ()),
    ("cls", cs.register_coconv, ()),
    ("channels", lambda v: cs.split_channels(v, 2), {"array"}),
    ("levels", lambda v: cs.split_channels(8, v), {"array"}),
    ("rule", lambda v: cs.split_channels(8, 2, v), ()),
    ("levels", lambda v: complete_levels(PLAIN, v), {"array"}),
    ("dilations", lambda v: check_levels(PLAIN, v, (8,)), ()),
    ("splits", lambda v: check_levels(PLAIN, (1,), v), ()),
    ("input", lambda v: convolve(input=v), ()),
    ("weight", lambda v: convolve(weight=v), ()),
    ("bias", lambda v: convolve(bias=v), {"None"}),
    ("stride", lambda v: convolve(stride=v), {"array"}),
    ("padding", lambda v: convolve(padding=v), {"array", "0"}),
    ("dilation", lambda v: convolve(dilation=v), {"array"}),
    ("groups", lambda v: convolve(groups=v), {"True"}),
    ("dilations", lambda v: convolve(dilations=v), ()),
    ("splits", lambda v: convolve(splits=v), ()),
    ("padding_mode", lambda v: convolve(padding_mode=v), ()),
    ("args", lambda v: cs.Inputs(v), {"[]", "[None]"}),
    ("kwargs", lambda v: cs.Inputs(kwargs=v), {"{}"}),
    ("call", lambda v: cs.Inputs(call=v), {"None", "class"}),
    ("needs_numbers", lambda v: cs.Inputs(needs_numbers=v), {"True"}),
    ("rows", lambda v: planned(rows=v), ()),
    ("policy", lambda v: planned(policy=v), {"x", ""}),
    ("input", lambda v: planned(input=v), {"x", ""}),
    ("parameters", lambda v: planned(parameters=v), {"array", "0"}),
    ("calibrated", lambda v: planned(calibrated=v), {"array", "0"}),
    ("traced", lambda v: planned(traced=v), {"x", ""}),
    ("name", lambda v: row(name=v), {"x", ""}),
    ("signature", lambda v: row(signature=v), ()),
    ("dilations", lambda v: row(dilations=v), ()),
    ("splits", lambda v: row(splits=v), ()),
    ("reason", lambda v: row(reason=v), {"None", "x"}),
    ("calls", lambda v: row(calls=v), {"array", "0"}),
    ("output_sizes", lambda v: row(output_sizes=v), {"[]"}),
    ("aliases", lambda v: row(aliases=v), {"[]"}),
    ("untraced", lambda v: row(untraced=v), {"None", "x", ""}),
    ("reason_key", lambda v: row(reason_key=v), {"None"}),
    ("rows", lambda v: planned().reasons(v), {"None", "[]"}),
    ("every_conv", lambda v: plan().table(every_conv=v), {"True"}),
    ("other", lambda v: plan().diff(v), ()),
    ("path", lambda v: plan().to_json(v), {"None", "x"}),
    ("source", cs.Plan.from_json, ()),
    ("model", lambda v: cs.save_converted(v, "y"), ()),
    ("path", lambda v: cs.save_converted(Tiny(), v), {"x"}),
    ("path", cs.read_plan, ()),
    ("model", lambda v: cs.load_converted(v, "y"), ()),
    ("path", lambda v: cs.load_converted(Tiny(), v), ()),
    ("model", lambda v: cs.load_authors_checkpoint(v, "y"), ()),
    ("path", lambda v: cs.load_authors_checkpoint(Tiny(), v), ()),
    ("path", is_authors_checkpoint, ()),
    ("model", cs.export_authors_state_dict, ()),
    ("levels", lambda v: coresnet(levels=v), {"None"}),
    ("policy", lambda v: coresnet(policy=v), {"None"}),
    ("img_size", lambda v: coresnet(policy="stage", img_size=v), {"array"}),
    ("base_dilation", lambda v: coresnet(base_dilation=v), ()),
    ("norm_after_add", lambda v: coresnet(norm_after_add=v), {"True"}),
    ("model", cs.receptive_fields, ()),
    ("input_size", lambda v: cs.receptive_fields(Tiny(), v), {"array"}),
    ("names", lambda v: cs.receptive_fields(Tiny(), 16, names=v), {"None", "[]"}),
    ("example_inputs", lambda v: cs.receptive_fields(Tiny(), example_inputs=v), ()),
    ("reverted", lambda v: cs.receptive_fields(Tiny(), 16, reverted=v), {"True"}),
    ("model", cs.effective_receptive_field, ()),
    ("layer", lambda v: cs.effective_receptive_field(Tiny(), v, input_size=16), {"None"}),
    ("images", lambda v: cs.effective_receptive_field(Tiny(), images=v, input_size=16), {"array"}),
    ("input_size", lambda v: cs.effective_receptive_field(Tiny(), input_size=v), {"array"}),
    ("reverted", lambda v: cs.effective_receptive_field(Tiny(), input_size=16, reverted=v), {"True"}),
    ("channels", Generator, ()),
    ("latent", lambda v: Generator([8], v), {"array"}),
    ("colours", lambda v: Generator([8], 8, v), {"array"}),
]


@pytest.mark.parametrize(
    ("call", "failure"),
    [
        (lambda v: v + 1, "Regex pattern did not match"),  # a message that does not name the argument
        (lambda v: v.argument, "has no attribute"),  # another error
        (lambda v: torch.zeros(2).sum(argument=v), "deep inside"),  # one of torch's own
        (lambda v: v, "DID NOT RAISE"),
    ],
)
def test_the_check_below_can_fail(call, failure):
    with pytest.raises((AssertionError, AttributeError, pytest.fail.Exception), match=failure):
        check(call, "argument", "x", taken=False)
    with pytest.raises(TypeError):
        check(lambda v: v + 1, "argument", "x", taken=True)


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize(("name", "call", "taken"), ARGUMENTS, ids=[f"{i}-{row[0]}" for i, row in enumerate(ARGUMENTS)])
def test_nonsense_is_taken_or_refused_by_a_message_that_names_the_argument(
    name, call, taken, nonsense, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    check(call, name, NONSENSE[nonsense](), nonsense in taken)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.array], ids=lambda kind: kind.__name__)
def test_numpys_integers_are_whole_numbers_wherever_one_is_meant(kind):
    two, four, side = kind(2), kind(4), kind(16)
    assert conv(levels=two, splits=(four, four)).dilations == conv(dilations=(kind(1), two)).dilations == (1, 2)
    assert conv(kernel_size=kind(3), stride=two, dilation=two, padding=two, groups=two).groups == 2
    assert convolve(stride=two, splits=(four, four), dilations=(kind(1), two)).shape == (1, 8, 5, 5)
    assert cs.split_channels(kind(8), two) == (4, 4)
    assert cs.UniformPolicy(two, min_channels=two) == cs.UniformPolicy(2, min_channels=2)
    assert cs.StagePolicy((four, two, two, two)) == cs.StagePolicy((4, 2, 2, 2))
    for answer in (two, (kind(1), two), cs.Levels((kind(1), two), (four, four))):
        for arguments in ({"overrides": {"conv": answer}}, {"policy": lambda conv, answer=answer: answer}):
            assert plan(input_size=side, **arguments).rows[0].dilations == (1, 2)
    assert type(coresnet(levels=(four, two, two, kind(1))).layer1[0].conv2.levels) is int


def test_an_override_that_is_an_iterator_is_the_same_for_every_convolution():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    found = cs.plan_conversion(model, input_size=16, overrides={"*": iter((1, 3))})
    assert [row.dilations for row in found.converted] == [(1, 3), (1, 3)]
