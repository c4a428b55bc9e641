"""What a state dict says of the levels of its network."""

import copy
import gc
import io
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import weight_norm

import coconv_surgery as cs


def network(*dilations, seed=0, **kwargs):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, **kwargs), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    for conv in net[:2] if dilations else ():
        cs.to_coconv_(conv, dilations)
    return net


def through_torch_save(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("carry", [lambda state: state, through_torch_save], ids=["in memory", "saved"])
def test_weights_of_other_levels_are_one_error_that_names_every_row(carry):
    saved = carry(network(1, 2, seed=1).state_dict())
    net = network(1, 3)
    before = [net[0].weight.clone(), net[1].weight.clone()]
    with pytest.raises(RuntimeError) as error:
        net.load_state_dict(saved, strict=False)
    message = str(error.value)
    assert message.count("unchecked_levels()") == 1
    assert "0: dilations (1, 3) with (4, 4) channels, the weights come from dilations (1, 2) with (4, 4)" in message
    assert "1: dilations (1, 3)" in message
    assert torch.equal(net[0].weight, before[0])
    assert torch.equal(net[1].weight, before[1])


def test_weights_of_the_same_levels_load_without_a_word():
    saved, net = through_torch_save(network(1, 2, seed=1).state_dict()), network(1, 2)
    net.load_state_dict(saved)
    assert torch.equal(net[0].weight, saved["0.weight"])


def test_other_splits_are_other_levels():
    conv, other = (cs.CoConv2d(8, 8, 3, padding=1, dilations=(1, 2), splits=splits) for splits in ((4, 4), (6, 2)))
    with pytest.raises(RuntimeError, match=r"\(6, 2\) channels, the weights come from .* \(4, 4\)"):
        other.load_state_dict(conv.state_dict())


@pytest.mark.parametrize("plain", [0, 1])
def test_a_convolution_that_was_plain_in_a_converted_network_is_an_error_too(plain):
    source, net = network(1, 2, seed=1), network(1, 2)
    cs.to_conv_(source[plain])
    saved = through_torch_save(source.state_dict())
    warnings.simplefilter("ignore")
    with pytest.raises(RuntimeError, match=rf"{plain}: dilations \(1, 2\) .* the weights come from a plain one"):
        net.load_state_dict(saved)


def converted(**overrides):
    return cs.convert(network(), overrides={"0": 2, "1": 2, **overrides}, input_size=16)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.Sequential], ids=["bare", "wrapped"])
@pytest.mark.parametrize("carry", [lambda state: state, through_torch_save], ids=["in memory", "saved"])
def test_a_convolution_that_is_plain_in_a_converted_network_is_an_error_too(carry, wrap):
    saved = carry(wrap(converted()).state_dict())
    with pytest.raises(RuntimeError, match=r"1: plain, the weights come from dilations") as error:
        wrap(converted(**{"1": None})).load_state_dict(saved)
    assert "0: " not in str(error.value).replace("0.1: ", "")
    wrap(converted()).load_state_dict(saved)


def test_a_plain_part_of_a_converted_network_does_not_load_what_a_contextual_one_has_learnt():
    source, net = converted(), converted(**{"1": None})
    with pytest.raises(RuntimeError, match="plain, the weights come from dilations"):
        net[1].load_state_dict(source[1].state_dict())


def test_networks_that_are_contextual_in_different_places_are_an_error():
    with pytest.raises(RuntimeError, match=r"0: plain, .*\n.*1: dilations .*, the weights come from a plain one"):
        converted(**{"0": None}).load_state_dict(converted(**{"1": None}).state_dict())


def test_a_convolution_under_two_names_is_compared_under_each():
    part, saved = converted(**{"1": None}), nn.ModuleDict({"second": converted()}).state_dict()
    with pytest.raises(RuntimeError, match=r"second\.1: plain, the weights come from dilations"):
        nn.ModuleDict({"first": part, "second": part}).load_state_dict(saved, strict=False)


@pytest.fixture
def coresnet_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    cs.save_converted(timm.create_model("coresnet18", levels=(2, 2, 2, 1)), path)
    return path


@pytest.mark.parametrize("stages", [(2, 2, 1, 1), (2, 2, 3, 1)], ids=["plain", "other levels"])
def test_a_file_of_other_levels_does_not_load_through_timm(coresnet_file, stages):
    choices = {"levels": stages, "num_classes": 1000}
    with pytest.raises(RuntimeError, match=r"layer3\.0\.conv1: .*, the weights come from dilations"):
        timm.create_model("coresnet18", **choices, checkpoint_path=coresnet_file)
    with pytest.raises(RuntimeError, match=r"layer3\.0\.conv1: .*, the weights come from dilations"):
        timm.create_model("coresnet18", **choices, pretrained=True, pretrained_cfg_overlay={"file": str(coresnet_file)})


def hooks(model):
    return [len(module._load_state_dict_pre_hooks) + len(module._state_dict_hooks) for module in model.modules()]


@pytest.mark.parametrize("undo", [cs.revert, lambda net: cs.deploy(net, input_size=16)], ids=["reverted", "deployed"])
def test_a_plain_network_loads_what_it_is_given_again(undo):
    net = undo(converted(**{"1": None}).eval())
    assert not any(hooks(net))
    net[1].load_state_dict(converted()[1].state_dict())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["part first", "whole first"])
def test_a_reverted_part_of_a_converted_network_goes_on_to_compare(order):
    whole = nn.Sequential(network(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    for which in order:
        cs.convert((whole, whole[0])[which], ("uniform(2)", "uniform(3)")[which], input_size=16, overrides={"*1": 2})
    saved = whole.state_dict()
    cs.revert(whole[0])
    with pytest.raises(RuntimeError, match=r"0\.1: plain, the weights come from dilations"):
        whole.load_state_dict(saved)
    assert not any(hooks(cs.revert(whole)))


def test_a_copy_of_the_attributes_of_a_plain_convolution_loads():
    net = converted(**{"1": None})
    net[1] = copy.copy(net[1])
    gc.collect()
    net.load_state_dict(net.state_dict())


def test_a_deployed_part_of_a_converted_network_compares_nothing():
    whole = cs.convert(nn.Sequential(network(), nn.ReLU()), input_size=16, include="0.0").eval()
    assert not any(hooks(cs.deploy(whole[0], input_size=16)))
    assert any(hooks(whole[0]))


def test_a_conversion_that_fails_leaves_the_hooks_of_a_part_that_was_converted_before():
    whole = nn.Sequential(converted(**{"1": None}), nn.ReLU())
    before = hooks(whole)
    with pytest.raises(RuntimeError, match="no image today"):
        cs.convert(whole, input_size=16, calibrate=lambda _: fail())
    assert hooks(whole) == before
    with pytest.raises(RuntimeError, match="plain, the weights come from dilations"):
        whole[0].load_state_dict(converted().state_dict())


def fail():
    raise RuntimeError("no image today")


def test_coresnets_that_differ_in_a_stage_that_is_plain_in_one_do_not_load():
    saved = timm.create_model("coresnet18", levels=(2, 2, 2, 1)).state_dict()
    with pytest.raises(RuntimeError, match=r"layer3\.0\.conv1: plain, the weights come from dilations"):
        timm.create_model("coresnet18", levels=(2, 2, 1, 1)).load_state_dict(saved)


def test_within_unchecked_levels_they_load_all_the_same():
    saved, net = network(1, 2, seed=1).state_dict(), network(1, 3)
    with cs.unchecked_levels():
        net.load_state_dict(saved)
        network(1, 2).load_state_dict(dict(saved))
    assert torch.equal(net[0].weight, saved["0.weight"])
    with pytest.raises(RuntimeError):
        net.load_state_dict(saved)


@pytest.mark.parametrize(
    ("carry", "words"),
    [(lambda state: state, "come from plain convolutions"), (dict, "do not say how their network was converted")],
    ids=["plain", "without metadata"],
)
def test_weights_that_are_not_known_to_be_converted_load_with_one_warning(carry, words):
    saved, net = carry(network(seed=1).state_dict()), network(1, 2)
    for _ in range(2):
        with pytest.warns(cs.PlainWeightsWarning, match=words) as caught:
            net.load_state_dict(saved)
        assert len(caught) == 1
    assert torch.equal(net[0].weight, saved["0.weight"])


def test_weights_that_do_not_say_are_not_called_plain_where_they_are_assigned():
    with pytest.warns(cs.PlainWeightsWarning, match="do not say how their network was converted"):
        network(1, 2).load_state_dict(dict(network(1, 2).state_dict()), assign=True)


def test_python_shows_the_warning_for_every_network():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(2):
            network(1, 2).load_state_dict(network().state_dict())
    assert [warning.category for warning in shown] == [cs.PlainWeightsWarning] * 2


def test_a_single_level_is_a_plain_convolution():
    plain, single = network(), network(1)
    single.load_state_dict(plain.state_dict())
    plain.load_state_dict(single.state_dict())
    with pytest.raises(RuntimeError, match="0: plain, the weights come from dilations"):
        single.load_state_dict(network(1, 2).state_dict())


def test_a_convolution_that_no_weight_is_for_is_not_warned_of():
    net = network(1, 2)
    head = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("2.")}
    net.load_state_dict(head, strict=False)


@pytest.mark.parametrize("head", [{}, {"1": None}, {"1": 3}], ids=["same", "plain", "other levels"])
def test_a_convolution_that_no_weight_is_for_is_not_compared(head):
    state = converted().state_dict()
    for name in ("1.weight", "1.bias", "2.weight"):
        del state[name]
    missing, _ = converted(**head).load_state_dict(state, strict=False)
    assert missing == ["1.weight", "1.bias", "2.weight"]


def test_a_parametrized_convolution_tells_its_levels():
    nets = network(1, 2), network(1, 3)
    for net in nets:
        weight_norm(net[0])
    assert nets[0].state_dict()._metadata["0"]["coconv_levels"] == {"dilations": (1, 2), "splits": (4, 4)}
    with pytest.raises(RuntimeError, match=r"0: dilations \(1, 3\)"):
        nets[1].load_state_dict(nets[0].state_dict())


@pytest.mark.parametrize("nonsense", [5, {"dilations": "x" * 10**6}, {"dilations": torch.ones(2), "splits": None}, []])
def test_a_note_that_makes_no_sense_is_an_error(nonsense):
    state = network(1, 2).state_dict()
    state._metadata["0"]["coconv_levels"] = nonsense
    with pytest.raises(RuntimeError, match="the weights come from") as error:
        network(1, 2).load_state_dict(state)
    assert len(str(error.value)) < 2_000


def test_a_wrapper_of_the_network_makes_no_difference():
    saved = nn.Sequential(network(1, 2)).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.1: dilations"):
        nn.Sequential(network(1, 3)).load_state_dict(saved)
