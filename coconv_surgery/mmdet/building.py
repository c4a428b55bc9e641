"""Detectors from configs, without a runner."""

from typing import Any

import torch.nn as nn
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope


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
