"""timm networks as backbones of MMDetection."""

import pytest
import timm
import torch
import torch.nn as nn
from mmdet.registry import MODELS
from mmengine.config import Config

from coconv_surgery import CoConv2d, get_plan
from coconv_surgery.mmengine.options import CalibrationOptions, wished_calibration


def build(name: str = "resnet18", **options) -> nn.Module:
    return MODELS.build({"type": "TIMMFeatures", "model_name": name, **options})


@pytest.mark.parametrize("name", ["resnet18", "hrnet_w18_small", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_it_returns_maps_of_the_channels_and_strides_it_names(name):
    backbone = build(name)
    maps = backbone(torch.randn(1, 3, 224, 224))
    expected = [
        (channels, 224 // stride, 224 // stride)
        for channels, stride in zip(backbone.out_channels, backbone.strides, strict=True)
    ]
    assert [tuple(feature.shape[1:]) for feature in maps] == expected


def test_out_indices_choose_the_maps():
    backbone = build(out_indices=(2, 3))
    assert backbone.out_channels == [128, 256]
    assert [feature.shape[1] for feature in backbone(torch.randn(1, 3, 64, 64))] == [128, 256]


def test_surgery_gives_the_levels_of_timms_own_size():
    backbone = build(surgery={"exclude": "layer2"})
    assert backbone.timm_model.layer1[0].conv1.dilations == (1, 2, 3, 4)
    assert type(backbone.timm_model.layer2[0].conv1) is nn.Conv2d
    assert "224×224" in get_plan(backbone.timm_model).input


def test_surgery_takes_another_size():
    backbone = build(surgery={"input_size": 64})
    assert backbone.timm_model.layer1[0].conv1.dilations == (1, 2, 3)


def test_weights_come_from_a_timm_checkpoint_when_they_are_initialised(tmp_path):
    weights = timm.create_model("resnet18").state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    backbone = build(checkpoint_path=str(tmp_path / "resnet18.pth"), surgery={})
    assert not torch.equal(backbone.timm_model.conv1.weight, weights["conv1.weight"])
    backbone.init_weights()
    assert all(torch.equal(value, weights[name]) for name, value in backbone.timm_model.state_dict().items())
    assert isinstance(backbone.timm_model.layer1[0].conv1, CoConv2d)


def test_norm_eval_keeps_the_running_statistics():
    backbone = build(norm_eval=True)
    backbone.train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert backbone.timm_model.layer1.training


def test_a_detector_trains_on_it(configs):
    config = Config.fromfile(configs / "convert" / "retinanet_r50_fpn_1x_coco.py")
    channels = [64, 128, 256, 512]
    config.model.backbone = {
        "type": "TIMMFeatures",
        "model_name": "resnet18",
        "out_indices": (1, 2, 3, 4),
        "zero_init_last": False,
    }
    config.model.neck.in_channels = channels
    config.model.surgery.include = ["backbone"]
    detector = MODELS.build(config.model)
    assert detector.backbone.out_channels == channels
    assert len(get_plan(detector).converted) == 16
    sum(level.mean() for level in detector(torch.randn(1, 3, 64, 64))[0]).backward()
    assert detector.backbone.timm_model.layer1[0].conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surgery": {"levls": 3}}, "no key 'levls'"),
        ({"pretrained": True, "checkpoint_path": "x.pth"}, "choose one"),
        ({"pretrained": "no"}, "pretrained must be True or False, not str"),
        ({"out_indices": 5}, "out_indices=5 must be whole numbers"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(**options)


def test_a_backbone_asks_for_calibration_of_the_detector_that_has_it():
    surgery = {"input_size": 64, "calibrate": {"images": 8, "also": "layer4"}}
    backbone = build("test_resnet", surgery=surgery)
    assert wished_calibration(nn.Sequential(backbone)) == CalibrationOptions(images=8, also=["layer4"])
    other = build("test_resnet", surgery={**surgery, "calibrate": {"images": 9}})
    with pytest.raises(ValueError, match="its parts want different things"):
        wished_calibration(nn.Sequential(backbone, other))
