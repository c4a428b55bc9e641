"""What needs MMEngine alone: the surgery of a config, the hook that guards a plan, and repairs of mmengine.

Importing this package registers ``CoConvPlanHook``, lets mmengine compare levels where it loads a checkpoint, see
:mod:`coconv_surgery.mmengine.loading`, and repairs what a current stack breaks in mmengine, see
:mod:`coconv_surgery.mmengine.compat`.
"""

from importlib.util import find_spec

if find_spec("mmengine") is None:
    raise ImportError("coconv_surgery.mmengine needs mmengine: pip install 'coconv-surgery[mmdet]'")

from mmengine.registry import HOOKS

from coconv_surgery.mmengine import compat, loading
from coconv_surgery.mmengine.hooks import CoConvPlanHook
from coconv_surgery.mmengine.options import SurgeryOptions

__all__ = ["CoConvPlanHook", "SurgeryOptions"]

compat.apply()
loading.compare_levels()
# Types in the root registry are found from every scope.
HOOKS.register_module(module=CoConvPlanHook, force=True)
