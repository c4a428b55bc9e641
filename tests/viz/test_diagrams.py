"""Diagrams."""

import pytest

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.viz.diagrams import plot_coconv, plot_way_through


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_the_diagram_of_a_coconv_shows_its_levels(levels, drawn, legible, tmp_path):
    conv = CoConv2d(64, 128, 3, padding=1, levels=levels)
    plot_coconv(conv, tmp_path / "coconv.png")
    legible(drawn[0])
    shown = [text.get_text() for text in drawn[0].axes[0].texts]
    assert [text for text in shown if text.startswith("dilation")] == [f"dilation {d}" for d in conv.dilations]
    assert [int(text) for text in shown if text.isdigit()] == [*conv.splits]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_way_through_is_legible(mode, drawn, legible, tmp_path):
    plot_way_through(tmp_path / "way.svg", mode=mode)
    legible(drawn[0])


def test_another_module_than_a_coconv_is_refused(tmp_path):
    with pytest.raises(TypeError, match="conv must be a CoConv2d, not int"):
        plot_coconv(3, tmp_path / "coconv.png")
