"""A trained network that was converted keeps what it learnt: its kernels are solved anew for their levels."""

from coconv_surgery.calibration.calibrating import calibrate
from coconv_surgery.calibration.report import CalibratedLayer, Calibration, CalibrationError

__all__ = ["CalibratedLayer", "Calibration", "CalibrationError", "calibrate"]
