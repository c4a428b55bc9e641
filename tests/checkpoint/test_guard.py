"""The entry that keeps a converted network's weights out of a plain one."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, load_model, save_file
from timm.utils import ModelEmaV2
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import coconv_surgery as cs
from coconv_surgery.planning.notes import GUARD


def entries(model):
    return [name for name in model.state_dict() if name.startswith(GUARD)]


@pytest.fixture
def guarded(net):
    return cs.guard(cs.convert(net, input_size=32))


def test_a_plain_network_refuses_a_guarded_one_by_a_name_that_says_why(guarded):
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "converted_by_coconv_surgery_'):
        type(guarded)().load_state_dict(dict(guarded.state_dict()))


def test_networks_with_the_same_levels_have_the_same_guard(guarded, image):
    other = type(guarded)().eval()
    other.head = nn.Linear(6, 5)
    cs.guard(cs.apply_plan(other, cs.get_plan(guarded)))
    other.load_state_dict(guarded.state_dict())
    assert torch.equal(other(image), guarded(image))


def test_networks_with_other_levels_have_another_guard(guarded):
    other = cs.guard(cs.convert(type(guarded)(), cs.UniformPolicy(2), input_size=32))
    assert entries(other) != entries(guarded)
    with cs.unchecked_levels(), pytest.raises(RuntimeError, match=r"(?s)Missing key\(s\).*Unexpected key\(s\)"):
        other.load_state_dict(dict(guarded.state_dict()))


def test_a_conversion_renews_it_and_revert_takes_it_out(guarded):
    before = entries(guarded)
    cs.convert(guarded, cs.UniformPolicy(2), input_size=32)
    assert len(entries(guarded)) == 1
    assert entries(guarded) != before
    assert entries(cs.revert(guarded)) == []


def test_a_part_keeps_a_guard_that_is_true(guarded):
    whole = nn.Sequential(guarded)
    cs.convert(whole, cs.UniformPolicy(2), input_size=32)
    assert not cs.plan_of(dict(guarded.state_dict())).diff(cs.get_plan(guarded))


def test_it_can_be_taken_out(guarded):
    assert entries(cs.guard(guarded, on=False)) == []
    assert guarded.state_dict().keys() == type(guarded)().state_dict().keys()


def test_it_survives_copies_half_precision_and_averages(guarded):
    name = entries(guarded)[0]
    content = guarded.state_dict()[name]
    average = torch.optim.swa_utils.AveragedModel(guarded, use_buffers=True)
    average.update_parameters(guarded)
    average.update_parameters(guarded)
    for other in (copy.deepcopy(guarded), pickle.loads(pickle.dumps(guarded)), guarded.half(), average.module):
        assert torch.equal(other.state_dict()[name].float(), content)


def averaged_by_timm(guarded):
    average = ModelEmaV2(guarded, decay=0.9)
    for _ in range(100):
        average.update(guarded)
    return average.module


def averaged_by_torch(guarded):
    average = AveragedModel(guarded, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(100):
        average.update_parameters(guarded)
    return average.module


@pytest.mark.parametrize("average", [averaged_by_timm, averaged_by_torch, nn.Module.half, nn.Module.bfloat16])
def test_a_plan_is_read_of_an_average_and_of_half_precision(guarded, average):
    plan = cs.get_plan(guarded)
    assert not cs.plan_of(dict(average(guarded).state_dict())).diff(plan)


def test_a_guard_of_whole_numbers_as_earlier_versions_wrote_it_is_read_and_loaded(guarded):
    state = {name: value.byte() if name in entries(guarded) else value for name, value in guarded.state_dict().items()}
    assert not cs.plan_of(state).diff(cs.get_plan(guarded))
    before = guarded.state_dict()[entries(guarded)[0]].clone()
    with cs.unchecked_levels():
        guarded.load_state_dict(state)
    assert torch.equal(guarded.state_dict()[entries(guarded)[0]], before)


@pytest.mark.parametrize("number", [torch.nan, -1.0, 256.0])
def test_a_guard_that_holds_no_text_is_an_error(guarded, number):
    state = {
        name: value * 0 + number if name in entries(guarded) else value for name, value in guarded.state_dict().items()
    }
    with pytest.raises(cs.PlanError, match="not JSON"):
        cs.plan_of(state)


def test_a_network_without_a_contextual_convolution_has_nothing_to_guard(net):
    with pytest.raises(ValueError, match="TinyNet has no contextual convolution"):
        cs.guard(net)


@pytest.mark.parametrize("second", [True, False], ids=["all parts", "one part"])
def test_guarded_parts_go_to_a_file_and_back(guarded, image, tmp_path, second):
    other = cs.guard(cs.convert(type(guarded)().eval(), cs.UniformPolicy(2), input_size=32))
    whole = nn.ModuleDict({"one": guarded, "two": other if second else type(guarded)().eval()})
    save_file(whole.state_dict(), tmp_path / "bare.safetensors")
    cs.save_converted(whole, tmp_path / "ours.safetensors")
    for name in ("bare", "ours"):
        fresh = nn.ModuleDict({"one": type(guarded)().eval(), "two": type(guarded)().eval()})
        cs.load_converted(fresh, tmp_path / f"{name}.safetensors")
        for part in whole:
            assert torch.equal(fresh[part](image), whole[part](image))


def test_a_file_can_be_guarded_without_the_network(net, image, tmp_path):
    cs.save_converted(cs.convert(net, input_size=32), tmp_path / "net.safetensors", guard=True)
    assert entries(net) == []
    with pytest.raises(RuntimeError, match="converted_by_coconv_surgery"):
        load_model(type(net)(), tmp_path / "net.safetensors")
    fresh = cs.load_converted(type(net)().eval(), tmp_path / "net.safetensors")
    assert entries(fresh) == []
    assert torch.equal(fresh(image), net(image))


def test_a_guarded_network_goes_to_a_file_and_back(guarded, image, tmp_path):
    cs.save_converted(guarded, tmp_path / "net.safetensors")
    assert entries(guarded)[0] in load_file(tmp_path / "net.safetensors")
    for fresh in (type(guarded)().eval(), copy.deepcopy(guarded)):
        cs.load_converted(fresh, tmp_path / "net.safetensors")
        assert torch.equal(fresh(image), guarded(image))
