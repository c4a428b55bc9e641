"""Backbones that save memory by checkpoints are planned as without."""

import pytest
from mmdet.registry import MODELS
from sampling import few

import coconv_surgery as cs

LATE = (False, True, True, True)
HR_STAGES = {
    "stage1": {"num_modules": 1, "num_branches": 1, "block": "BOTTLENECK", "num_blocks": (1,), "num_channels": (16,)},
    "stage2": {"num_modules": 1, "num_branches": 2, "block": "BASIC", "num_blocks": (1,) * 2, "num_channels": (8, 16)},
    "stage3": {
        "num_modules": 1,
        "num_branches": 3,
        "block": "BASIC",
        "num_blocks": (1,) * 3,
        "num_channels": (8, 16, 32),
    },
    "stage4": {
        "num_modules": 1,
        "num_branches": 4,
        "block": "BASIC",
        "num_blocks": (1,) * 4,
        "num_channels": (8, 16, 32, 64),
    },
}
BACKBONES = {
    "DCNv2": {"type": "ResNet", "depth": 50, "dcn": {"type": "DCNv2", "deform_groups": 1}, "stage_with_dcn": LATE},
    "DCN": {"type": "ResNet", "depth": 50, "dcn": {"type": "DCN", "deform_groups": 1}, "stage_with_dcn": LATE},
    "ResNet-18": {"type": "ResNet", "depth": 18},
    "ResNetV1d": {"type": "ResNetV1d", "depth": 50},
    "ResNeXt": {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4},
    "Res2Net": {"type": "Res2Net", "depth": 50, "scales": 4, "base_width": 26},
    "ResNeSt": {"type": "ResNeSt", "depth": 50, "stem_channels": 64, "radix": 2, "reduction_factor": 4},
    "RegNet": {"type": "RegNet", "arch": "regnetx_400mf"},
    "HRNet": {"type": "HRNet", "extra": HR_STAGES},
    "DetectoRS": {
        "type": "DetectoRS_ResNet",
        "depth": 50,
        "conv_cfg": {"type": "ConvAWS"},
        "sac": {"type": "SAC", "use_deform": True},
        "stage_with_sac": LATE,
    },
    "MobileNetV2": {"type": "MobileNetV2"},
    "EfficientNet": {"type": "EfficientNet", "arch": "b0", "out_indices": (3, 4, 5)},
}


@pytest.mark.parametrize("name", few(BACKBONES, 3))
def test_checkpoints_make_no_difference(name):
    plain, checkpointed = (
        cs.plan_conversion(MODELS.build({**BACKBONES[name], "with_cp": with_cp}), input_size=128)
        for with_cp in (False, True)
    )
    assert plain.converted
    assert checkpointed.diff(plain) == []
    assert [row.reason for row in checkpointed.rows] == [row.reason for row in plain.rows]
