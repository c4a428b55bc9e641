"""Detectors from configs, without a runner."""

from typing import Any

import torch.nn as nn
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope

from coconv_surgery.mmengine.paths import config_path


def build_detector(model: Any) -> nn.Module:
    """Build a detector, whatever the current scope.

    Args:
        model: The ``model`` of a config.

    Returns:
        The detector in training mode, without weights from a checkpoint.
    """
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector: nn.Module = MODELS.build(model)
    return detector


def build_ssd(backbone: str) -> nn.Module:
    """Build an SSD300 from its config in this project.

    Args:
        backbone: As the config's name has it, such as ``"coresnet50"``.
    """
    return build_detector(Config.fromfile(config_path(f"ssd/ssd300_{backbone}_coco.py")).model)
