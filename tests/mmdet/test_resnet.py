"""CoResNet and CoResNeXt as backbones of MMDetection."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
import torchvision
from mmcv.cnn import fuse_conv_bn
from mmdet.registry import MODELS
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from mmengine.runner import load_checkpoint

from coconv_surgery import CoConv2d
from coconv_surgery.mmdet import CoResNet, CoResNeXt

SMALL = {"base_channels": 8, "norm_eval": False}
TABLE_1 = [(1, 2, 3, 4), (1, 2, 3), (1, 2), None]


def dilations(conv: nn.Conv2d):
    return getattr(conv, "dilations", None)


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_every_bottleneck_has_table_1s_levels(depth):
    backbone = CoResNet(depth=depth, **SMALL)
    for name, expected in zip(backbone.res_layers, TABLE_1, strict=True):
        assert {dilations(block.conv2) for block in getattr(backbone, name)} == {expected}


def test_stage_1_and_2_of_coresnet_50_have_table_1s_splits():
    backbone = CoResNet(depth=50)
    assert backbone.layer1[0].conv2.splits == (16, 16, 16, 16)
    assert backbone.layer2[0].conv2.splits == (64, 32, 32)


@pytest.mark.parametrize("depth", [18, 34])
def test_both_convs_of_a_basic_block_are_converted(depth):
    backbone = CoResNet(depth=depth, **SMALL)
    for name, expected in zip(backbone.res_layers, TABLE_1, strict=True):
        assert {dilations(conv) for block in getattr(backbone, name) for conv in (block.conv1, block.conv2)} == {
            expected
        }


def test_levels_of_a_resnext_hold_whole_groups():
    backbone = CoResNeXt(depth=50, groups=32, base_width=4)
    assert [getattr(backbone, name)[0].conv2.splits for name in backbone.res_layers[:3]] == [
        (32, 32, 32, 32),
        (128, 64, 64),
        (256, 256),
    ]


def test_stem_shortcuts_and_plugins_stay_plain():
    plugin = {"cfg": {"type": "ContextBlock", "ratio": 1 / 4}, "position": "after_conv2"}
    backbone = CoResNet(depth=50, deep_stem=True, plugins=[plugin], **SMALL)
    converted = {name for name, module in backbone.named_modules() if isinstance(module, CoConv2d)}
    assert len(converted) == 13
    assert all(name.endswith(".conv2") and name.startswith("layer") for name in converted)
    assert backbone(torch.randn(1, 3, 64, 64))[3].shape == (1, 256, 2, 2)


OPTIONS = [
    {"depth": 18},
    {"depth": 50},
    {"depth": 50, "norm_after_add": True},
    {"depth": 50, "style": "caffe", "num_stages": 3, "strides": (1, 2, 1), "dilations": (1, 1, 2), "out_indices": (2,)},
    {"depth": 50, "deep_stem": True, "avg_down": True},
    {"depth": 50, "norm_cfg": {"type": "GN", "num_groups": 4}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_are_those_of_resnet_and_load_both_ways(options):
    backbone = CoResNet(**SMALL, **options)
    resnet = MODELS.build({"type": "ResNet", **SMALL, **{k: v for k, v in options.items() if k != "norm_after_add"}})
    shapes, expected = ({name: value.shape for name, value in net.state_dict().items()} for net in (backbone, resnet))
    assert shapes == expected
    backbone.load_state_dict(resnet.state_dict())
    resnet.load_state_dict(backbone.state_dict())
    outputs = backbone(torch.randn(1, 3, 64, 64))
    assert [out.shape for out in outputs] == [out.shape for out in resnet(torch.randn(1, 3, 64, 64))]


def test_with_one_level_everywhere_it_computes_what_resnet_does():
    backbone = CoResNet(depth=50, levels=(1, 1, 1, 1), **SMALL)
    resnet = MODELS.build({"type": "ResNet", "depth": 50, **SMALL})
    resnet.load_state_dict(backbone.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for mine, theirs in zip(backbone(image), resnet(image), strict=True):
        assert torch.equal(mine, theirs)


def test_a_torchvision_checkpoint_initialises_it(tmp_path):
    weights = torchvision.models.resnet50().state_dict()
    torch.save(weights, tmp_path / "resnet50.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "resnet50.pth")}
    backbone = CoResNet(depth=50, init_cfg=init)
    backbone.init_weights()
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


def authors_layout(weights: dict[str, torch.Tensor], backbone: CoResNet) -> dict[str, torch.Tensor]:
    """The state dict as the authors' code would save it."""
    layout = {}
    for name, value in weights.items():
        conv = backbone.get_submodule(name.rpartition(".")[0])
        if isinstance(conv, CoConv2d):
            for level, part in enumerate(value.split(conv.splits), start=1):
                layout[f"module.{name.removesuffix('weight')}conv2_{level}.weight"] = part
        else:
            layout[f"module.{name}"] = value
    return layout


def test_a_checkpoint_of_the_authors_initialises_it(tmp_path, recwarn):
    source = CoResNet(depth=50, **SMALL)
    layout = authors_layout(source.state_dict(), source)
    assert "module.layer1.0.conv2.conv2_4.weight" in layout
    torch.save({"epoch": 90, "state_dict": layout}, tmp_path / "authors.pth")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "authors.pth")}
    backbone = CoResNet(depth=50, norm_after_add=True, init_cfg=init, **SMALL)
    backbone.init_weights()
    weights = backbone.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in source.state_dict().items())
    assert not [warning for warning in recwarn if "norm_after_add" in str(warning.message)]


def test_a_checkpoint_of_the_authors_without_norm_after_add_warns(tmp_path):
    source = CoResNet(depth=50, **SMALL)
    torch.save(authors_layout(source.state_dict(), source), tmp_path / "authors.pth")
    with pytest.warns(UserWarning, match="norm_after_add=True"):
        load_checkpoint(CoResNet(depth=50, **SMALL), str(tmp_path / "authors.pth"), strict=True)


def test_norm_after_add_normalises_the_sum_at_the_end_of_every_stage(lively):
    backbone = lively(CoResNet(depth=50, norm_after_add=True, **SMALL))
    block = backbone.layer2[-1]
    x = torch.randn(2, 64, 8, 8)
    inner = block.conv2(block.norm1(block.conv1(x)).relu())
    expected = block.norm3(block.conv3(block.norm2(inner).relu()) + x).relu()
    torch.testing.assert_close(block(x), expected)
    first = backbone.layer2[0]
    assert type(first) is type(CoResNet(depth=50, **SMALL).layer2[0])


def test_norm_after_add_survives_initialisation():
    backbone = CoResNet(depth=50, norm_after_add=True, **SMALL)
    backbone.init_weights()
    assert all(feature.abs().max() > 0 for feature in backbone(torch.randn(2, 3, 64, 64)))


NETWORKS = {
    "CoResNet-18": lambda: CoResNet(depth=18, **SMALL),
    "CoResNet-50": lambda: CoResNet(depth=50, **SMALL),
    "norm after add": lambda: CoResNet(depth=50, norm_after_add=True, **SMALL),
    "CoResNeXt-50": lambda: CoResNeXt(depth=50, groups=8, base_width=8, **SMALL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fuse_conv_bn_gives_the_same_outputs(name, lively):
    backbone = lively(NETWORKS[name]())
    image = torch.randn(2, 3, 64, 64)
    expected = backbone(image)
    fused = fuse_conv_bn(copy.deepcopy(backbone))
    norms = [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == (4 if name == "norm after add" else 0)
    torch.testing.assert_close(fused(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_efficient_conv_bn_eval_gives_the_same_outputs(name, lively):
    model = nn.Module()
    model.backbone = lively(NETWORKS[name]())
    image = torch.randn(2, 3, 64, 64)
    expected = model.backbone(image)
    turn_on_efficient_conv_bn_eval(model, "backbone")
    assert "efficient_conv_bn_eval_control" in model.backbone.forward.__self__.code
    torch.testing.assert_close(model.backbone(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"depth": 18}, {"depth": 50, "norm_after_add": True}], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(options):
    backbone = CoResNet(**options, base_channels=8).double()
    checkpointed = CoResNet(**options, base_channels=8, with_cp=True).double()
    checkpointed.load_state_dict(backbone.state_dict())
    image = torch.randn(2, 3, 32, 32, dtype=torch.double)
    for network in (backbone, checkpointed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mmdet leaves use_reentrant out
            sum(feature.square().mean() for feature in network(image)).backward()
    for one, other in zip(backbone.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_frozen_stages_and_norm_eval_are_resnets():
    backbone = CoResNet(depth=18, base_channels=8, frozen_stages=2, norm_eval=True)
    backbone.train()
    frozen = {name.split(".")[0] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    assert not any(module.training for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_training_step_under_bf16_autocast_runs():
    backbone = CoResNet(depth=18, **SMALL)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        feature = backbone(torch.randn(2, 3, 32, 32))[0]
        loss = feature.float().square().mean()
    loss.backward()
    before = backbone.layer1[0].conv1.weight.detach().clone()
    optimizer.step()
    assert feature.isfinite().all()
    assert not torch.equal(before, backbone.layer1[0].conv1.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (4, 3, 2)}, r"levels=\(4, 3, 2\) must be 4 numbers"),
        (
            {"levels": (4, 3, 2, 1), "num_stages": 3, "strides": (1, 2, 2), "dilations": (1,) * 3, "out_indices": (2,)},
            "must be 3",
        ),
        ({"levels": 3}, "levels=3 must be 4 numbers"),
        ({"levels": (4, 3, 2, 0)}, "of at least 1"),
        ({"base_channels": 2}, "stage 1 cannot have 4 levels"),
        ({"conv_cfg": {"type": "ConvWS"}}, "conv2 is a ConvWS2d"),
        ({"depth": 18, "norm_after_add": True}, "50, 101 or 152"),
    ],
    ids=str,
)
def test_levels_that_cannot_be_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        CoResNet(**{"depth": 50, **options})
