"""The part of a detector that computes maps, without what boxes are made of: it is what exporters know."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmdet.models.detectors import DetectionTransformer, SingleStageDetector
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from coconv_surgery.mmdet.building import build_detector
from coconv_surgery.mmdet.inputs import example_inputs
from coconv_surgery.tracing.inputs import Inputs


class DetectorMaps(nn.Module):
    """What a detector's layers compute of images that went through its data preprocessor.

    Anchors, decoding and suppression are not in it, nor are proposals and what reads them: these are mmdeploy's task,
    which has a rewriter for each head that it knows.

    Args:
        detector: A model of mmdet's.

    Attributes:
        part (str): What it computes, in words.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        alone = isinstance(detector, SingleStageDetector) and not isinstance(detector, DetectionTransformer)
        self.part = "backbone, neck and the head's raw outputs" if alone else "backbone and neck"

    def inputs(self, image_size: Sequence[int]) -> Inputs:
        """Images of a size, padded as the data preprocessor would."""
        return Inputs((example_inputs(self.detector, image_size).kwargs["inputs"],))

    def forward(self, images: torch.Tensor) -> Any:
        """Compute the maps of ``(N, 3, H, W)``."""
        detector: Any = self.detector
        return detector.extract_feat(images) if self.part == "backbone and neck" else detector._forward(images)


def maps_of_config(config: Path, checkpoint: Path | None) -> DetectorMaps:
    """Build the detector of a config.

    Args:
        config: An MMDetection config.
        checkpoint: Its weights, if any.
    """
    detector = build_detector(Config.fromfile(config).model)
    if checkpoint is not None:
        load_checkpoint(detector, str(checkpoint), map_location="cpu", strict=True)
    return DetectorMaps(detector.eval())
