"""The look of every picture."""

import itertools

import pytest

from coconv_surgery.viz.theme import THEMES, contrast, drawing, ink_on, picture_file

pytestmark = pytest.mark.parametrize("mode", THEMES)


def test_text_has_the_contrast_that_wcag_asks_for(mode):
    assert contrast(THEMES[mode].ink, THEMES[mode].paper) > 7


def test_every_colour_stands_out_from_the_page(mode):
    theme = THEMES[mode]
    levels = [theme.dilation(level, 5) for level in range(1, 6)]
    assert min(contrast(colour, theme.paper) for colour in (theme.muted, *theme.categories, *levels)) > 1.5


def test_a_level_is_the_lighter_the_higher_its_dilation(mode):
    for highest in (2, 4, 8):
        levels = [THEMES[mode].dilation(level, highest) for level in range(1, highest + 1)]
        assert all(contrast(first, "black") < contrast(second, "black") for first, second in itertools.pairwise(levels))


def test_text_on_every_colour_has_contrast(mode):
    assert min(contrast(colour, ink_on(colour)) for colour in THEMES[mode].categories) > 4.5


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
