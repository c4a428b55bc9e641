"""Detectors that are converted while their config builds them."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmcv.utils import ext_loader
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.runner import load_checkpoint
from sampling import few
from torch.utils._pytree import tree_leaves

from coconv_surgery import CoConv2d, PlanRow, ResolutionPolicy, get_plan, plan_conversion
from coconv_surgery.mmengine.options import SurgeryOptions, resized_to
from coconv_surgery.sweep import mmdet_configs

CONVERT = Path(__file__).parents[2] / "configs" / "convert"
NAMES = sorted(path.stem for path in CONVERT.glob("*.py"))
RETINANET = "retinanet_r50_fpn_1x_coco"


def read(name: str = RETINANET, **surgery) -> Config:
    """Read a config and change its surgery."""
    config = Config.fromfile(CONVERT / f"{name}.py")
    if "input_size" in surgery:
        del config.model.surgery["pipeline"]
    config.model.surgery.update(surgery)
    return config


def plain(config: Config) -> dict:
    model = copy.deepcopy(config.model)
    model.type = model.pop("detector_type")
    del model["surgery"]
    return model


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module", params=few(NAMES, 3))
def pair(request):
    """A plain detector, the same one converted, and its config."""
    # Proposals need a real forward pass, which is quick on a small image.
    config = read(request.param, **({"input_size": (192, 256)} if "rcnn" in request.param else {}))
    return MODELS.build(plain(config)), MODELS.build(copy.deepcopy(config.model)), config


def test_the_configs_cover_the_families():
    assert len(NAMES) >= 9


def test_the_converted_detector_is_of_its_own_class(pair):
    unconverted, converted, config = pair
    assert type(converted) is type(unconverted)
    assert "backbone" in config.model


def test_parameters_are_equal_in_number_and_name(pair):
    unconverted, converted, _ = pair
    assert parameters(converted) == parameters(unconverted)
    assert {name: value.shape for name, value in converted.state_dict().items()} == {
        name: value.shape for name, value in unconverted.state_dict().items()
    }


def test_the_plan_prints_what_is_there(pair):
    _, converted, _ = pair
    plan = get_plan(converted)
    found = {name for name, module in converted.named_modules() if isinstance(module, CoConv2d)}
    assert {row.name for row in plan.converted} == found
    assert len(found) >= 10
    assert all(name in str(plan) for name in found)


def test_a_checkpoint_of_the_plain_detector_loads_without_a_missing_key(pair, tmp_path):
    unconverted, converted, _ = pair
    torch.save({"state_dict": unconverted.state_dict(), "meta": {}}, tmp_path / "plain.pth")
    load_checkpoint(converted, str(tmp_path / "plain.pth"), strict=True)
    # SSD's L2Norm starts with whatever is in memory.
    torch.testing.assert_close(converted.state_dict(), unconverted.state_dict(), atol=0, rtol=0, equal_nan=True)


def test_prediction_layers_and_offset_convs_are_left_alone(pair):
    _, converted, _ = pair
    names = [name for name, module in converted.named_modules() if isinstance(module, CoConv2d)]
    ends = ("retina_cls", "retina_reg", "conv_cls", "conv_reg", "conv_centerness", "conv_offset", "rtm_cls", "rtm_reg")
    ends += ("atss_cls", "atss_reg", "atss_centerness", "rpn_cls", "rpn_reg", "conv_logits")
    assert not [name for name in names if name.endswith(ends)]
    assert not [name for name in names if ".multi_level_conv_" in name]
    if type(converted).__name__ == "SingleStageDetector":
        assert not [name for name in names if name.startswith("bbox_head.")]


def test_a_head_shared_over_the_pyramid_stays_one_module(pair):
    unconverted, converted, _ = pair
    assert [name for name, _ in converted.named_modules()] == [name for name, _ in unconverted.named_modules()]


def test_predict_runs_on_an_image(pair, photograph):
    _, converted, _ = pair
    converted.eval()
    size = tuple(photograph.shape[1:])
    sample = DetDataSample(metainfo={"img_id": 0, "ori_shape": size, "img_shape": size, "scale_factor": (1.0, 1.0)})
    data = converted.data_preprocessor({"inputs": [photograph], "data_samples": [sample]}, False)
    with torch.no_grad():
        (result,) = converted(**data, mode="predict")
    assert result.pred_instances.bboxes.shape[1] == 4
    assert result.pred_instances.scores.isfinite().all()


def test_init_detector_and_the_inferencer_see_the_converted_network(photograph, tmp_path):
    config = read(include="backbone.*")
    for transform in config.test_dataloader.dataset.pipeline:
        if "scale" in transform:
            transform.scale = (256, 192)
    source = MODELS.build(copy.deepcopy(config.model))
    torch.save({"state_dict": source.state_dict(), "meta": {}}, tmp_path / "weights.pth")
    config.dump(tmp_path / "config.py")

    image = photograph.permute(1, 2, 0).numpy()
    detector = init_detector(str(tmp_path / "config.py"), str(tmp_path / "weights.pth"), device="cpu")
    inferencer = DetInferencer(str(tmp_path / "config.py"), str(tmp_path / "weights.pth"), device="cpu")
    for network in (detector, inferencer.model):
        assert not get_plan(network).diff(get_plan(source))
    expected = inference_detector(detector, image).pred_instances
    found = inferencer(image, return_datasamples=True)["predictions"][0].pred_instances
    torch.testing.assert_close(found.scores, expected.scores)


def test_the_pipelines_size_decides_and_is_padded_as_images_are():
    config = Config.fromfile(CONVERT / f"{RETINANET}.py")
    detector = MODELS.build(config.model)
    assert get_plan(detector).input == "1×3×800×1344"
    assert detector.backbone.layer4[0].conv2.levels == 3


def test_heads_take_the_largest_map_where_the_policy_says_so():
    policy = {"type": "resolution", "shared": "max", "max_levels": 3}
    detector = MODELS.build(read(policy=policy).model)
    assert get_plan(detector).policy == repr(ResolutionPolicy(shared="max", max_levels=3))
    assert detector.bbox_head.cls_convs[0].conv.levels == 3


def test_include_exclude_and_overrides_reach_the_plan():
    overrides = {"neck.fpn_convs.0": 2, "neck.fpn_convs.1": {"dilations": (1, 3), "splits": (192, 64)}}
    surgery = {"include": ["backbone.*"], "exclude": ["backbone.layer1"], "overrides": overrides}
    detector = MODELS.build(read(**surgery).model)
    assert type(detector.backbone.layer1[0].conv2) is nn.Conv2d
    assert type(detector.backbone.layer2[0].conv2) is CoConv2d
    assert detector.neck.fpn_convs[0].conv.dilations == (1, 2)
    assert detector.neck.fpn_convs[1].conv.splits == (192, 64)
    assert type(detector.neck.fpn_convs[2].conv) is nn.Conv2d


@pytest.mark.parametrize("surgery", [{"include": "neck"}, {"policy": "uniform"}], ids=str)
def test_a_coresnet_keeps_its_levels(surgery):
    config = read(**surgery)
    config.model.backbone.type = "CoResNet"
    detector = MODELS.build(config.model)
    assert [getattr(detector.backbone, f"layer{stage}")[0].conv2.dilations for stage in (1, 2, 3)] == [
        (1, 2, 3, 4),
        (1, 2, 3),
        (1, 2),
    ]
    assert {row.name for row in get_plan(detector).converted} >= {"backbone.layer1.0.conv2", "neck.fpn_convs.0.conv"}


def test_a_saved_plan_is_replayed(tmp_path):
    source = MODELS.build(read().model)
    get_plan(source).to_json(tmp_path / "plan.json")
    config = read()
    config.model.surgery = {"plan": str(tmp_path / "plan.json")}
    assert get_plan(MODELS.build(config.model)) == get_plan(source)


def test_a_config_that_was_dumped_builds_the_same(tmp_path):
    config = read(overrides={"neck.fpn_convs.*": [1, 2]}, policy={"type": "stage", "stages": (3, 2, 1, 1)})
    config.dump(tmp_path / "dumped.py")
    again = Config.fromfile(tmp_path / "dumped.py")
    assert not get_plan(MODELS.build(again.model)).diff(get_plan(MODELS.build(config.model)))


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        ({"polcy": "stage"}, "no key 'polcy': did you mean 'policy'"),
        ({"policy": "stge"}, "unknown policy 'stge'"),
        ({"policy": {"type": "stage", "stags": (1, 2)}}, "policy 'stage'.*stags"),
        ({"input_size": None}, r"how large are the images\? Give input_size=\(height, width\)"),
        ({"input_size": (0, 5)}, r"input_size=.0, 5."),
        ({"pipeline": [{"type": "LoadImageFromFile"}]}, "give input_size instead"),
        ({"plan": "x.json"}, "leave out pipeline"),
        ({"include": ["bakbone.*"]}, "no convolution matches"),
    ],
    ids=str,
)
def test_a_wrong_surgery_is_one_clear_error(surgery, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(read(**surgery).model)


def test_an_unknown_detector_type_is_one_clear_error():
    config = read()
    config.model.detector_type = "RetinaNett"
    with pytest.raises(ValueError, match="unknown detector_type 'RetinaNett': did you mean 'RetinaNet'"):
        MODELS.build(config.model)


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        ({"type": "Resize", "scale": (1333, 800), "keep_ratio": True}, (800, 1333)),
        ({"type": "Resize", "scale": (320, 256), "keep_ratio": False}, (256, 320)),
        ({"type": "TestTimeAug", "transforms": [[{"type": "Resize", "scale": (300, 300)}]]}, (300, 300)),
    ],
    ids=["keep_ratio", "width and height", "nested"],
)
def test_a_pipelines_size_is_read_off_its_resizing(resize, size):
    pipeline = [{"type": "LoadImageFromFile"}, resize, {"type": "PackDetInputs"}]
    assert resized_to(pipeline) == size
    assert SurgeryOptions.read({"pipeline": pipeline}).image_size == size


def test_offset_convs_of_deformable_convs_are_left_alone():
    config = read(input_size=(64, 96))
    dcn = {"type": "DCNv2", "deform_groups": 1, "fallback_on_stride": False}
    config.model.backbone.update(dcn=dcn, stage_with_dcn=(False, True, False, False))
    rows = {row.name: row for row in get_plan(MODELS.build(config.model)).rows}
    offset = rows["backbone.layer2.0.conv2.conv_offset"]
    assert not offset.converted
    assert offset.reason
    assert rows["backbone.layer1.0.conv2"].converted


def fuse(detector):
    fuse_conv_bn(detector)
    assert not [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]


def evaluate_conv_modules_efficiently(detector):
    for module in detector.modules():
        if isinstance(module, ConvModule):
            module.turn_on_efficient_conv_bn_eval(True)


def evaluate_the_backbone_efficiently(detector):
    turn_on_efficient_conv_bn_eval(detector, "backbone")


@pytest.mark.parametrize("speed_up", [fuse, evaluate_conv_modules_efficiently, evaluate_the_backbone_efficiently])
def test_folding_norms_gives_the_same_outputs(speed_up, lively):
    detector = lively(MODELS.build(read("yolox_s_8xb8-300e_coco").model))
    image = torch.randn(1, 3, 128, 128)
    expected = detector(image)
    speed_up(detector)
    for mine, theirs in zip(tree_leaves(detector(image)), tree_leaves(expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


def traced(name: str) -> dict[str, PlanRow]:
    detector, inputs = mmdet_configs.build(name)
    return {row.name: row for row in plan_conversion(detector, example_inputs=inputs).rows}


def test_a_student_and_the_teacher_that_averages_it_are_converted_alike():
    rows = traced("soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco")
    levels = {name: (row.dilations, row.reason) for name, row in rows.items()}
    student = {name.removeprefix("student."): found for name, found in levels.items() if name.startswith("student.")}
    teacher = {name.removeprefix("teacher."): found for name, found in levels.items() if name.startswith("teacher.")}
    assert student == teacher
    assert rows["student.backbone.layer1.0.conv2"].converted


def test_the_heads_of_a_tracker_are_seen():
    rows = traced("qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base")
    assert rows["detector.backbone.layer1.0.conv2"].converted
    assert rows["track_head.embed_head.convs.0.conv"].output_sizes == ((7, 7),)
    assert {row.reason for row in rows.values()} <= {None, "kernel 1×1", "kernel 7×7", "one level: the conv itself"}


def test_planning_leaves_proposals_and_mmcvs_kernels_as_they_were():
    detector, inputs = mmdet_configs.build("faster_rcnn/faster-rcnn_r50_fpn_1x_coco")
    extension = ext_loader.load_ext("_ext", ["nms"])
    before = copy.deepcopy(detector.test_cfg), detector.rpn_head.predict, dict(vars(extension))
    plan_conversion(detector, example_inputs=inputs)
    assert (detector.test_cfg, detector.rpn_head.predict, dict(vars(extension))) == before
