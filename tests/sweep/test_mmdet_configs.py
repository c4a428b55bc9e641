"""MMDetection's own configs: a sample of every kind of detector, converted, run for real and reverted."""

import pytest
from sampling import few

from coconv_surgery.sweep.check import NOT_BUILT, check
from coconv_surgery.sweep.collections import COLLECTIONS
from coconv_surgery.sweep.mmdet_configs import CONFIGS, list_configs

SAMPLE = [
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco",
    "cascade_rpn/cascade-rpn_fast-rcnn_r50-caffe_fpn_1x_coco",
    "conditional_detr/conditional-detr_r50_8xb2-50e_coco",
    "crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman",
    "detectors/cascade-rcnn_r50-rfp_1x_coco",
    "detr/detr_r50_8xb2-150e_coco",
    "dino/dino-4scale_r50_8xb2-12e_coco",
    "fast_rcnn/fast-rcnn_r50_fpn_1x_coco",
    "gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco",
    "grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco",
    "guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco",
    "hrnet/faster-rcnn_hrnetv2p-w18-1x_coco",
    "htc/htc_r50_fpn_1x_coco",
    "libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco",
    "maskformer/maskformer_r50_ms-16xb1-75e_coco",
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco",
    "res2net/faster-rcnn_res2net-101_fpn_2x_coco",
    "soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco",
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco",
    "strong_baselines/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-50e_coco",
    "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco",
    "tridentnet/tridentnet_r50-caffe_1x_coco",
]


@pytest.mark.parametrize("name", few(SAMPLE, 3))
def test_a_detector_keeps_its_weights_keys_and_shapes(name):
    row = check(COLLECTIONS["mmdet"], name)
    assert row.sound, row
    assert row.outputs_before, "its forward ran"
    assert row.convs


def test_a_config_whose_parts_are_missing_says_which():
    row = check(COLLECTIONS["mmdet"], "convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco")
    assert row.status == NOT_BUILT
    assert row.error.endswith(", for ModuleNotFoundError: No module named 'mmpretrain'")


def test_configs_that_only_others_inherit_are_no_members(monkeypatch):
    monkeypatch.setattr("coconv_surgery.sweep.mmdet_configs.CONFIGS", CONFIGS / "retinanet")
    names = list_configs()
    assert "retinanet_r50_fpn_1x_coco" in names
    assert "retinanet_tta" not in names
