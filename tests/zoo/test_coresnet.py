"""CoResNet as a timm network: its levels, its equality with timm's, and timm's ways of building and loading."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from launching import python
from sampling import few
from zoo.authors_resnet import authors_resnet

import coconv_surgery as cs
from coconv_surgery.paper.counting import count

NAMES = [*timm.list_models("coresne*t*"), *timm.list_models("coseresne*t*")]
STAGES = ("layer1", "layer2", "layer3", "layer4")
# Table 1: splits by width
SPLITS = {64: (16, 16, 16, 16), 128: (64, 32, 32), 256: (128, 128), 512: (512,)}
PARAMETERS = {50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def on_meta(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def dilations(model, attribute="conv2"):
    """Of every block, stage by stage."""
    convs = [[getattr(block, attribute) for block in model.get_submodule(stage)] for stage in STAGES]
    return [[getattr(conv, "dilations", conv.dilation) for conv in stage] for stage in convs]


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64)


def test_importing_the_package_gives_timm_the_names():
    code = "import timm, coconv_surgery; print(timm.is_model('coresnet50'), 'mmdet' in __import__('sys').modules)"
    assert python(code).stdout == "True False\n"


def test_timm_lists_the_architectures():
    expected = [
        *("coresnet18", "coresnet26", "coresnet34", "coresnet50", "coresnet101", "coresnet152"),
        *("coresnext50_32x4d", "coresnext101_32x8d"),
        *("coseresnet18", "coseresnet34", "coseresnet50", "coseresnet101", "coseresnet152"),
        *("coseresnext50_32x4d", "coseresnext101_32x8d"),
    ]
    assert expected == NAMES
    assert timm.list_models(module="resnet", filter="co*") == []


@pytest.mark.parametrize("name", few(NAMES, 5))
def test_each_is_timms_network_with_the_stages_3x3_convs_split(name):
    model, plain = on_meta(name), on_meta(name.removeprefix("co"))
    keys, plain_keys = ({key: t.shape for key, t in m.state_dict().items()} for m in (model, plain))
    assert list(keys.items()) == list(plain_keys.items())
    image = torch.empty(1, 3, 224, 224, device="meta")
    assert count(model, image) == count(plain, image)
    split = {path for path, module in model.named_modules() if isinstance(module, cs.CoConv2d)}
    kernels = {path: module.kernel_size for path, module in plain.named_modules() if isinstance(module, nn.Conv2d)}
    assert split == {path for path, kernel in kernels.items() if kernel == (3, 3) and path[:6] in STAGES[:3]}


@pytest.mark.parametrize("depth", PARAMETERS)
def test_levels_and_parameters_are_table_1s(depth):
    model = on_meta(f"coresnet{depth}")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[depth]
    for stage in STAGES:
        for block in model.get_submodule(stage):
            conv, levels = block.conv2, len(SPLITS[block.conv2.out_channels])
            found = (conv.dilations, conv.splits) if levels > 1 else ((1,), (conv.out_channels,))
            assert found == (tuple(range(1, levels + 1)), SPLITS[conv.out_channels])


@pytest.mark.parametrize("policy", ["resolution", "stage"])
def test_the_policies_agree_with_table_1(policy):
    assert cs.get_plan(on_meta("coresnet50")).diff(cs.get_plan(on_meta("coresnet50", policy=policy))) == []


def test_one_level_everywhere_is_timms_resnet50_bit_for_bit(image):
    torch.manual_seed(0)
    plain = timm.create_model("resnet50", zero_init_last=False).eval()
    torch.manual_seed(0)
    model = timm.create_model("coresnet50", levels=(1, 1, 1, 1), zero_init_last=False).eval()
    assert torch.equal(model(image), plain(image))
    assert not any(isinstance(module, cs.CoConv2d) for module in model.modules())


def test_table_1s_levels_compute_something_else(image):
    plain = timm.create_model("resnet50", zero_init_last=False).eval()
    model = timm.create_model("coresnet50").eval()
    model.load_state_dict(plain.state_dict(), strict=True)
    assert (model(image) - plain(image)).norm() > 0.01 * plain(image).norm()


def test_a_torchvision_state_dict_loads(image):
    plain = torchvision.models.resnet50().eval()
    model = timm.create_model("coresnet50", levels=(1, 1, 1, 1)).eval()
    for network in (model, timm.create_model("coresnet50")):
        network.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(model(image), plain(image))


@pytest.mark.parametrize("depth", few(PARAMETERS, 1))
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("stage(2,2,2,1)", [(1, 2), (1, 2), (1, 2), (1, 1)]),
        ("stage(3,3,2,1)", [(1, 2, 3), (1, 2, 3), (1, 2), (1, 1)]),
        ("stage(3,3,3,3)", [(1, 2, 3)] * 4),
        ("top(4,3,2,1)", [(4,), (3,), (2,), (1, 1)]),
    ],
)
def test_table_3s_policies_give_every_block_of_a_stage_its_levels(depth, policy, expected):
    found = dilations(on_meta(f"coresnet{depth}", policy=policy))
    assert [set(stage) for stage in found] == [{stage} for stage in expected]


def test_five_levels_at_448():
    by_policy = on_meta("coresnet50", policy="resolution(5)", img_size=448)
    assert [stage[0] for stage in dilations(by_policy)] == [(1, 2, 3, 4, 5), (1, 2, 3, 4), (1, 2, 3), (1, 2)]
    assert by_policy.layer1[0].conv2.splits == (16, 16, 16, 8, 8)
    assert cs.get_plan(by_policy).diff(cs.get_plan(on_meta("coresnet50", levels=(5, 4, 3, 2)))) == []


# -- Output stride 8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_dilation", "stage_3", "stage_4"),
    [
        ("multiply", [(1, 2)] + [(2, 4)] * 5, [(2, 2), (4, 4), (4, 4)]),
        ("ignore", [(1, 2)] * 6, [(1,)] * 3),
    ],
)
def test_levels_at_output_stride_8(base_dilation, stage_3, stage_4):
    model = on_meta("coresnet50", output_stride=8, base_dilation=base_dilation)
    assert dilations(model) == [[(1, 2, 3, 4)] * 3, [(1, 2, 3)] * 4, stage_3, stage_4]
    image = torch.empty(1, 3, 224, 224, device="meta")
    cost = count(model, image)
    assert cost == count(on_meta("resnet50", output_stride=8), image)
    assert cost.parameters == PARAMETERS[50]
    assert model.forward_features(image).shape == (1, 2048, 28, 28)


# -- timm's interface ---------------------------------------------------------------------------------------------


def test_features_only_has_the_converted_convs_and_timms_maps(image):
    arguments = {"features_only": True, "output_stride": 16, "in_chans": 4, "out_indices": (1, 2, 3, 4)}
    model, plain = (timm.create_model(name, **arguments).eval() for name in ("coresnet50", "resnet50"))
    image = torch.randn(2, 4, 64, 64)
    assert [feature.shape for feature in model(image)] == [feature.shape for feature in plain(image)]
    assert model.feature_info.get_dicts() == plain.feature_info.get_dicts()
    assert sum(isinstance(module, cs.CoConv2d) for module in model.modules()) == 13


def test_forward_intermediates_and_features_agree(image):
    model = timm.create_model("coresnet26").eval()
    last, maps = model.forward_intermediates(image, indices=(1, 4))
    assert [feature.shape[1:] for feature in maps] == [(256, 16, 16), (2048, 2, 2)]
    assert torch.equal(last, model.forward_features(image))
    assert torch.equal(maps[1], last)
    assert torch.equal(model.forward_head(last), model(image))


def test_the_classifier_can_be_reset(image):
    model = timm.create_model("coresnet18", num_classes=10, drop_path_rate=0.1, drop_rate=0.1)
    assert model(image).shape == (2, 10)
    model.reset_classifier(7, "max")
    assert model(image).shape == (2, 7)
    model.reset_classifier(0)
    assert model(image).shape == (2, 512)


def test_default_cfg_is_timms_under_the_new_name():
    model, plain = on_meta("coresnet50"), on_meta("resnet50")
    assert model.default_cfg == {**plain.default_cfg, "architecture": "coresnet50"}
    assert model.default_cfg["hf_hub_id"].startswith("timm/resnet50.")
    assert on_meta("coresnet50.tv_in1k").default_cfg["hf_hub_id"] == "timm/resnet50.tv_in1k"


def test_pretrained_starts_from_timms_weights_of_resnet50(tmp_path):
    plain = timm.create_model("resnet50", zero_init_last=False)
    torch.save(plain.state_dict(), tmp_path / "resnet50.pth")
    overlay = {"file": str(tmp_path / "resnet50.pth")}
    model = timm.create_model("coresnet50", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, in_chans=1)
    mine, theirs = model.state_dict(), plain.state_dict()
    adapted = {"conv1.weight", "fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items() if name not in adapted)
    torch.testing.assert_close(mine["conv1.weight"], theirs["conv1.weight"].sum(1, keepdim=True))
    assert model.layer1[0].conv2.dilations == (1, 2, 3, 4)


def test_gradients_reach_every_parameter(image):
    model = timm.create_model("coresnet50.iduta", drop_path_rate=0.01, zero_init_last=False)
    model.set_grad_checkpointing()
    model(image).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


# -- The authors' form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coresnet50", "coresnet101", "coresnet152"])
def test_iduta_normalises_after_the_addition_at_each_stages_end(name):
    model = on_meta(f"{name}.iduta")
    assert model.default_cfg["tag"] == "iduta"
    for stage in STAGES:
        *others, last = map(type, model.get_submodule(stage))
        assert last.__name__ == "NormAfterAddBottleneck"
        assert {cls.__name__ for cls in others} == {"Bottleneck"}


def test_a_fresh_one_does_not_start_blind(image):
    model = timm.create_model("coresnet50.iduta").eval()
    model.init_weights(zero_init_last=True)
    assert model.forward_features(image).std() > 0.01


def test_it_differs_from_the_papers_form_in_the_order_alone(image):
    theirs = authors_resnet().state_dict()
    released, paper = (timm.create_model("coresnet50", norm_after_add=after).eval() for after in (True, False))
    released.load_state_dict(theirs)
    paper.load_state_dict(released.state_dict())
    assert (released(image) - paper(image)).norm() > 0.01 * paper(image).norm()
    assert list(released.state_dict()) == list(paper.state_dict())


def test_copies_and_pickles_compute_the_same(image, tmp_path):
    model = timm.create_model("coresnet50.iduta", num_classes=5).eval()
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(image), model(image))


def test_surgery_sees_and_reverts_it(image):
    torch.manual_seed(0)
    plain = timm.create_model("resnet50", zero_init_last=False).eval()
    torch.manual_seed(0)
    model = timm.create_model("coresnet50", zero_init_last=False).eval()
    assert len(cs.get_plan(model).converted) == 13
    assert torch.equal(cs.revert(model)(image), plain(image))


# -- Bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (4, 3, 2)}, r"levels=\(4, 3, 2\) must be 4 numbers"),
        ({"levels": 4}, "levels=4 must be 4 numbers"),
        ({"levels": (4, 3, 2, 0)}, "must be 4 numbers of at least 1"),
        ({"levels": (65, 3, 2, 1)}, r"levels=\(65, 3, 2, 1\): stage 1 cannot have 65 levels: 65 levels need at least"),
        ({"levels": (1, 1, 1, 1), "policy": "stage"}, "leave out levels="),
        ({"base_dilation": "ignore", "policy": "stage"}, "leave out levels= and base_dilation="),
        ({"base_dilation": "add"}, "base_dilation='add': choose 'multiply' or 'ignore'"),
        ({"policy": "stages"}, "did you mean 'stage'"),
        ({"policy": "stage(3,0)"}, r"stages=\(3, 0\)"),
        ({"policy": "stage()"}, r"unknown policy 'stage\(\)'"),
        ({"policy": "uniform(3,2)"}, "uniform takes one number"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta("coresnet50", **arguments)


def test_basic_blocks_have_no_authors_form():
    with pytest.raises(ValueError, match="norm_after_add is for bottleneck blocks"):
        on_meta("coresnet18", norm_after_add=True)
