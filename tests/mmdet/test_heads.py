"""Which convolutions of which head are read by position, found without a list of names."""

import fnmatch

import pytest
from sampling import few

from coconv_surgery import Reason, UniformPolicy, plan_conversion
from coconv_surgery.sweep import mmdet_configs

# For each config: what must be converted, and what must not, though it is a 3×3 convolution of torch's.
HEADS = {
    "retinanet/retinanet_r50_fpn_1x_coco": (["cls_convs.*", "reg_convs.*"], ["retina_cls", "retina_reg"]),
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco": (
        ["cls_convs.*", "reg_convs.*"],
        ["conv_cls", "conv_reg", "conv_centerness"],
    ),
    "atss/atss_r50_fpn_1x_coco": (["cls_convs.*", "reg_convs.*"], ["atss_cls", "atss_reg", "atss_centerness"]),
    "gfl/gfl_r50_fpn_1x_coco": (["cls_convs.*", "reg_convs.*"], ["gfl_cls", "gfl_reg"]),
    "vfnet/vfnet_r50_fpn_1x_coco": (
        ["cls_convs.*", "reg_convs.*", "vfnet_reg_conv.*"],
        ["vfnet_cls", "vfnet_reg", "vfnet_reg_refine"],
    ),
    "tood/tood_r50_fpn_1x_coco": (
        ["inter_convs.*"],
        ["tood_cls", "tood_reg", "cls_prob_module.2", "reg_offset_module.2"],
    ),
    "ddod/ddod_r50_fpn_1x_coco": ([], ["atss_cls", "atss_reg", "atss_iou", "*.conv_offset"]),
    "paa/paa_r50_fpn_1x_coco": (["cls_convs.*", "reg_convs.*"], ["atss_cls", "atss_reg", "atss_centerness"]),
    "yolo/yolov3_d53_8xb8-320-273e_coco": (["convs_bridge.*"], []),
    "yolox/yolox_s_8xb8-300e_coco": (["multi_level_cls_convs.*", "multi_level_reg_convs.*"], []),
    "yolof/yolof_r50-c5_8xb8-1x_coco": (
        ["cls_subnet.*", "bbox_subnet.*"],
        ["cls_score", "bbox_pred", "object_pred"],
    ),
    "rtmdet/rtmdet_tiny_8xb32-300e_coco": (["cls_convs.*", "reg_convs.*"], []),
    "ssd/ssd300_coco": ([], ["cls_convs.*", "reg_convs.*"]),
    "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco": (
        ["heatmap_head.0", "wh_head.0", "offset_head.0"],
        ["*.conv_offset"],
    ),
    "cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco": (["tl_pool.*", "br_pool.*", "tl_heat.*", "br_off.*"], []),
    "foveabox/fovea_r50_fpn_gn-head-align_4xb4-2x_coco": (["reg_convs.*", "cls_convs.*"], ["conv_cls", "conv_reg"]),
    "reppoints/reppoints-moment_r50_fpn_1x_coco": (["cls_convs.*", "reg_convs.*", "reppoints_pts_init_conv"], []),
    "sabl/sabl-retinanet_r50_fpn_1x_coco": (
        ["cls_convs.*", "reg_convs.*"],
        ["retina_cls", "retina_bbox_reg", "retina_bbox_cls"],
    ),
    "dyhead/atss_r50_fpn_dyhead_1x_coco": ([], ["atss_cls", "atss_reg", "atss_centerness", "*spatial_conv_offset"]),
    "solo/solo_r50_fpn_1x_coco": (["mask_convs.*", "cls_convs.*"], ["conv_cls"]),
    "solov2/solov2_r50_fpn_1x_coco": (
        ["cls_convs.*", "kernel_convs.*", "mask_feature_head.*"],
        ["conv_cls", "conv_kernel"],
    ),
    "condinst/condinst_r50_fpn_ms-poly-90k_coco_instance": (
        ["cls_convs.*", "reg_convs.*", "mask_feature_head.*"],
        ["conv_cls", "conv_reg", "conv_centerness", "controller"],
    ),
    "yolact/yolact_r50_1xb8-55e_coco": (["head_convs.*", "protonet.*"], ["conv_cls", "conv_reg", "conv_coeff"]),
    "rpn/rpn_r50_fpn_1x_coco": (["rpn_conv"], []),
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco": (["rpn_conv", "mask_head.convs.*"], []),
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco": (["rpn_conv", "mask_head.convs.*"], ["*.conv_offset"]),
    "carafe/mask-rcnn_r50_fpn-carafe_1x_coco": (["rpn_conv", "mask_head.convs.*"], ["*.content_encoder"]),
    "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco": (["rpn_conv", "mask_head.convs.*", "conv_upsample_layers.*"], []),
    "queryinst/queryinst_r50_fpn_1x_coco": (["mask_head.*.convs.*"], []),
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco": (["pixel_decoder.output_convs.*"], []),
}


@pytest.mark.parametrize("config", few(HEADS, 5))
def test_a_heads_prediction_layers_are_left_alone_and_its_features_converted(config):
    must, must_not = HEADS[config]
    detector, inputs = mmdet_configs.build(config)
    plan = plan_conversion(detector, UniformPolicy(count=2), example_inputs=inputs)
    convs = {row.name: row for row in plan.rows if row.signature.kernel_size == (3, 3)}
    plain = {name: row for name, row in convs.items() if row.reason_key is not Reason.NOT_CONV2D}

    def named(patterns: list[str]) -> set[str]:
        found = {pattern: fnmatch.filter(plain, f"*.{pattern}") for pattern in patterns}
        assert all(found.values()), found
        return {name for names in found.values() for name in names}

    converted = {name for name, row in plain.items() if row.converted}
    assert named(must) <= converted
    assert not named(must_not) & converted
    outside = {name for name in plain if not name.startswith(("backbone.", "neck."))}
    assert outside - converted <= named(must_not)


def test_thirty_heads_are_looked_at():
    assert len(HEADS) >= 30
