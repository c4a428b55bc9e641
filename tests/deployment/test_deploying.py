"""``deploy`` makes plain layers of a network, and they compute the same."""

import copy
import types

import pytest
import timm
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from cases import assert_close, cases
from hypothesis import given, settings
from randomising import randomise_norms
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, ScaledStdConv2dSame, StdConv2dSame
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.feature_extraction import create_feature_extractor

from coconv_surgery import (
    CoConv2d,
    DeploymentError,
    calibrate,
    coconv2d,
    convert,
    deploy,
    effective_receptive_field,
    get_deployment,
    get_plan,
    guard,
    plan_conversion,
    receptive_fields,
    register_coconv,
    to_coconv_,
)
from coconv_surgery.deployment.forms import ConvLevels, GroupedConvLevels
from coconv_surgery.planning.reasons import Reason


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()


def check(net, image, **options):
    """Deploy a network; it must compute the same as in evaluation mode, and stay as it was."""
    before, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    deployed = deploy(net, **({"example_inputs": image} | options))
    assert list(net.modules()) == modules
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert not any(isinstance(module, CoConv2d) for module in deployed.modules())
    with torch.no_grad():
        assert relative(deployed(image), copy.deepcopy(net).eval()(image)) < 1e-5
    return deployed


def norms(net):
    return [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]


def conv(inputs=8, outputs=8, dilations=(1, 2), **arguments):
    made = nn.Conv2d(inputs, outputs, 3, **{"padding": 1, "bias": False} | arguments)
    to_coconv_(made, dilations)
    return made


class Net(nn.Module):
    """Modules by name, and a forward given as a function of them and the image."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)
        randomise_norms(self)

    def forward(self, image):
        return self.run(self, image)


fx.wrap("coconv2d")
IMAGE = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))


@settings(deadline=None)
@given(cases())
def test_any_contextual_convolution_written_out_computes_the_same(case):
    coconv, image = case.build()
    deployed = deploy(coconv, example_inputs=image)
    with torch.no_grad():
        assert_close(deployed(image), coconv(image), torch.float64)
    assert all(
        type(module) in (nn.Conv2d, nn.ModuleList, ConvLevels, GroupedConvLevels) for module in deployed.modules()
    )


def test_a_norm_behind_a_convolution_is_folded():
    net = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
    randomise_norms(net)
    deployed = check(net, IMAGE)
    assert [type(module) for module in deployed] == [ConvLevels, nn.Identity, nn.ReLU]
    assert get_deployment(deployed).folded == {"1": ("0",)}
    assert get_deployment(deployed).written_out == {"0": 2}


def test_what_reads_a_map_decides_and_not_where_modules_are_registered():
    net = Net(
        lambda self, x: self.norm1(self.conv2(self.norm2(self.conv1(x)))),
        conv1=conv(),
        norm1=nn.BatchNorm2d(8),
        conv2=conv(),
        norm2=nn.BatchNorm2d(8),
    )
    assert get_deployment(check(net, IMAGE)).folded == {"norm1": ("conv2",), "norm2": ("conv1",)}


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda self, x: self.norm(y := self.conv(x)) + y, "conv gives is read by others"),
        (lambda self, x: self.norm(self.conv(x).relu()), "is not what a convolution"),
        (lambda self, x: self.norm(self.conv(x) + x), "is not what a convolution"),
        (lambda self, x: self.norm(self.conv(x)) + self.norm(x), "is not what a convolution"),
        (lambda self, x: self.norm(self.conv(x)[:, :8]), "is not what a convolution"),
        (lambda self, x: torch.cat([self.norm(y := self.conv(x)), torch.from_numpy(y.numpy())]), "read by others"),
        (lambda self, x: self.norm(setattr(self, "kept", self.conv(x)) or self.kept), "read by others"),
        (lambda self, x: torch.cat([self.other(y := self.conv(x)), self.norm(y)]), "read by other norms"),
        (lambda self, x: self.conv(x), "does not run"),
    ],
    ids=["shortcut", "activation", "sum", "also the image", "slice", "numpy", "kept", "two norms", "unused"],
)
def test_a_norm_that_cannot_be_folded_is_left_with_the_reason(run, why):
    net = Net(run, conv=conv(), norm=nn.BatchNorm2d(8), other=nn.BatchNorm2d(8))
    deployed = check(net, IMAGE)
    assert "norm" in norms(deployed)
    assert why in get_deployment(deployed).left["norm"]
    assert why in str(get_deployment(deployed))


def test_a_norm_of_two_convolutions_is_folded_into_both():
    net = Net(lambda self, x: self.norm(self.a(x)) + self.norm(self.b(x)), a=conv(), b=conv(), norm=nn.BatchNorm2d(8))
    deployed = check(net, IMAGE)
    assert norms(deployed) == []
    assert get_deployment(deployed).folded == {"norm": ("a", "b")}


def test_a_convolution_called_twice_with_one_norm_is_folded():
    net = Net(lambda self, x: self.norm(self.conv(self.norm(self.conv(x)))), conv=conv(), norm=nn.BatchNorm2d(8))
    assert norms(check(net, IMAGE)) == []


def test_a_module_under_two_names_stays_one():
    shared = conv()
    net = nn.Sequential(shared, nn.ReLU(), shared)
    deployed = check(net, IMAGE)
    assert deployed[0] is deployed[2]


def test_weights_that_convolutions_share_may_get_norms_of_their_own():
    first, second = conv(), conv()
    second.weight = first.weight
    net = nn.Sequential(first, nn.BatchNorm2d(8), second, nn.BatchNorm2d(8))
    randomise_norms(net)
    assert norms(check(net, IMAGE)) == []


def test_returned_maps_stay_what_they_are():
    net = Net(lambda self, x: (self.norm(self.conv(x)), self.conv(x)), conv=conv(), norm=nn.BatchNorm2d(8))
    deployed = deploy(net, example_inputs=IMAGE)
    with torch.no_grad():
        for found, expected in zip(deployed(IMAGE), net.eval()(IMAGE), strict=True):
            assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, eps=0.1),
        nn.SyncBatchNorm(8),
        FrozenBatchNormAct2d(8, act_layer=nn.SiLU),
        BatchNormAct2d(8, act_layer=nn.SiLU),
        nn.InstanceNorm2d(8, track_running_stats=True, affine=True),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_many_kinds_are_folded(norm):
    net = nn.Sequential(conv(), norm)
    randomise_norms(net)
    deployed = check(net, IMAGE)
    assert list(get_deployment(deployed).folded) == ["1"]
    assert type(deployed[1]) in (nn.Identity, nn.SiLU)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8, track_running_stats=False), nn.GroupNorm(2, 8)])
def test_norms_that_compute_statistics_are_left(norm):
    net = nn.Sequential(conv(), norm)
    assert check(net, IMAGE)[1].__class__ is type(norm)


class Adaptive(nn.Sequential):
    """Norms by the images at hand in evaluation mode as well."""

    def train(self, mode=True):
        super().train(mode)
        self[1].train()  # and returns nothing


@pytest.mark.parametrize("training", [True, False])
def test_norms_that_the_network_keeps_in_training_mode_are_left(training):
    net = Adaptive(conv(), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8))
    randomise_norms(net)
    net.train(training)
    deployed = deploy(net, example_inputs=IMAGE)
    assert list(get_deployment(deployed).folded) == ["3"]
    assert "keeps it in training mode" in get_deployment(deployed).left["1"]
    net.eval()
    torch.testing.assert_close(deployed(IMAGE), net(IMAGE))


@pytest.mark.parametrize(
    ("layer", "image"),
    [
        (nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1), IMAGE),
        (nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4, bias=False), IMAGE),
        (nn.Conv2d(8, 8, 3, groups=8), IMAGE),
        (nn.Linear(12, 8), torch.randn(3, 12)),
        (nn.Conv1d(8, 8, 3), torch.randn(2, 8, 20)),
    ],
    ids=["transposed", "transposed in groups", "depthwise", "linear", "1d"],
)
def test_other_layers_take_up_their_norm(layer, image):
    norm = nn.BatchNorm2d(8) if image.dim() == 4 else nn.BatchNorm1d(8)
    net = nn.Sequential(layer, norm)
    randomise_norms(net)
    assert isinstance(check(net, image)[1], nn.Identity)


@pytest.mark.parametrize("kind", [StdConv2dSame, ScaledStdConv2dSame])
@pytest.mark.parametrize("side", [12, 13])
def test_standardised_weights_become_constant(kind, side):
    image = torch.randn(2, 8, side, side)
    net = nn.Sequential(kind(8, 8, 3, stride=2), nn.ReLU(), kind(8, 8, 1))
    to_coconv_(net[0], (1, 2))
    deployed = check(net, image)
    assert {type(m) for m in deployed.modules() if list(m.parameters(recurse=False))} == {nn.Conv2d}
    assert get_deployment(deployed).constant == ("2",)
    larger = torch.randn(1, 8, 2 * side + 1, side)
    torch.testing.assert_close(deployed(larger), net(larger), rtol=0, atol=1e-5)


def test_parametrized_weights_become_constant():
    net = nn.Sequential(weight_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.BatchNorm2d(8))
    to_coconv_(net[0], (1, 2))
    randomise_norms(net)
    assert get_deployment(check(net, IMAGE)).folded == {"1": ("0",)}


class Halved(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, self.weight / 2, self.bias, self.stride, self.padding)


@register_coconv
class CoHalved(CoConv2d, Halved):
    def forward(self, input):
        return self._conv_forward(input, self.weight / 2, self.bias)


class Steered(nn.Conv2d):
    """Its kernels depend on what it sees."""

    def forward(self, input):
        return F.conv2d(input, self.weight * input.mean(), self.bias, self.stride, self.padding)


@register_coconv
class CoSteered(CoConv2d, Steered):
    def forward(self, input):
        return self._conv_forward(input, self.weight * input.mean(), self.bias)


def test_classes_that_users_register_are_written_out():
    net = nn.Sequential(Halved(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    to_coconv_(net[0], (1, 2))
    randomise_norms(net)
    assert type(check(net, IMAGE)[0]) is ConvLevels


def test_kernels_that_depend_on_the_image_are_left_with_the_reason():
    net = nn.Sequential(Steered(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    to_coconv_(net[0], (1, 2))
    deployed = deploy(net, example_inputs=IMAGE)
    report = get_deployment(deployed)
    assert "more than to convolve" in report.left["0"]
    assert "does more than to multiply" in report.left["1"]
    assert report.written_out == {}
    with torch.no_grad():
        assert relative(deployed(IMAGE), net.eval()(IMAGE)) < 1e-5


def doubled(conv, x):
    return 2 * type(conv).forward(conv, x)


@pytest.mark.parametrize("conv", [nn.Conv2d(8, 8, 3), CoConv2d(8, 8, 3, padding=1, levels=2)])
def test_a_forward_of_one_layers_own_is_kept(conv):
    net = nn.Sequential(conv, nn.BatchNorm2d(8)).eval()
    randomise_norms(net)
    net[0].forward = types.MethodType(doubled, net[0])
    deployed = deploy(net, example_inputs=IMAGE)
    with torch.no_grad():
        assert relative(deployed(IMAGE), net(IMAGE)) < 1e-5
    assert "1" in get_deployment(deployed).left


def test_a_norm_whose_forward_is_its_own_is_left():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    net[1].forward = types.MethodType(doubled, net[1])
    assert "does more than to scale" in get_deployment(check(net, IMAGE)).left["1"]


@pytest.mark.parametrize("factor", [0.9, 0.6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_numbers_hide_no_mistake(dtype, factor):
    """A network that reads a weight which folding changes."""
    net = Net(
        lambda self, x: self.norm(self.conv(x)) * self.conv.weight.abs().mean() / self.mean,
        conv=conv(),
        norm=nn.BatchNorm2d(8),
    )
    net.mean = float(net.conv.weight.abs().mean())
    net.norm.weight.data.fill_(factor)
    with pytest.raises(DeploymentError, match="would compute something else"):
        deploy(net.to(dtype), example_inputs=IMAGE.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_numbers_are_no_mistake(dtype):
    net = convert(timm.create_model("resnet18"), input_size=64)
    randomise_norms(net)
    deployed = deploy(net.to(dtype), example_inputs=torch.rand(1, 3, 64, 64).to(dtype))
    assert len(get_deployment(deployed).folded) == 20


def test_layers_and_norms_may_be_called_by_keyword():
    net = Net(lambda self, x: self.norm(input=self.conv(input=x)), conv=conv(), norm=nn.BatchNorm2d(8))
    randomise_norms(net)
    assert get_deployment(check(net, IMAGE)).folded == {"norm": ("conv",)}


def test_a_layer_within_vmap_is_deployed():
    net = Net(
        lambda self, x: torch.vmap(lambda image: self.norm(self.conv(image[None]))[0])(x),
        conv=conv(),
        norm=nn.BatchNorm2d(8),
    )
    check(net, IMAGE)


def test_a_merge_is_a_method_and_neither_a_module_nor_a_property():
    class Fusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fuse = CoConv2d(8, 8, 3, padding=1, levels=2)

        @property
        def reparameterize(self):
            raise RuntimeError("not built")

        def forward(self, x):
            return self.fuse(x)

    report = get_deployment(check(Fusing(), IMAGE))
    assert (report.merged, report.left) == ((), {})


class Factor:
    def __init__(self):
        self.factor = torch.tensor(2.0)

    def __call__(self, module, args, output):
        return self.factor * output

    def in_place(self, module, args, output):
        output.mul_(self.factor)


@pytest.mark.parametrize("hook", [lambda module, args, output: 2 * output, Factor(), Factor().in_place])
def test_a_hook_that_changes_what_a_convolution_gives_keeps_its_norm(hook):
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    net[0].register_forward_hook(hook)
    randomise_norms(net)
    deployed = deploy(net, example_inputs=IMAGE)
    with torch.no_grad():
        assert relative(deployed(IMAGE), net.eval()(IMAGE)) < 1e-5


def test_features_that_hooks_collect_before_a_convolution_are_there():
    features = timm.create_model("efficientnet_b0", features_only=True, feature_location="expansion").eval()
    convert(features, input_size=64)
    image = torch.randn(1, 3, 64, 64)
    deployed = deploy(features, input_size=64)
    with torch.no_grad():
        for found, expected in zip(deployed(image), features(image), strict=True):
            assert relative(found, expected) < 1e-5
    assert not any(isinstance(module, CoConv2d) for module in deployed.modules())
    assert len(get_deployment(deployed).left) == 5  # norms, behind the convolutions that are hooked


COPY_DOES_NOT_RUN = "the network runs, and the deployed one does not: its code may use"


def test_a_network_that_reads_the_statistics_of_its_norm_is_refused():
    net = Net(
        lambda self, x: self.norm(self.conv(x)) + self.norm.running_mean[:, None, None],
        conv=conv(),
        norm=nn.BatchNorm2d(8),
    )
    with pytest.raises(DeploymentError, match=f"{COPY_DOES_NOT_RUN}.*'Identity' object has no attribute"):
        deploy(net, example_inputs=IMAGE)


def test_a_network_that_reads_the_branches_of_a_merged_block_is_refused():
    block = timm.create_model("repvgg_a0").stages[0][1]
    channels = next(block.parameters()).shape[0]
    net = Net(lambda self, x: self.block(x) + self.block.conv_1x1(x), block=block)
    with pytest.raises(DeploymentError, match=f"{COPY_DOES_NOT_RUN}.*has no attribute 'conv_1x1'"):
        deploy(net, example_inputs=torch.randn(1, channels, 12, 12))


def test_a_network_that_takes_another_way_later_is_refused():
    net = Net(
        lambda self, x: self.norm(self.conv(x)) if hasattr(self.norm, "momentum") else self.conv(x) + 1,
        conv=conv(),
        norm=nn.BatchNorm2d(8),
    )
    with pytest.raises(DeploymentError, match=r"would not run norm as the network does: its code may use"):
        deploy(net, example_inputs=IMAGE)


def test_modules_that_a_network_also_keeps_in_a_list_are_replaced_there():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.lateral, self.norm = conv(), nn.BatchNorm2d(8)
            self.steps = [self.lateral, self.norm]

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    net = Pyramid()
    randomise_norms(net)
    deployed = check(net, IMAGE)
    assert [type(step) for step in deployed.steps] == [ConvLevels, nn.Identity]
    assert deployed.steps[0] is deployed.lateral


def test_an_activation_that_the_example_does_not_reach_stays():
    net = nn.Sequential(nn.Conv2d(8, 4, 3), BatchNormAct2d(4)).eval()
    net[1].running_mean.fill_(-300)
    net[1].running_var.fill_(100)
    deployed = check(net, IMAGE)
    assert relative(deployed(5000 * IMAGE), net(5000 * IMAGE)) < 1e-5


class Clamping(nn.BatchNorm2d):
    def __init__(self, channels, limit):
        super().__init__(channels)
        self.limit = limit

    def forward(self, x):
        return super().forward(x).clamp(-self.limit, self.limit)


class ClampingConv(nn.Conv2d):
    def __init__(self, *sizes, limit):
        super().__init__(*sizes)
        self.limit = limit

    def forward(self, x):
        return super().forward(x).clamp(-self.limit, self.limit)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 1, 1), BatchNormAct2d(1)),
        nn.Sequential(nn.Conv2d(8, 8, 3), Clamping(8, limit=8)),
        nn.Sequential(nn.Conv2d(8, 8, 3), Clamping(8, limit=65504)),
        nn.Sequential(ClampingConv(8, 8, 3, limit=30), nn.BatchNorm2d(8)),
        nn.Sequential(ClampingConv(8, 8, 3, limit=65504), nn.BatchNorm2d(8)),
    ],
    ids=["gate", "norm", "norm in half precision", "convolution", "convolution in half precision"],
)
@pytest.mark.parametrize("seed", range(3))
def test_what_shows_on_other_images_alone_is_kept(net, seed):
    randomise_norms(net, seed)
    torch.manual_seed(seed)
    deployed = deploy(net, example_inputs=IMAGE)
    for scale in (-1e6, -100, -1, 1, 100, 1e6):
        assert relative(deployed(scale * IMAGE), net.eval()(scale * IMAGE)) < 1e-4


@pytest.mark.parametrize("layer", [Conv2dSame(8, 8, 2, stride=2), Conv2dSame(8, 8, 3, stride=3)])
def test_dynamic_padding_that_the_example_does_not_need_stays(layer):
    if layer.kernel_size == (3, 3):
        to_coconv_(layer, (1, 2))
    net = nn.Sequential(layer, nn.BatchNorm2d(8))
    randomise_norms(net)
    deployed = check(net, IMAGE)
    for side in (13, 14, 16):
        image = torch.randn(1, 8, side, side)
        torch.testing.assert_close(deployed(image), net.eval()(image), rtol=0, atol=1e-4)


def test_what_computes_nothing_to_compare_is_refused():
    net = Net(lambda self, x: self.norm(self.conv(x))[:0], conv=conv(), norm=nn.BatchNorm2d(8))
    assert get_deployment(deploy(net, example_inputs=IMAGE)).folded  # its maps are compared, if not its outputs
    silent = Net(lambda self, x: self.conv(x[:0]), conv=conv())
    with pytest.raises(DeploymentError, match="holds no numbers to compare: give others"):
        deploy(silent, example_inputs=IMAGE)


def test_a_network_that_returns_no_number_is_not_compared_by_its_maps_alone():
    net = Net(lambda self, x: self.last(self.norm(self.conv(x))), conv=conv(), norm=nn.BatchNorm2d(8), last=conv())
    with torch.no_grad():
        net.last.weight.fill_(torch.nan)
    with pytest.raises(DeploymentError, match="what the network returns on these inputs holds no numbers to compare"):
        deploy(net, example_inputs=IMAGE)


def test_statements_of_a_graph_that_nothing_reads_stay():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            y.clamp_(max=50)
            return y

    deployed = deploy(fx.symbolic_trace(Clamped()), example_inputs=IMAGE)
    assert deployed(1000 * IMAGE).max() <= 50


def test_a_contextual_convolution_that_has_not_run_is_written_out():
    net = Net(lambda self, x: self.conv(x) if x.mean() < 100 else self.other(x), conv=conv(), other=conv())
    deployed = check(net, IMAGE)
    torch.testing.assert_close(deployed(IMAGE + 200), net(IMAGE + 200), rtol=1e-4, atol=1e-3)


def test_pruned_and_old_style_normalised_weights_become_constant():
    net = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 144, 4))
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.l1_unstructured(net[3], "weight", 0.5)
    randomise_norms(net)
    net(IMAGE)
    deployed = deploy(net, example_inputs=IMAGE)
    with torch.no_grad():
        assert relative(deployed(IMAGE), net.eval()(IMAGE)) < 1e-5
    assert set(get_deployment(deployed).constant) == {"3"}


@pytest.mark.parametrize(
    ("layer", "norm", "image"),
    [
        (nn.Linear(12, 8), nn.BatchNorm1d(5), torch.randn(3, 5, 12)),
        (nn.Linear(12, 5), nn.BatchNorm1d(5), torch.randn(3, 5, 12)),
        (nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), torch.randn(8, 20)[:, :10]),
    ],
)
def test_a_norm_along_another_dimension_is_left_with_the_reason(layer, norm, image):
    net = nn.Sequential(layer, norm)
    randomise_norms(net)
    assert "does not norm what 0 gives by output channel" in get_deployment(check(net, image)).left["1"]


@pytest.mark.parametrize("bare", [nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))])
def test_an_exported_norm_of_vectors_is_folded(bare):
    image = torch.randn(5, 8)
    randomise_norms(bare)
    graph = torch.export.export(bare.eval(), (image,)).module()
    torch.testing.assert_close(deploy(graph, example_inputs=image)(image), bare(image))


def test_a_block_that_two_parents_share_is_merged_once():
    block = timm.create_model("repvgg_a0").stages[0][1]
    net = nn.ModuleDict({"a": nn.Sequential(block), "b": nn.Sequential(block)})
    channels = next(block.parameters()).shape[0]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net["b"](self.net["a"](x))

    network = Twice()
    randomise_norms(network)
    deployed = check(network, torch.randn(1, channels, 12, 12))
    assert deployed.net["a"][0] is deployed.net["b"][0]
    assert get_deployment(deployed).merged == ("net.a.0",)


class Fusing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.conv, self.error = conv(), error

    def fuse(self):
        self.conv = None
        raise self.error

    def forward(self, x):
        return self.conv(x)


def test_a_merge_that_fails_is_undone_and_said():
    deployed = check(nn.Sequential(Fusing(RuntimeError("no branches"))), IMAGE)
    assert "no branches" in get_deployment(deployed).left["0"]


def test_parts_of_merged_blocks_may_compute_something_else():
    net = convert(timm.create_model("efficientvim_m1"), input_size=64)
    randomise_norms(net)
    assert get_deployment(check(net, torch.rand(1, 3, 64, 64))).merged


def test_a_root_that_merges_is_merged():
    block = timm.create_model("repvgg_a0").stages[0][1]
    randomise_norms(block)
    deployed = check(block, torch.randn(1, next(block.parameters()).shape[0], 12, 12))
    assert get_deployment(deployed).merged == ("",)


def test_code_that_asks_a_convolution_for_its_kind_still_runs():
    net = Net(
        lambda self, x: self.conv(x.to(self.conv.weight.dtype))[:, : self.conv.out_channels],
        conv=conv(),
    )
    check(net, IMAGE)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_code_that_computes_with_what_a_convolution_has_still_runs(groups, bias):
    def run(self, x):
        conv = self.conv
        options = {"padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
        assert conv.padding_mode == "zeros"
        return conv(x) + F.conv2d(x, conv.weight, conv.bias, conv.stride, **options)

    check(Net(run, conv=conv(dilations=(2, 3), padding=1, groups=groups, bias=bias)), IMAGE)


def test_a_copy_of_a_deployed_graph_knows_what_was_done():
    deployed = deploy(fx.symbolic_trace(nn.Sequential(conv(), nn.BatchNorm2d(8))), example_inputs=IMAGE)
    assert get_deployment(copy.deepcopy(deployed)) == get_deployment(deployed)


@pytest.mark.parametrize(
    "trace",
    [
        fx.symbolic_trace,
        lambda net: torch.export.export(net, (IMAGE,)).module(),
        lambda net: torch.export.export(net, (IMAGE,)).run_decompositions().module(),
    ],
    ids=["symbolic_trace", "export", "decomposed"],
)
@pytest.mark.parametrize("before", [True, False], ids=["converted before", "converted after"])
def test_graphs_are_deployed(trace, before):
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2),
        nn.BatchNorm2d(8),
    ).eval()
    randomise_norms(net)
    if before:
        to_coconv_(net[0], (1, 2)), to_coconv_(net[3], (1, 2))
    graph = trace(net)
    if not before:
        convert(graph, "uniform(2)", example_inputs=IMAGE, overrides={"*": 2})
    deployed = deploy(graph, example_inputs=IMAGE)
    with torch.no_grad():
        assert relative(deployed(IMAGE), graph(IMAGE)) < 1e-5
    functions = {str(node.target) for node in deployed.graph.nodes if node.op == "call_function"}
    assert not any("conv" in name or "norm" in name for name in functions)
    assert norms(deployed) == []
    assert len([m for m in deployed.modules() if isinstance(m, nn.Conv2d)]) == 4


def test_convolutions_that_are_plain_in_a_graph_are_not_counted_as_contextual():
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), conv()).eval()
    graph = torch.export.export(net, (IMAGE,)).module()
    said = get_deployment(deploy(graph, example_inputs=IMAGE)).summary()
    assert said.startswith("1 contextual convolutions written out as 2 plain ones; 1 norms folded")


def test_a_feature_extractor_of_torchvision_is_deployed_and_calibrated():
    extractor = create_feature_extractor(torchvision.models.resnet18(), ["layer1", "layer4"]).eval()
    convert(extractor, input_size=64)
    image = torch.randn(2, 3, 64, 64)
    deployed = deploy(extractor, input_size=64)
    assert len(get_deployment(deployed).written_out) == 8
    for name, features in extractor(image).items():
        assert relative(deployed(image)[name], features) < 1e-5
    assert calibrate(extractor, image).solved


def test_a_weight_of_a_graph_that_is_an_input_stays_one():
    class Steering(nn.Module):
        def forward(self, image, weight):
            return coconv2d(image, weight, padding=1, dilations=(1, 2), splits=(4, 4))

    graph, weight = fx.symbolic_trace(Steering()), torch.randn(8, 8, 3, 3)
    deployed = deploy(graph, example_inputs=(IMAGE, weight))
    torch.testing.assert_close(deployed(IMAGE, -weight), graph(IMAGE, -weight))


@pytest.mark.parametrize(
    "name",
    ["resnet18", "test_efficientnet", "test_nfnet", "repvgg_a0", pytest.param("densenet121", marks=pytest.mark.long)],
)
def test_a_converted_network_is_scripted_after_it_was_deployed(name):
    net = convert(timm.create_model(name), input_size=64)
    randomise_norms(net)
    image = torch.rand(1, 3, 64, 64)
    deployed = check(net, image)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(deployed)(image), deployed(image))


def test_scripting_a_converted_network_names_deploy_and_changes_nothing(net, image):
    modules = list(convert(net, input_size=32).modules())
    with pytest.raises(TypeError, match=r"script what coconv_surgery.deploy\(\) makes of the network"):
        torch.jit.script(net)
    assert list(net.modules()) == modules


def test_the_authors_form_is_deployed():
    net = timm.create_model("coresnet50.iduta")
    randomise_norms(net)
    deployed = check(net, torch.rand(1, 3, 64, 64))
    assert len(get_deployment(deployed).folded) == 49
    assert set(get_deployment(deployed).left) == {"layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"}


def test_nothing_of_a_conversion_stays(net, image):
    convert(net, input_size=32)
    guard(net)
    deployed = deploy(net, example_inputs=image)
    assert get_plan(deployed).converted == ()
    assert not any("coconv" in key for key in deployed.state_dict())
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert not deployed.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_stay(dtype):
    net = nn.Sequential(conv(), nn.BatchNorm2d(8)).to(dtype)
    deployed = deploy(net, example_inputs=IMAGE.to(dtype))
    assert {parameter.dtype for parameter in deployed.parameters()} == {dtype}


def test_a_plain_network_is_deployed_too(net, image):
    assert get_deployment(check(net, image)).folded == {"norm": ("stem",)}


def test_a_deployed_network_is_deployed_again(net, image):
    deployed = check(convert(net, input_size=32), image)
    again = check(deployed, image)
    assert get_deployment(again).folded == {}


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(
    "trace", [lambda net: net, fx.symbolic_trace, lambda net: torch.export.export(net, (IMAGE,)).module()]
)
def test_the_levels_of_a_deployed_network_are_not_split_once_more(groups, trace):
    net = nn.Sequential(conv(), nn.ReLU(), conv(groups=groups), nn.ReLU(), nn.Conv2d(8, 4, 1))
    plan = plan_conversion(trace(deploy(net, example_inputs=IMAGE)), example_inputs=IMAGE)
    assert not plan.converted
    assert sum(row.reason_key is Reason.LEVEL for row in plan.rows) == 4


def test_random_numbers_stay_in_order(net, image):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    deploy(net, example_inputs=image)
    assert torch.rand(1) == expected


def test_a_network_of_one_s_own_has_the_size_that_its_conversion_was_planned_for():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 12 * 20, 4))
    converted = convert(net, input_size=(12, 20))
    assert list(get_deployment(deploy(converted)).written_out) == ["0"]
    assert receptive_fields(converted).input_size == (12, 20)
    assert effective_receptive_field(converted, images=2).weight.shape == (12, 20)
    assert convert(converted, "uniform(3)") is converted
    assert get_plan(converted).input == "1×3×12×20"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: deploy("resnet18"), TypeError, "model must be a torch.nn.Module, not str"),
        (lambda: deploy(nn.Conv2d(3, 8, 3)), ValueError, "does not say how large its input is"),
        (lambda: deploy(nn.Conv2d(3, 8, 3), input_size=2), DeploymentError, "does not run on the inputs to deploy it"),
        (lambda: deploy(nn.Conv2d(3, 8, 3), input_size=8000), ValueError, "too large to run the network on"),
        (
            lambda: deploy(nn.Conv2d(3, 8, 3, device="meta"), input_size=32),
            DeploymentError,
            "the network is on the meta",
        ),
        (lambda: deploy(conv(), example_inputs=IMAGE.to("meta")), DeploymentError, "inputs are on the meta device"),
        (lambda: get_deployment(nn.ReLU()), ValueError, r"was not deployed: deploy\(\) returns"),
        (lambda: deploy(torch.jit.script(nn.ReLU())), TypeError, "is scripted"),
    ],
)
def test_bad_input_gets_one_message(call, error, message):
    with pytest.raises(error, match=message):
        call()
