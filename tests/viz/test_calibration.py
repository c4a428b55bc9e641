"""Pictures of calibrations."""

import pytest

from coconv_surgery.calibration.report import CalibratedLayer, Calibration
from coconv_surgery.viz.calibration import plot_calibration


def calibration(count):
    names = [f"layer{1 + n // 9}.{n % 9}.conv2" for n in range(count)]
    layers = [CalibratedLayer(name, 0.9 - 0.002 * n, 0.1 + 0.001 * n) for n, name in enumerate(names)]
    return Calibration((*layers, CalibratedLayer("last", skipped="it did not run")), 64, (3, 8))


@pytest.mark.parametrize("count", [1, 30, 236])
def test_no_text_overlaps_another_or_is_cut(count, drawn, legible, tmp_path):
    plot_calibration(calibration(count), tmp_path / "calibration.svg", "a network")
    legible(drawn[0])


def test_each_layer_has_its_errors(drawn, tmp_path):
    plot_calibration(calibration(4), tmp_path / "calibration.png", mode="dark")
    lines = {line.get_label(): [*line.get_ydata()] for line in drawn[0].axes[0].lines}
    assert lines["before"] == [0.9, 0.898, 0.896, 0.894]
    assert lines["after"] == pytest.approx([0.1, 0.101, 0.102, 0.103])


def test_a_calibration_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no error to draw"):
        plot_calibration(calibration(0), tmp_path / "calibration.png")
