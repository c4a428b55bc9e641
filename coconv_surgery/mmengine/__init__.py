"""What needs MMEngine alone: the surgery of a config, its plan and calibration in a training, and repairs of mmengine.

Importing this package registers ``CoConvPlanHook`` and ``CoConvCalibrationHook``, which a model's config can ask for,
lets mmengine compare levels where it loads a checkpoint, see :mod:`coconv_surgery.mmengine.loading`, and repairs what a
current stack breaks in mmengine, see :mod:`coconv_surgery.mmengine.compat`.
"""

from importlib.util import find_spec

if find_spec("mmengine") is None:
    raise ImportError(
        "coconv_surgery.mmengine needs mmengine: pip install 'coconv-surgery[mmdet]', or [generation]", name="mmengine"
    )

from mmengine.registry import HOOKS

from coconv_surgery.mmengine import compat, loading
from coconv_surgery.mmengine.calibration_hook import CoConvCalibrationHook, calibrate_as_wished
from coconv_surgery.mmengine.hooks import CoConvPlanHook
from coconv_surgery.mmengine.options import CalibrationOptions, SurgeryOptions

__all__ = ["CalibrationOptions", "CoConvCalibrationHook", "CoConvPlanHook", "SurgeryOptions"]

compat.apply()
loading.compare_levels()
calibrate_as_wished()
# Types in the root registry are found from every scope.
HOOKS.register_module(module=CoConvPlanHook, force=True)
HOOKS.register_module(module=CoConvCalibrationHook, force=True)
