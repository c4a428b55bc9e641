"""Pictures of receptive fields."""

import pytest
import torch.nn as nn

import coconv_surgery as cs
from coconv_surgery.viz.fields import plot_effective_fields, plot_receptive_fields
from coconv_surgery.viz.theme import THEMES


@pytest.fixture(scope="module")
def model():
    chain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    return cs.convert(chain, input_size=32)


@pytest.mark.parametrize("mode", THEMES)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_both_pictures_are_written(model, mode, suffix, tmp_path):
    reports = {name: cs.receptive_fields(model, 32, reverted=name == "before") for name in ("before", "after")}
    plot_receptive_fields(reports, tmp_path / f"sees.{suffix}", "chain", mode=mode)
    fields = {name: cs.effective_receptive_field(model, "1", 1, input_size=32) for name in ("before", "after")}
    plot_effective_fields(fields, tmp_path / f"responds.{suffix}", "chain", mode=mode)
    pictures = [(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("sees", "responds")]
    assert all(len(picture) > 5000 for picture in pictures)
    if suffix == "svg":
        assert all(THEMES[mode].paper.encode() in picture for picture in pictures)


def test_what_cannot_be_drawn_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="reports: no receptive field is known"):
        plot_receptive_fields({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="fields: there are none"):
        plot_effective_fields({}, tmp_path / "x.png")
    with pytest.raises(TypeError, match=r"reports\['after'\] must be a FieldReport, not int"):
        plot_receptive_fields({"after": 3}, tmp_path / "x.png")
    with pytest.raises(TypeError, match=r"fields\['after'\] must be an EffectiveField, not int"):
        plot_effective_fields({"after": 3}, tmp_path / "x.png")
