"""A converted network on disk."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import coconv_surgery as cs
from coconv_surgery.checkpoint import converted


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


def test_weights_that_the_network_ties_and_the_file_does_not_are_refused(tmp_path):
    convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)]
    model = cs.convert(nn.Sequential(*convs, nn.Conv2d(4, 2, 1)), input_size=(4, 16, 16))
    torch.save(model.state_dict(), tmp_path / "apart.pth")
    tied = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)), nn.Conv2d(4, 2, 1))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"1 of which the network holds one for several that differ, as 1\.weight"):
        cs.load_converted(tied, tmp_path / "apart.pth")
    assert type(tied[0]) is nn.Conv2d


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
    with pytest.raises(ValueError, match=r"do not fit TinyNet: 2 of another shape, as head\.weight \(5×6, and 7×6 in"):
        cs.load_converted(wider, saved)
    assert type(wider.stem) is nn.Conv2d
    assert torch.equal(wider.stem.weight, weight)


def test_a_network_on_the_meta_device_is_refused(net, saved):
    with pytest.raises(ValueError, match="on the meta device"):
        cs.load_converted(type(net)().to("meta"), saved)


def test_a_folder_that_does_not_exist_is_an_error_of_the_file_system(net, tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        cs.save_converted(net, tmp_path / "none" / "net.safetensors")


class Holder(nn.Module):
    """A contextual convolution beside whatever else a state dict may hold."""

    def __init__(self, **buffers):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.conv(x)


class Remembers(Holder):
    """Its extra state is whatever it was given."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def through_a_file(model, fresh, folder):
    cs.to_coconv_(next(conv for conv in model.modules() if isinstance(conv, nn.Conv2d)), (1, 2))
    cs.save_converted(model, folder / "net.safetensors")
    return cs.load_converted(fresh, folder / "net.safetensors")


def test_a_shared_module_in_channels_last_comes_back(tmp_path):
    def build():
        conv = nn.Conv2d(4, 4, 3, padding=1)
        return nn.Sequential(conv, conv).to(memory_format=torch.channels_last)

    model, fresh = build(), build()
    through_a_file(model, fresh, tmp_path)
    assert fresh[0] is fresh[1]
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_was_written_once_for_a_shared_module_fills_separate_ones(tmp_path):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    fresh = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model = nn.Sequential(conv, conv)
    through_a_file(model, fresh, tmp_path)
    assert load_file(tmp_path / "net.safetensors").keys() == {"0.weight", "0.bias"}
    assert fresh[0] is not fresh[1]
    assert torch.equal(fresh(torch.ones(1, 4, 9, 9)), model(torch.ones(1, 4, 9, 9)))


def test_overlapping_and_expanded_buffers_come_back(tmp_path):
    def build(values):
        whole = torch.arange(6.0) * values
        return Holder(
            first=whole[:4], second=whole[2:], again=whole.view(2, 3), row=torch.full((1, 3), values).expand(5, 3)
        )

    model, fresh = build(2.0), build(1.0)
    through_a_file(model, fresh, tmp_path)
    for name, buffer in model.named_buffers():
        assert torch.equal(fresh.get_buffer(name), buffer), name
    assert fresh.row.stride() == (0, 1)


def test_values_that_an_expanded_buffer_cannot_hold_are_refused(tmp_path):
    fresh = Holder(row=torch.ones(1, 3).expand(2, 3))
    with pytest.raises(ValueError, match="1 of which the network holds one for several that differ, as row"):
        through_a_file(Holder(row=torch.arange(6.0).view(2, 3)), fresh, tmp_path)
    assert type(fresh.conv) is nn.Conv2d


@pytest.mark.parametrize("extra", [None, 3, {"steps": [1, 2.5, "x"], "on": True}, torch.arange(3)])
def test_extra_state_comes_back(tmp_path, extra):
    model, fresh = Remembers(), Remembers()
    model.extra = extra
    through_a_file(model, fresh, tmp_path)
    assert torch.equal(fresh.extra, extra) if isinstance(extra, torch.Tensor) else fresh.extra == extra


def test_what_a_file_has_no_place_for_is_named_before_anything_is_written(tmp_path):
    model = Remembers(sparse=torch.eye(3).to_sparse(), wide=torch.ones(2, dtype=torch.complex128))
    model.extra = (1, 2)
    with pytest.raises(ValueError, match=r"sparse has the layout torch.sparse_coo; wide is of type torch.complex128; "):
        cs.save_converted(model, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="_extra_state is a tuple"):
        cs.save_converted(model, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_nothing_converted_keeps_its_reasons(tmp_path):
    model, fresh = nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Sequential(nn.Conv2d(4, 4, 1))
    with pytest.warns(cs.NoChangeWarning):
        cs.convert(model, input_size=(4, 32, 32))
    cs.save_converted(model, tmp_path / "net.safetensors")
    cs.load_converted(fresh, tmp_path / "net.safetensors")
    assert cs.get_plan(fresh) == cs.get_plan(model)
    assert cs.get_plan(fresh).rows[0].reason == "kernel 1×1"


def test_a_network_that_was_converted_the_same_way_takes_over_policy_and_maps(net, saved):
    fresh = type(net)()
    for name, levels in (("stem", net.stem), ("body.0", net.body[0])):
        cs.to_coconv_(fresh.get_submodule(name), levels.dilations, levels.splits)
    cs.load_converted(fresh, saved)
    assert cs.get_plan(fresh) == cs.get_plan(net)


@pytest.mark.parametrize("name", ["module", "model"])
def test_a_parameter_may_be_called_as_training_scripts_call_the_weights(net, tmp_path, name):
    net.register_parameter(name, nn.Parameter(torch.ones(2)))
    fresh = copy.deepcopy(net)
    cs.save_converted(cs.convert(net, input_size=32), tmp_path / "net.safetensors")
    assert cs.get_plan(cs.load_converted(fresh, tmp_path / "net.safetensors")) == cs.get_plan(net)


def test_a_write_that_fails_leaves_the_old_file(net, saved, monkeypatch):
    before = saved.read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(converted, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        cs.save_converted(net, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_plan_in_a_file_that_cannot_be_read_names_the_file(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "net.safetensors", metadata={"coconv_plan": "{}"})
    with pytest.raises(cs.PlanError, match=r"the plan in .*net\.safetensors is not a plan"):
        cs.read_plan(tmp_path / "net.safetensors")


@pytest.mark.parametrize("key", ["coconv_shared", "coconv_extra_state"])
def test_a_header_that_says_what_a_tensor_of_the_file_is_too_is_refused(net, saved, key):
    header = safe_open(saved, "pt").metadata() | {key: json.dumps({"head.bias": "stem.bias"})}
    save_file(load_file(saved), saved, metadata=header)
    with pytest.raises(cs.CheckpointError, match=r"holds 'head\.bias' twice, once in its header"):
        cs.load_converted(type(net)(), saved)


def test_a_header_that_says_two_things_of_one_entry_is_refused(net, saved):
    header = safe_open(saved, "pt").metadata()
    header |= {"coconv_shared": '{"x": "stem.bias"}', "coconv_extra_state": '{"x": 1}'}
    save_file(load_file(saved), saved, metadata=header)
    with pytest.raises(cs.CheckpointError, match="holds 'x' twice"):
        cs.load_converted(type(net)(), saved)


def test_what_is_no_tensor_where_the_network_has_one_is_refused(net, tmp_path):
    state = cs.convert(net, input_size=32).state_dict()
    state["head.bias"] = 5
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"do not fit TinyNet: 1 no tensor, as head\.bias"):
        cs.load_converted(type(net)(), tmp_path / "net.pth")


@pytest.mark.parametrize("name", ["net.pth", "net.PT", "last.ckpt", "pytorch_model.bin", "net.onnx", "last.pth.tar"])
def test_a_name_that_says_another_format_is_refused_before_anything_is_written(net, tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} would be a safetensors file.*: call it \w+(\.pth)?\.safetensors"):
        cs.save_converted(net, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
