"""What names a network on the command line."""

import sys

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

import coconv_surgery as cs
from coconv_cli.options import read_size
from coconv_surgery.cli import targets
from coconv_surgery.mmengine.paths import config_path

OWN = """
import torch.nn as nn

class Network(nn.Sequential):
    def __init__(self, channels=8, pretrained=False):
        super().__init__(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 4, 1))

def make_text():
    return "network"

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "own_networks:Network"


def test_a_name_of_timms_takes_its_arguments():
    network = targets.build("resnet18", {"num_classes": 7, "in_chans": 1})
    assert network.fc.out_features == 7
    assert network.conv1.in_channels == 1


def test_a_folder_of_the_hub_is_a_target(tmp_path):
    model = cs.convert(timm.create_model("test_resnet"))
    timm.models.save_for_hf(model, tmp_path / "folder", **cs.hub_arguments(model))
    network = targets.build(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert cs.get_plan(network) == cs.get_plan(model)


@pytest.mark.parametrize("name", ["resnet18", "fcn_resnet50"])
def test_a_name_of_torchvisions_downloads_nothing(name):
    assert type(targets.build(f"torchvision/{name}", {"num_classes": 5})).__module__.startswith("torchvision")


def test_a_factory_of_ones_own_is_called_with_its_arguments(own):
    assert targets.build(own, {"channels": 6})[0].out_channels == 6


def test_plan_takes_a_factory_and_a_size_with_channels(coconv, own):
    code, out, err = coconv("plan", own, "--arg", "channels=6", "--input-size", "1x20x32")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("0 ")]
    assert "1 → 6" in line
    assert "20×32" in line


def test_plan_takes_torchvisions_networks(coconv):
    code, out, _ = coconv("plan", "torchvision/resnet18", "--input-size", "64x96")
    assert code == 0
    assert "layer1.0.conv1  64 → 64    16×24  3" in out


def test_plan_takes_a_config_at_the_size_of_its_pipeline(coconv):
    config = config_path("ssd/ssd300_r50_coco.py")
    code, out, _ = coconv("plan", config)
    assert code == 0
    assert "backbone.layer1.0.conv2" in out
    assert "75×75" in out
    code, out, _ = coconv("plan", config, "--input-size", "320x320")
    assert code == 0
    assert "80×80" in out


def test_convert_writes_the_network_of_a_factory(coconv, own, tmp_path):
    torch.manual_seed(0)
    weights = targets.build(own)
    torch.save(weights.state_dict(), tmp_path / "own.pth")
    options = ("--weights", tmp_path / "own.pth", "--input-size", "1x16x16", "-o", tmp_path / "out.safetensors")
    done = coconv("convert", own, *options)
    assert done.code == 0, done.err
    loaded = cs.load_converted(targets.build(own), tmp_path / "out.safetensors")
    assert torch.equal(loaded[0].weight, weights[0].weight)
    assert loaded[0].dilations == (1, 2, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "an empty name names no network: give a name of timm's"),
        ("resnet5", "timm has no model 'resnet5': did you mean 'resnet50'"),
        ("xqzw", r"timm has no model 'xqzw': give a name of timm's \(or hf_hub:… or local-dir:…\), torchvision/NAME"),
        ("torchvision/resnet1", "torchvision has no model 'resnet1': did you mean 'resnet1"),
        ("no_such_module:make", "No module named 'no_such_module'. It is read as package.module:factory; else give"),
        ("own_networks:missing", "has no attribute 'missing'. It is read as package.module:factory"),
        ("own_networks:number", "own_networks:number is not a function or a class, but int"),
        ("own_networks:make_text", "own_networks:make_text makes str, not a torch.nn.Module"),
        ("own_networks.py", "own_networks.py is not the config of a model"),
        ("none.py", "none.py: there is no such config"),
        (
            "weights.pth",
            "weights.pth is a file that does not say of which network its weights are",
        ),
    ],
)
def test_a_target_that_names_no_network_is_one_message(own, tmp_path, target, message):
    (tmp_path / "weights.pth").touch()
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        targets.build(target)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def make(:", "SyntaxError: invalid syntax"),
        ("nowhere", "NameError: name 'nowhere' is not defined"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("class Own(Exception): pass\ndef make(): raise Own('one\\ntwo')", "cannot be built: Own: one"),
        ("def make(): raise SystemExit('bye')", "cannot be built: SystemExit: bye"),
    ],
)
def test_whatever_a_factory_raises_is_one_line(coconv, tmp_path, monkeypatch, code, message):
    (tmp_path / "broken_networks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_networks", raising=False)
    done = coconv("plan", "broken_networks:make", "--input-size", 32)
    assert done.code == 1
    assert "broken_networks:make" in done.err
    assert message in done.err
    assert done.err.count("\n") <= 1


@pytest.fixture
def ours(coconv, tmp_path):
    """A file that the command wrote."""
    path = tmp_path / "ours.safetensors"
    done = coconv("convert", "test_resnet", "--policy", "stage", "--arg", "num_classes=7", "-o", path)
    assert done.code == 0, done.err
    return path


def test_a_file_of_ours_is_a_target(ours, coconv):
    network = targets.build(str(ours))
    assert network.num_classes == 7
    assert cs.get_plan(network) == cs.read_plan(ours)
    done = coconv("plan", ours)
    assert done.out == f"{cs.read_plan(ours).table()}\n{cs.read_plan(ours).summary()}\n"
    assert "GFLOPs" in coconv("flops", ours).out


@pytest.mark.parametrize("command", ["plan", "flops"])
def test_weights_of_a_converted_network_tell_what_became_of_it(command, ours, coconv):
    done = coconv(command, "test_resnet", "--arg", "num_classes=7", "--weights", ours)
    assert done.code == 0, done.err
    assert done.out == coconv(command, ours).out
    assert "do not fit ResNet" in coconv(command, "test_resnet", "--weights", ours).err


def test_a_file_of_ours_stays_one_when_it_is_converted_anew(ours, coconv, tmp_path):
    again = tmp_path / "again.safetensors"
    assert coconv("convert", ours, "--policy", "top", "-o", again).code == 0
    assert cs.get_plan(targets.build(str(again))).policy == "top"


@pytest.mark.parametrize(
    "network",
    [
        {"target": "os:system", "arguments": {"command": "true"}},
        {"target": "local-dir:elsewhere"},
        {"target": "coconv_converted", "arguments": {"network": "local-dir:elsewhere", "plan": ""}},
        {"target": "test_resnet", "arguments": {"checkpoint_path": "other.pth"}},
        {"target": "torchvision/resnet18", "arguments": {"weights": "DEFAULT"}},
    ],
)
def test_a_file_names_no_code_and_no_other_file(tmp_path, network):
    path = tmp_path / "net.safetensors"
    cs.save_converted(cs.convert(timm.create_model("test_resnet")), path, network=network)
    with pytest.raises(ValueError, match="if you trust it, name that as the TARGET"):
        targets.build(str(path))


def test_a_file_that_asks_for_another_size_than_it_holds_costs_no_memory(tmp_path, coconv):
    path = tmp_path / "net.safetensors"
    network = {"target": "test_resnet", "arguments": {"num_classes": 10**12}}  # 384 TB
    cs.save_converted(cs.convert(timm.create_model("test_resnet")), path, network=network)
    assert "do not fit ResNet: 2 of another shape, as fc.weight" in coconv("plan", path).err


def test_a_network_that_computes_with_tensors_when_it_is_built_is_a_target_of_a_file(tmp_path):
    path, network = tmp_path / "net.safetensors", {"target": "torchvision/regnet_x_400mf"}
    cs.save_converted(cs.convert(targets.build(network["target"]), input_size=64), path, network=network)
    assert cs.plan_of(path) == cs.get_plan(targets.build(str(path)))


WITHIN_ITSELF = []
WITHIN_ITSELF.append(WITHIN_ITSELF)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"target": 3}, "network: target"),
        ({"target": "resnet18", "arguments": {"widths": WITHIN_ITSELF}}, "network: arguments: a file has place for"),
        ({"name": "resnet18"}, "network has no key 'name'"),
        ({"target": "resnet18", "arguments": {"act_layer": nn.ReLU}}, "network: arguments: a file has place for"),
        ("resnet18", "network must be a dict of target and arguments"),
    ],
)
def test_what_a_file_is_told_of_its_network_is_checked_first(tmp_path, network, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cs.save_converted(nn.Conv2d(3, 8, 3), tmp_path / "net.safetensors", network=network)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", [("plan",), ("convert", "-o", "again.safetensors")])
def test_the_size_of_the_input_asks_for_no_other_plan(ours, coconv, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    command, *options = what
    done = coconv(command, ours, "--input-size", 96, *options)
    assert done.code == 0, done.err
    assert cs.read_plan(ours).summary() in done.out
    assert command == "plan" or cs.read_plan("again.safetensors") == cs.read_plan(ours)


def test_a_folder_of_a_converted_network_keeps_its_plan(coconv, tmp_path):
    model = cs.convert(timm.create_model("test_resnet"), "stage(2,2,2,1)")
    timm.models.save_for_hf(model, tmp_path / "folder", **cs.hub_arguments(model))
    output = tmp_path / "out.safetensors"
    assert coconv("convert", f"local-dir:{tmp_path / 'folder'}", "--pretrained", "-o", output).code == 0
    assert cs.read_plan(output) == cs.get_plan(model)


def test_weights_that_get_other_levels_than_they_were_trained_at_are_told(ours, coconv, tmp_path):
    done = coconv("convert", ours, "--policy", "top", "-o", tmp_path / "again.safetensors")
    assert "coconv: the weights were trained at other levels: fine-tune them" in done.err


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("torchvision/resnet18", {"weights": "nosuch"}, "'torchvision/resnet18' cannot be built with weights='nosuch'"),
        ("resnet18", {"foo": 1}, "'resnet18' cannot be built with foo=1: TypeError"),
        ("test_resnet", {"act_layer": "nosuch"}, "'test_resnet' cannot be built with act_layer='nosuch'"),
    ],
)
def test_arguments_that_do_not_suit_are_named(target, arguments, message):
    with pytest.raises(ValueError, match=message):
        targets.build(target, arguments)


def test_a_folder_is_not_taken_for_a_name(tmp_path):
    with pytest.raises(ValueError, match="is a folder: give local-dir:"):
        targets.build(str(tmp_path))


def test_a_config_takes_no_arguments(own):
    with pytest.raises(ValueError, match=r"own_networks.py is a config, which says all of its network"):
        targets.build("own_networks.py", {"channels": 3})


@pytest.mark.parametrize("pair", ["channels", "=3", "a b=3"])
def test_an_argument_that_is_no_pair_is_named(pair):
    with pytest.raises(ValueError, match=f"--arg {pair}: give it as key=value, such as num_classes=10"):
        targets.read_arguments([pair])


@given(st.lists(st.integers(1, 999), min_size=1, max_size=3), st.sampled_from("x,X×"))
def test_a_size_is_sides_between_crosses_or_commas(sides, cross):
    found = read_size(cross.join(map(str, sides)))
    assert found == (sides[0] if len(sides) == 1 else tuple(sides))


def test_a_converted_network_is_called_with_what_it_was_planned_for():
    network = cs.convert(timm.create_model("test_resnet"), input_size=96)
    assert str(targets.inputs_of(network, "test_resnet", None)) == "1×3×96×96"
    assert str(targets.inputs_of(network, "test_resnet", 64)) == "1×3×64×64"


def test_a_network_without_a_size_wants_one_in_the_words_of_the_command_line():
    with pytest.raises(ValueError, match="own:make does not say how large its input is: give --input-size 224"):
        targets.inputs_of(nn.Sequential(nn.Conv2d(3, 8, 3)), "own:make", None)


@pytest.mark.parametrize("name", ["net.safetensors", "resnet18.safetensors", "runs/last.pth.tar"])
def test_a_file_that_is_not_there_is_no_model_of_timms(name):
    with pytest.raises(FileNotFoundError, match=f"there is no file '{name}'"):
        targets.build(name)
