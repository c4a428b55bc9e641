"""Detectors are deployed: their backbone and neck compute the same, of plain layers."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch.nn.modules.batchnorm import _BatchNorm

from coconv_surgery import CoConv2d, deploy, get_deployment
from coconv_surgery.mmdet.inputs import example_inputs

CONVERT = Path(__file__).parents[2] / "configs" / "convert"


NAMES = sorted(path.stem for path in CONVERT.glob("*.py"))
BY_DEFAULT = ("rtmdet_tiny_8xb32-300e_coco",)


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
def test_a_detector_is_deployed(name, lively):
    config = Config.fromfile(CONVERT / f"{name}.py")
    detector = lively(MODELS.build(config.model))
    if "ssd300" in name:
        torch.nn.init.constant_(detector.neck.l2_norm.weight, 20)  # which nobody fills before init_weights()
    side = 300 if "ssd300" in name else 128
    deployed = deploy(detector, example_inputs=example_inputs(detector, (side, side)))
    assert not any(isinstance(module, CoConv2d) for module in deployed.modules())
    left = {name for name, module in deployed.named_modules() if isinstance(module, _BatchNorm)}
    assert left == {*get_deployment(deployed).left}
    # The levels of a pyramid share their convolutions there, and have norms of their own.
    assert left == set() or ("rtmdet" in name and all(norm.startswith("bbox_head.") for norm in left))
    image = torch.rand(1, 3, side, side)
    with torch.no_grad():
        for found, expected in zip(deployed.extract_feat(image), detector.extract_feat(image), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_backbone_whose_train_returns_nothing_is_deployed(lively):
    backbone = lively(MODELS.build({"type": "CoResNet", "depth": 18, "levels": (4, 3, 2, 1)}))
    image = torch.rand(1, 3, 64, 64)
    deployed = deploy(backbone, example_inputs=image)
    with torch.no_grad():
        for found, expected in zip(deployed(image), backbone(image), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
