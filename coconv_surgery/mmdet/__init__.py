"""CoConv for MMDetection: importing this package registers its parts with mmengine's registries.

In a config::

    custom_imports = dict(imports=['coconv_surgery.mmdet'], allow_failed_imports=False)

registers the conv layer ``CoConv``; the backbones ``CoResNet``, ``CoResNeXt`` and ``TIMMFeatures``; and
``CoConvSurgery``, which converts any detector while its config builds it. It repairs what a current stack breaks in
mmdet, see :mod:`coconv_surgery.mmdet.compat`, and does all that importing :mod:`coconv_surgery.mmengine` does.
"""

from importlib.util import find_spec

_missing = [name for name in ("mmengine", "mmcv", "mmdet") if find_spec(name) is None]
if not _missing and find_spec("mmcv._ext") is None:
    _missing = ["mmcv's compiled operators (mmcv-lite has none)"]
if _missing:
    raise ImportError(
        f"coconv_surgery.mmdet needs {', '.join(_missing)}: pip install 'coconv-surgery[mmdet]'", name=_missing[0]
    )

import mmengine.registry  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402

from coconv_surgery.mmdet import compat  # noqa: E402
from coconv_surgery.mmdet.conv import build_coconv  # noqa: E402
from coconv_surgery.mmdet.inputs import example_inputs  # noqa: E402
from coconv_surgery.mmdet.resnet import CoResNet, CoResNeXt  # noqa: E402
from coconv_surgery.mmdet.surgery import build_converted  # noqa: E402
from coconv_surgery.mmdet.timm_backbone import TIMMFeatures  # noqa: E402
from coconv_surgery.mmengine import CoConvPlanHook, SurgeryOptions  # noqa: E402

__all__ = [
    "CoConvPlanHook",
    "CoResNeXt",
    "CoResNet",
    "SurgeryOptions",
    "TIMMFeatures",
    "build_coconv",
    "build_converted",
    "example_inputs",
]

compat.apply()
# Types in the root registry are found from every scope; mmcv looks up conv layers nowhere else.
mmengine.registry.MODELS.register_module("CoConv", module=build_coconv)
mmengine.registry.MODELS.register_module("CoConvSurgery", module=build_converted)
MODELS.register_module(module=CoResNet)
MODELS.register_module(module=CoResNeXt)
MODELS.register_module(module=TIMMFeatures)
