"""The look of every picture."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from coconv_surgery.viz.theme import THEMES, drawing, picture_file

pytestmark = pytest.mark.parametrize("mode", THEMES)


def luminance(colour):
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_that_wcag_asks_for(mode):
    assert contrast(THEMES[mode].ink, THEMES[mode].paper) > 7


def test_every_colour_stands_out_from_the_page(mode):
    theme = THEMES[mode]
    levels = [theme.dilation(level, 5) for level in range(1, 6)]
    assert min(contrast(colour, theme.paper) for colour in (theme.muted, *theme.categories, *levels)) > 1.5


def test_levels_differ_in_lightness_alone(mode):
    for highest in (2, 4, 8):
        levels = [THEMES[mode].dilation(level, highest) for level in range(1, highest + 1)]
        assert all(luminance(first) < luminance(second) for first, second in itertools.pairwise(levels))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_picture_is_the_same_file(mode, suffix, tmp_path):
    for name in ("first", "second"):
        with drawing(tmp_path / f"{name}.{suffix}", 2, 2, mode) as (figure, theme):
            figure.subplots().bar([1, 2], [1, 2], color=theme.categories[:2])
    assert (tmp_path / f"first.{suffix}").read_bytes() == (tmp_path / f"second.{suffix}").read_bytes()


def test_a_suffix_that_cannot_be_written_is_refused_before_drawing(mode, tmp_path):
    with pytest.raises(ValueError, match=r"the suffix of .*plan\.docx='docx': choose "):
        picture_file(tmp_path / "plan.docx")
    with pytest.raises(ValueError, match="suffix"), drawing(tmp_path / "plan", 2, 2, mode):
        raise AssertionError("drawn all the same")
