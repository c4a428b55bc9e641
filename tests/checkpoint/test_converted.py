"""A converted network on disk."""

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import coconv_surgery as cs


@pytest.fixture
def saved(net, tmp_path):
    cs.convert(net, input_size=32)
    cs.save_converted(net, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_a_fresh_network_becomes_the_saved_one(net, image, saved):
    fresh = type(net)().eval()
    assert cs.load_converted(fresh, saved) is fresh
    assert torch.equal(fresh(image), net(image))
    assert cs.get_plan(fresh) == cs.get_plan(net) == cs.read_plan(saved)


def test_the_file_is_plain_safetensors(net, saved):
    weights = load_file(saved)
    assert weights.keys() == net.state_dict().keys()


def test_shared_tensors_are_written_once_and_come_back_shared(tmp_path):
    def build():
        conv = nn.Conv2d(4, 4, 3, padding=1)
        return nn.Sequential(conv, conv, nn.Conv2d(4, 2, 1))

    model = cs.convert(build(), input_size=(4, 16, 16))
    cs.save_converted(model, tmp_path / "tied.safetensors")
    assert len(load_file(tmp_path / "tied.safetensors")) == 4
    fresh = cs.load_converted(build(), tmp_path / "tied.safetensors")
    assert fresh[0] is fresh[1]
    assert torch.equal(fresh(torch.ones(1, 4, 9, 9)), model(torch.ones(1, 4, 9, 9)))


def test_a_file_without_a_plan_is_refused(net, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="holds no plan"):
        cs.load_converted(net, tmp_path / "plain.safetensors")


def test_a_truncated_file_is_refused(net, saved):
    saved.write_bytes(saved.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        cs.load_converted(net, saved)


def test_weights_of_another_network_are_refused_before_anything_changes(net, saved):
    wider = type(net)()
    wider.head = nn.Linear(6, 7)
    weight = wider.stem.weight.clone()
    with pytest.raises(ValueError, match=r"do not fit TinyNet: 2 of another shape, as head\.bias"):
        cs.load_converted(wider, saved)
    assert type(wider.stem) is nn.Conv2d
    assert torch.equal(wider.stem.weight, weight)


def test_a_network_on_the_meta_device_is_refused(net, saved):
    with pytest.raises(ValueError, match="on the meta device"):
        cs.load_converted(type(net)().to("meta"), saved)


def test_a_folder_that_does_not_exist_is_an_error_of_the_file_system(net, tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        cs.save_converted(net, tmp_path / "none" / "net.safetensors")
