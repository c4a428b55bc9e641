"""The configs in mmdet's wheel, and how to build their detectors."""

from pathlib import Path

import mmdet
import torch.distributed as distributed
import torch.nn as nn
from mmengine.config import Config

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.mmdet.building import build_detector
from coconv_surgery.mmdet.inputs import example_inputs
from coconv_surgery.mmengine.options import resized_to
from coconv_surgery.tracing.inputs import Inputs

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
# Small, but with room for the 900 queries of a DETR; for detectors that are not built for one size.
IMAGE_SIZE = (256, 256)


def list_configs() -> list[str]:
    """List the configs that describe a model, by path below :data:`CONFIGS` without suffix."""
    paths = sorted(path for path in CONFIGS.rglob("*.py") if "_base_" not in path.parts)
    return [str(path.relative_to(CONFIGS).with_suffix("")) for path in paths if _describes_a_model(path)]


def _describes_a_model(path: Path) -> bool:
    """Whether a config is one of a model, not a part for others to inherit; one that cannot be read counts."""
    try:
        return "model" in Config.fromfile(path, import_custom_modules=False)
    except (ImportError, OSError):
        return True


def build(name: str) -> tuple[nn.Module, Inputs]:
    """Build the detector of a config with random weights, in evaluation mode, and say what to call it with."""
    config = Config.fromfile(CONFIGS / f"{name}.py")
    if "MMSyncBN" in str(config.model) and not distributed.is_initialized():
        # It asks for the group of its processes when it is built: here, this one.
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    detector = build_detector(config.model).eval()
    return detector, example_inputs(detector, _fixed_size(config) or IMAGE_SIZE)


def _fixed_size(config: Config) -> Pair | None:
    """The one size that a detector is built for, if its anchors or its images have one."""
    side = config.model.get("bbox_head", {}).get("anchor_generator", {}).get("input_size")
    if isinstance(side, int):
        return side, side
    pipeline = config.get("test_pipeline", [])
    resizes = [transform for transform in pipeline if transform.get("scale") and not transform.get("keep_ratio")]
    return resized_to(pipeline) if resizes else None
