"""mmengine's joint evaluation of a convolution and its norm, on networks with contextual convolutions and without."""

import copy
import importlib.util

import mmcv.cnn.bricks
import mmengine.model.efficient_conv_bn_eval as conv_bn_eval
import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from mmdet.registry import MODELS
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import coconv_surgery.mmdet  # noqa: F401
from coconv_surgery import CoConv2d, convert
from coconv_surgery.layers.levels import complete_levels
from coconv_surgery.layers.switch import to_coconv_


def pristine():
    """mmengine's module as it is without this package: executed once more."""
    spec = importlib.util.spec_from_file_location("pristine_conv_bn_eval", conv_bn_eval.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UPSTREAM = pristine().turn_on_efficient_conv_bn_eval


def lively(network: nn.Module) -> nn.Module:
    """Give norms statistics that make a mistake in joining them show, and evaluate."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            if module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    network.eval()
    return network


def turned_on(network: nn.Module, turn_on=None) -> nn.Module:
    """Evaluate a network's pairs jointly, by the function that a runner calls for ``efficient_conv_bn_eval="net"``."""
    holder = nn.Module()
    holder.net = network
    (turn_on or conv_bn_eval.turn_on_efficient_conv_bn_eval)(holder, "net")
    return network


def joined(network: nn.Module) -> int:
    """How many pairs are evaluated jointly."""
    graph = network.forward.__self__.graph
    return sum(node.target is conv_bn_eval.efficient_conv_bn_eval_control for node in graph.nodes)


def tensors(output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


# -- Without contextual convolutions ------------------------------------------------------------------------------


def mmdet_backbone(**config):
    return lambda: MODELS.build({**config, "_scope_": "mmdet"})


PRE_ACTIVATION = {"layers": (1, 1, 1, 1), "channels": (32, 64, 64, 64)}
UNCONVERTED = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "densenet121 of timm, norms with activations": lambda: timm.create_model("densenet121", block_config=(2, 2, 2, 2)),
    "densenet of torchvision, norm first": lambda: torchvision.models.DenseNet(8, (2, 2), 16),
    "pre-activation": lambda: timm.create_model("resnetv2_50", **PRE_ACTIVATION),
    "standardised weights": lambda: ResNetV2(**PRE_ACTIVATION, conv_layer=StdConv2d, norm_layer=BatchNormAct2d),
    "dynamic padding": lambda: timm.create_model("tf_mobilenetv3_small_minimal_100"),
    "mobilenet of timm": lambda: timm.create_model("mobilenetv2_050"),
    "mobilenet of torchvision": lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
    "vgg with norms": lambda: torchvision.models.vgg11_bn().features,
    "no batch norm": lambda: timm.create_model("convnext_atto"),
    "ResNet-50 with ConvWS": mmdet_backbone(type="ResNet", depth=50, base_channels=8, conv_cfg={"type": "ConvWS"}),
    "ResNet-18 of mmdet": mmdet_backbone(type="ResNet", depth=18, base_channels=8),
    "ResNet-50 of mmdet": mmdet_backbone(type="ResNet", depth=50, base_channels=8),
    "Res2Net": mmdet_backbone(type="Res2Net", depth=50, base_channels=8, base_width=8),
    "CSPNeXt": mmdet_backbone(type="CSPNeXt", widen_factor=0.25, deepen_factor=0.33),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)),
}


def outcome(turn_on, network: nn.Module, image: torch.Tensor):
    """What a network computes after it is turned on, or the error."""
    try:
        return tensors(turned_on(copy.deepcopy(network), turn_on)(image))
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", UNCONVERTED)
@torch.no_grad()
def test_without_contextual_convs_upstream_decides(name):
    network, image = lively(UNCONVERTED[name]()), torch.randn(1, 3, 64, 64)
    expected = outcome(UPSTREAM, network, image)
    found = outcome(conv_bn_eval.turn_on_efficient_conv_bn_eval, network, image)
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# -- With contextual convolutions ---------------------------------------------------------------------------------


def coconv(channels: int = 3) -> CoConv2d:
    return CoConv2d(channels, 8, 3, padding=1, levels=2)


def contextual(conv: nn.Conv2d) -> nn.Conv2d:
    to_coconv_(conv, *complete_levels(conv, 2))
    return conv


def with_norm(conv: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(conv, norm or nn.BatchNorm2d(8))


def watched(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def replaced(conv: nn.Module) -> nn.Module:
    conv.forward = lambda x, forward=conv.forward: 2 * forward(x)
    return conv


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def parametrized(module: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Doubled())


class Written(nn.Module):
    """A network that calls its convolution and its norm as some function says."""

    def __init__(self, call, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm, self.call = coconv(channels), nn.BatchNorm2d(8), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


def read_twice(net, x):
    convolved = net.conv(x)
    return net.norm(convolved) + convolved


def overwritten(net, x):
    convolved = net.conv(x)
    x.zero_()
    return net.norm(convolved)


CONVERTED = {
    "a pair": (lambda: with_norm(coconv()), 1),
    "plain pairs beside it": (lambda: nn.Sequential(coconv(), *with_norm(nn.Conv2d(8, 8, 1))), 1),
    "norm of all processes": (lambda: with_norm(coconv(), nn.SyncBatchNorm(8)), 1),
    "parametrized": (lambda: with_norm(parametrized(coconv()), parametrized(nn.BatchNorm2d(8))), 1),
    "input overwritten": (lambda: Written(overwritten), 1),
    "called twice": (lambda: Written(lambda net, x: net.norm(net.conv(net.norm(net.conv(x)))), channels=8), 2),
    "transposed": (lambda: nn.Sequential(coconv(), *with_norm(nn.ConvTranspose2d(8, 8, 2))), 0),
    "read twice": (lambda: Written(read_twice), 0),
    "by keyword": (lambda: Written(lambda net, x: net.norm(net.conv(input=x))), 0),
    "norm by keyword": (lambda: Written(lambda net, x: net.norm(input=net.conv(x))), 0),
    "hook of the conv": (lambda: with_norm(watched(coconv())), 0),
    "hook of the norm": (lambda: with_norm(coconv(), watched(nn.BatchNorm2d(8))), 0),
    "weight norm by hook": (lambda: with_norm(nn.utils.weight_norm(coconv())), 0),
    "forward replaced": (lambda: with_norm(replaced(coconv())), 0),
    "norm of the batch": (lambda: with_norm(coconv(), nn.BatchNorm2d(8, track_running_stats=False)), 0),
    "norm with activation": (lambda: with_norm(coconv(), BatchNormAct2d(8)), 0),
    "the same, parametrized": (lambda: with_norm(coconv(), parametrized(BatchNormAct2d(8))), 0),
    "norm first": (lambda: nn.Sequential(coconv(), nn.ReLU(), nn.BatchNorm2d(8), coconv(8)), 0),
    "StdConv2d": (lambda: with_norm(contextual(StdConv2d(3, 8, 3, padding=1))), 0),
    "StdConv2d, parametrized": (lambda: with_norm(parametrized(contextual(StdConv2d(3, 8, 3, padding=1)))), 0),
    "Conv2dSame": (lambda: with_norm(contextual(Conv2dSame(3, 8, 3, stride=2))), 0),
    "ConvWS2d": (lambda: with_norm(contextual(mmcv.cnn.ConvWS2d(3, 8, 3, padding=1))), 0),
    "Conv2dAdaptivePadding": (
        lambda: with_norm(contextual(mmcv.cnn.bricks.Conv2dAdaptivePadding(3, 8, 3, stride=2))),
        0,
    ),
    "resnet18": (lambda: convert(timm.create_model("resnet18"), input_size=64), 20),
    "ResNet-50 of mmdet": (lambda: convert(UNCONVERTED["ResNet-50 of mmdet"](), input_size=64), 53),
    "ResNet-50 with ConvWS": (lambda: convert(UNCONVERTED["ResNet-50 with ConvWS"](), input_size=64), 0),
    "pre-activation with StdConv2d": (lambda: convert(UNCONVERTED["standardised weights"](), input_size=64), 0),
}


@pytest.mark.parametrize("name", CONVERTED)
@torch.no_grad()
def test_with_contextual_convs_it_computes_what_the_network_does(name):
    build, pairs = CONVERTED[name]
    network = lively(build())
    assert any(isinstance(module, CoConv2d) for module in network.modules())
    channels = network.conv.in_channels if isinstance(network, Written) else 3
    image = torch.randn(1, channels, 64, 64)
    expected = tensors(network(image.clone()))
    turned_on(network)
    assert joined(network) == pairs
    for mine, theirs in zip(tensors(network(image.clone())), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_in_training_it_normalises_by_the_batch_and_notes_it():
    network = lively(convert(timm.create_model("resnet18"), input_size=64))
    network.train()
    other, image = copy.deepcopy(network), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(turned_on(network)(image), other(image))
    for mine, theirs in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
