"""Pictures of plans."""

import pytest
from matplotlib.figure import Figure

from coconv_surgery.planning.plan import Plan, PlanRow
from coconv_surgery.tracing.signature import Signature
from coconv_surgery.viz.plan import plot_plan
from coconv_surgery.viz.strips import lay_out


def row(name, number):
    levels = 1 + number % 4
    sides = [max(1, 112 >> number % 6)] * (1 + (number % 7 == 0))
    return PlanRow(
        name,
        Signature(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"),
        tuple(range(1, levels + 1)),
        (64 - 8 * (levels - 1), *[8] * (levels - 1)),
        output_sizes=tuple((side, side + 1) for side in {side << index for index, side in enumerate(sides)}),
    )


def plan_of(names):
    return Plan(tuple(map(row, names, range(len(names)))), "resolution", "224", 1)


def classifier(count):
    return [f"stage{1 + 5 * n // count}.{n // 3}.conv{n % 3}" for n in range(count)]


def detector(count):
    backbone = [f"backbone.stage{1 + 4 * n // count}.{n // 8}.branches.{n % 8 // 4}.conv" for n in range(count)]
    return [
        *backbone,
        *(f"neck.fpn_convs.{n}.conv" for n in range(4)),
        *(f"bbox_head.{kind}_convs.{n}.conv" for kind in ("cls", "reg") for n in range(4)),
        "rpn_head.rpn_conv",
    ]


def alone(count):
    return [f"a_part_of_one_convolution_with_a_very_long_name_{n}" for n in range(count)]


@pytest.mark.parametrize(
    ("names", "count"),
    [
        *((classifier, count) for count in (1, 20, 400)),
        *(pytest.param(classifier, count, marks=pytest.mark.long) for count in (60, 200)),
        (detector, 20),
        (detector, 387),
        pytest.param(alone, 60, marks=pytest.mark.long),
        (alone, 100),
    ],
)
def test_no_text_overlaps_another_or_is_cut(names, count, drawn, legible, tmp_path):
    title = "configs/of/a/detector/with/a/name/so/long/that/no/line/could/hold/it_whole_1x_coco.py"
    plot_plan(plan_of(names(count)), tmp_path / "plan.svg", title)
    (figure,) = drawn
    legible(figure)


def test_the_check_of_texts_finds_what_overlaps_and_what_is_cut(legible):
    figure = Figure()
    for place, text in (((0.5, 0.5), "one"), ((0.51, 0.5), "over"), ((0.99, 0.9), "out of it"), ((0.1, 0.1), "alone")):
        figure.text(*place, text)
    with pytest.raises(AssertionError, match=r"out of it.*one.*over"):
        legible(figure)


@pytest.mark.parametrize("count", [1, 61, 400])
def test_every_layer_is_in_one_strip(count):
    strips = lay_out(detector(count)).strips
    assert [layer for strip in strips for layer in strip.layers] == [*range(len(detector(count)))]


def test_the_parts_of_a_detector_stand_apart_under_their_names():
    (strip,) = lay_out(["a.b.0", "a.b.1", *(f"neck.{n}" for n in range(9)), *(f"head.{n}" for n in range(9))]).strips
    assert [heading.text for heading in strip.headings] == ["a", "neck", "head"]
    assert strip.places[2] - strip.places[1] > strip.places[1] - strip.places[0] == 1


def test_few_layers_have_their_names_and_many_those_of_their_groups():
    few, many = (lay_out([f"stage.{n // 9}.convs.{n % 9}.conv" for n in range(count)]) for count in (27, 108))
    assert few.strips[0].labels[0].text == "convs.0.conv"
    assert (few.prefix, many.prefix) == ("stage", "stage")
    assert {heading.text for strip in few.strips for heading in strip.headings} == {"0", "1", "2"}
    assert {label.text for strip in many.strips for label in strip.labels} == {"convs"}


def test_strips_end_where_a_part_does():
    strips = lay_out([*(f"backbone.{n}" for n in range(24)), *(f"head.{n}" for n in range(20))]).strips
    assert [strip.layers for strip in strips] == [range(24), range(24, 44)]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_what_is_left_alone_has_a_colour_of_its_own(mode, drawn, tmp_path):
    plan = plan_of(classifier(8))
    plot_plan(plan, tmp_path / "plan.png", mode=mode)
    (shares,) = drawn[0].axes[0].collections
    colours = {row.converted: set() for row in plan.rows}
    for path, colour in zip(shares.get_paths(), shares.get_facecolors(), strict=True):
        colours[path.get_extents().height < 1].add(tuple(colour))
    assert len(colours[False]) == 1
    assert not colours[False] & colours[True]


def test_a_plan_without_map_sizes_has_no_panel_for_them(drawn, tmp_path):
    rows = tuple(
        PlanRow(f"conv{n}", Signature(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"), (1, 2), (4, 4))
        for n in range(3)
    )
    plot_plan(Plan(rows, "resolution", "none", 1), tmp_path / "plan.png")
    assert len(drawn[0].axes) == 1


def test_a_plan_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no convolution to draw"):
        plot_plan(Plan((), "resolution", "224", 1), tmp_path / "plan.png")
