"""Converted networks in the folders that timm writes for the hub, and in the files that it loads."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint, save_for_hf

import coconv_surgery as cs


@pytest.fixture
def model():
    return cs.convert(timm.create_model("resnet18", num_classes=5).eval())


IMAGE = torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch"])
def test_a_folder_rebuilds_the_converted_network(model, tmp_path, safe, recwarn):
    save_for_hf(model, tmp_path, safe_serialization=safe, **cs.hub_arguments(model))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(IMAGE), model(IMAGE))
    assert cs.get_plan(again) == cs.get_plan(model)
    assert not [w for w in recwarn if issubclass(w.category, cs.PlainWeightsWarning)]


def test_other_classes_and_channels_can_be_asked_for(model, tmp_path):
    save_for_hf(model, tmp_path, **cs.hub_arguments(model))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1)
    assert again.fc.out_features == 3
    assert again.conv1.in_channels == 1
    assert torch.equal(again.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
    assert again.layer1[0].conv1.dilations == model.layer1[0].conv1.dilations


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("test_resnet", {"in_chans": 1}),
        ("resnetv2_50x1_bit", {"num_classes": 0}),
        ("test_efficientnet", {"features_only": True}),
    ],
    ids=["channels of a contextual stem", "a classifier that convolves", "features before the last convolution"],
)
def test_what_was_asked_for_may_change_or_leave_out_convolutions(network, arguments, tmp_path):
    model = cs.convert(timm.create_model(network, num_classes=5), cs.UniformPolicy(2), input_size=64)
    save_for_hf(model, tmp_path, **cs.hub_arguments(model))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **arguments)
    levels = [{row.name: row.dilations for row in cs.get_plan(net).converted} for net in (again, model)]
    assert levels[0] == levels[1]


def test_what_a_folder_rebuilt_can_be_converted_otherwise_and_saved_again(model, tmp_path):
    save_for_hf(model, tmp_path / "a", **cs.hub_arguments(model))
    again = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    cs.convert(again, "stage")
    save_for_hf(again, tmp_path / "b", **cs.hub_arguments(again))
    third = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True)
    assert cs.get_plan(third) == cs.get_plan(again) != cs.get_plan(model)


def test_saved_again_without_the_arguments_it_does_not_load(model, tmp_path):
    save_for_hf(model, tmp_path / "a", **cs.hub_arguments(model))
    again = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    save_for_hf(again, tmp_path / "b")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True)


def test_coresnets_need_no_arguments(tmp_path):
    model = timm.create_model("coresnet18", levels=(2, 2, 2, 1), num_classes=4).eval()
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(IMAGE), model(IMAGE))


def test_a_network_that_timm_did_not_build_is_refused(net):
    with pytest.raises(ValueError, match="timm did not build TinyNet"):
        cs.hub_arguments(cs.convert(net, input_size=32))


def test_a_guarded_network_is_refused(model):
    with pytest.raises(ValueError, match="take it out by guard"):
        cs.hub_arguments(cs.guard(model))


@pytest.mark.parametrize("kind", ["torch", "entry", "save_converted", "save_converted, wrapped"])
def test_a_checkpoint_path_of_other_levels_is_refused(model, tmp_path, kind):
    other = timm.create_model("coresnet18", levels=(2, 2, 2, 1))
    path = tmp_path / ("net.safetensors" if "save_converted" in kind else "net.pth")
    if "save_converted" in kind:
        cs.save_converted(torch.nn.DataParallel(other) if "wrapped" in kind else other, path)
    else:
        state = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
        state = torch.nn.ModuleDict({"module": other}).state_dict() if kind == "entry" else other.state_dict()
        torch.save({"state_dict": state} if kind == "entry" else state, path)
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv1: dilations \(1, 2, 3, 4\) .* the weights come from"):
        timm.create_model("coresnet18", checkpoint_path=path)
    again = timm.create_model("coresnet18", levels=(2, 2, 2, 1), checkpoint_path=path)
    assert torch.equal(again.conv1.weight, other.conv1.weight)


def test_a_checkpoint_path_that_does_not_say_is_warned_of(tmp_path):
    model = timm.create_model("coresnet18")
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    with pytest.warns(cs.PlainWeightsWarning, match="do not say"):
        load_checkpoint(model, str(tmp_path / "net.safetensors"))
