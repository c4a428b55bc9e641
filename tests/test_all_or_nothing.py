"""All or nothing: a fault at any call into the package leaves a network as it was, or as it was to be."""

import warnings
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from faults import every_fault, run_with_fault, same_state, state
from timm.models.resnet import Bottleneck

import coconv_surgery as cs
from conftest import TinyNet


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Mergeable(nn.Module):
    """A block with a merging method, whose class is switched with its convolutions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x)

    def fuse(self):
        return self.conv


def module_network():
    torch.manual_seed(0)
    net = TinyNet().eval()
    net.body.insert(1, Mergeable())
    return net


def functional_network():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
            self.mix = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.mix(self.first(x).relu())

    torch.manual_seed(0)
    return torch.export.export(Functional().eval(), (torch.ones(1, 3, 16, 16),)).module()


def report(capsys, what, count):
    with capsys.disabled():
        print(f"\n{what}: {count} faults injected, none left a trace")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("build", [module_network, functional_network])
def test_a_plan_is_applied_whole_or_not_at_all(build, error, capsys):
    plan = cs.plan_conversion(build(), input_size=(3, 16, 16))
    count = every_fault(build, lambda model: cs.apply_plan(model, plan), error)
    assert count > 50
    report(capsys, f"apply_plan, {build.__name__}, {error.__name__}", count)


@pytest.mark.parametrize("build", [module_network, functional_network])
def test_a_conversion_is_undone_whole_or_not_at_all(build, capsys):
    def converted():
        return cs.convert(build(), input_size=(3, 16, 16))

    count = every_fault(converted, cs.revert)
    assert count > 20
    report(capsys, f"revert, {build.__name__}", count)


def test_planning_and_applying_in_one_leave_no_trace_of_a_fault(capsys):
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1))

    # Most of the calls are planning's, which has not changed anything yet.
    count = every_fault(build, lambda model: cs.convert(model, input_size=(3, 16, 16)), step=41)
    assert count > 100
    report(capsys, "convert", count)


@pytest.mark.parametrize("build", [module_network, functional_network])
def test_a_converted_file_is_loaded_whole_or_not_at_all(build, tmp_path, capsys):
    saved = cs.convert(build(), input_size=(3, 16, 16))
    for parameter in saved.parameters():
        nn.init.normal_(parameter)
    cs.save_converted(saved, tmp_path / "saved.safetensors")
    # Most calls read the file, which changes nothing.
    count = every_fault(build, lambda model: cs.load_converted(model, tmp_path / "saved.safetensors"), step=13)
    assert count > 50
    report(capsys, f"load_converted, {build.__name__}", count)


def authors_network():
    torch.manual_seed(0)
    widths = {"channels": (8, 8, 8, 8), "stem_width": 8, "base_width": 64}
    return cs.CoResNet(Bottleneck, (1, 1, 1, 1), num_classes=3, norm_after_add=True, levels=(4, 3, 2, 1), **widths)


def test_a_checkpoint_of_the_authors_is_loaded_whole_or_not_at_all(tmp_path, capsys):
    torch.manual_seed(1)
    theirs = authors_network()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    torch.save(cs.export_authors_state_dict(theirs), tmp_path / "theirs.pth")
    # Most calls read the file, which changes nothing.
    load = lambda model: cs.load_authors_checkpoint(model, tmp_path / "theirs.pth")  # noqa: E731
    count = every_fault(authors_network, load, step=101)
    assert count > 20
    report(capsys, "load_authors_checkpoint", count)


def test_weights_that_were_half_loaded_are_put_back(tmp_path):
    cs.save_converted(cs.convert(module_network(), input_size=(3, 16, 16)), tmp_path / "saved.safetensors")
    model = module_network()
    for parameter in model.parameters():
        nn.init.normal_(parameter)

    def interrupt(module, keys):
        assert not same_state(state(model), before), "some of it has happened"
        raise KeyboardInterrupt

    model.head.register_load_state_dict_post_hook(interrupt)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        cs.load_converted(model, tmp_path / "saved.safetensors")
    assert same_state(state(model), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensor: tensor.to("meta"), "has a shape but no numbers"),
        (lambda tensor: tensor.to_sparse(), "has the layout torch.sparse_coo"),
        (lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1]]), "holds more than tensors"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is quantised"),
        (lambda tensor: tensor.to(torch.complex64), "imaginary part"),
    ],
    ids=["meta", "sparse", "nested", "quantised", "complex"],
)
def test_a_tensor_that_cannot_be_loaded_stops_a_load_before_it_starts(tmp_path, damage, message):
    weights = cs.export_authors_state_dict(authors_network())
    weights["fc.weight"] = damage(weights["fc.weight"])
    torch.save(weights, tmp_path / "theirs.pth")
    model = authors_network()
    nn.init.normal_(model.conv1.weight)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        cs.load_authors_checkpoint(model, tmp_path / "theirs.pth")
    assert same_state(state(model), before)


def test_a_module_that_refuses_another_class_leaves_the_others_as_they_were():
    class Stubborn(nn.Conv2d):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise RuntimeError("mine")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Stubborn(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    before = state(model)
    with pytest.raises(RuntimeError, match="mine"):
        cs.convert(model, input_size=16)
    assert same_state(state(model), before)


def test_a_lazy_convolution_is_not_switched_before_it_has_weights():
    conv = nn.LazyConv2d(8, 3, padding=1)
    with pytest.raises(TypeError, match=r"LazyConv2d has no weights yet.*run it once first"):
        cs.to_coconv_(conv, (1, 2), (4, 4))
    assert not [name for name in vars(conv) if "coconv" in name]


def test_an_interrupted_switch_of_one_convolution_leaves_it_plain():
    def build():
        return nn.Conv2d(8, 8, 3, padding=1)

    assert every_fault(build, lambda conv: cs.to_coconv_(conv, (1, 2), (4, 4))) > 5


def test_an_interrupted_rewrite_of_a_graph_does_not_poison_later_traces():
    class Functional(nn.Module):
        def forward(self, x):
            return F.conv2d(x, torch.ones(2, 3, 3, 3))

    plan = cs.plan_conversion(functional_network(), input_size=(3, 16, 16))
    calls, _ = run_with_fault(partial(cs.apply_plan, functional_network(), plan))
    for number in range(1, calls + 1, 13):
        run_with_fault(partial(cs.apply_plan, functional_network(), plan), number)
    assert F.conv2d in [node.target for node in fx.symbolic_trace(Functional()).graph.nodes]


def test_a_block_with_an_odd_merging_method_converts():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

        def fuse():
            """Takes nothing, not even itself."""

    model = nn.Sequential(Odd(), nn.Conv2d(8, 2, 1))
    assert isinstance(cs.convert(model, input_size=16)[0].conv, cs.CoConv2d)


# -- Levels are numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        (1, float("nan")),
        (1, float("inf")),
        (1, 2.0),
        (1, True),
        (1, 10**30),
        {1, 2},
        {1: 2},
        "12",
        2.0,
        None.__class__,
        cs.Levels((1, 2), (4.0, 4.0)),
        cs.Levels((1, 2), (4, True)),
        cs.Levels((1, 2), {4}),
        cs.Levels((1, (1, 2, 3))),
        cs.Levels({1, 2}),
        cs.Levels(2),
        (1, 50),
        10**9,
        torch.tensor(True),
        (1, np.array(2.0)),
        (1, torch.tensor(2)),
    ],
    ids=str,
)
def test_levels_that_are_not_numbers_or_do_not_fit_are_refused_wherever_they_enter(answer):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    before = state(model)
    with pytest.raises(ValueError, match="gave 0 the levels"):
        cs.convert(model, overrides={"0": answer}, input_size=(4, 16, 16))
    with pytest.raises(ValueError, match="gave 0 the levels"):
        cs.convert(model, lambda conv: answer, input_size=(4, 16, 16))
    assert same_state(state(model), before)


@pytest.mark.parametrize("dilations", [(1, float("nan")), (1, True), (1, 10**30), {1, 2}, 2, "12", (1, -1)], ids=str)
def test_a_convolution_refuses_dilations_that_are_not_numbers(dilations):
    with pytest.raises(ValueError, match="dilation"):
        cs.CoConv2d(4, 8, 3, padding=1, dilations=dilations)
    conv = nn.Conv2d(4, 8, 3, padding=1)
    with pytest.raises(ValueError, match="dilation"):
        cs.to_coconv_(conv, dilations, (4, 4))
    assert type(conv) is nn.Conv2d
    assert "_coconv_levels" not in vars(conv)


def test_a_plan_whose_levels_do_not_fit_its_maps_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    text = cs.plan_conversion(model, input_size=(4, 16, 16)).to_json()
    edited = text.replace('"dilations": [\n    1,\n    2,\n    3\n   ]', '"dilations": [\n    1,\n    2,\n    50\n   ]')
    assert edited != text
    with pytest.raises(cs.PlanError, match=r"0 \(dilation 50 is too large for a side of 18"):
        cs.apply_plan(model, cs.Plan.from_json(edited))


@pytest.mark.parametrize("numbers", [(1, 2), [1, 2], torch.Size([1, 2])], ids=lambda value: type(value).__name__)
def test_whole_numbers_of_any_kind_are_taken(numbers):
    assert cs.CoConv2d(4, 8, 3, padding=1, dilations=numbers).dilations == (1, 2)
    assert cs.CoConv2d(4, 8, 3, padding=1, dilations=np.array([1, 2])).dilations == (1, 2)
    assert type(cs.CoConv2d(4, 8, 3, padding=1, levels=np.int64(2)).dilations[1]) is int


@pytest.mark.parametrize(
    "size", [True, 32.0, "32", (32,), (32, True), (32, 32.0), {32}, {}, [], (0, 32), float("nan")], ids=str
)
def test_an_input_size_that_is_not_whole_numbers_is_refused(net, size):
    with pytest.raises(ValueError, match=r"input_size=.*give a side"):
        cs.plan_conversion(net, input_size=size)


def test_an_input_size_of_numpys_integers_is_taken(net):
    for size in (np.int64(32), (np.int64(32), np.int32(32)), np.array([32, 32])):
        assert cs.plan_conversion(net, input_size=size).diff(cs.plan_conversion(net, input_size=32)) == []


@pytest.mark.parametrize(
    "policy",
    [
        lambda: cs.ResolutionPolicy(max_levels="4"),
        lambda: cs.ResolutionPolicy(max_levels=True),
        lambda: cs.UniformPolicy(2.0),
        lambda: cs.UniformPolicy(float("nan")),
        lambda: cs.StagePolicy((4, 3, 2, True)),
        lambda: cs.StagePolicy("4321"),
        lambda: cs.UniformPolicy(2, min_channels=None),
        lambda: cs.CoResNet(Bottleneck, (1, 1, 1, 1), levels=(4, 3, True, 1)),
    ],
)
def test_a_number_of_levels_that_is_not_one_is_refused_where_it_is_given(policy):
    with pytest.raises(ValueError, match=r"whole number|numbers of at least 1"):
        policy()


def test_a_policy_of_very_many_levels_costs_nothing(net):
    plan = cs.plan_conversion(net, cs.UniformPolicy(10**9), input_size=32)
    assert plan.rows[0].levels == 8, "as many as there are channels"


# -- Revert is the inverse -----------------------------------------------------------------------------------------


def test_what_was_contextual_from_the_start_comes_back():
    model = nn.Sequential(cs.CoConv2d(3, 8, 3, padding=1, levels=2), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    before = state(model)
    cs.convert(model, cs.UniformPolicy(3), input_size=16)
    assert model[0].levels == model[1].levels == 3
    assert same_state(state(cs.revert(model)), before)
    assert type(cs.revert(model)[0]) is nn.Conv2d


def test_a_part_of_a_contextual_network_is_converted_and_comes_back_alone():
    model = timm.create_model("coresnet18")
    before = [row.dilations for row in cs.get_plan(model).rows]
    cs.convert(model, cs.UniformPolicy(2), include="layer1")
    assert [row.dilations for row in cs.get_plan(model).rows] != before
    assert [row.dilations for row in cs.get_plan(cs.revert(model)).rows] == before


def test_what_a_conversion_does_not_touch_stays_contextual_when_it_is_reverted():
    model = nn.Sequential(cs.CoConv2d(3, 8, 3, padding=1, levels=2), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    before = state(model)
    cs.convert(model, cs.UniformPolicy(2), input_size=16, exclude="0")
    cs.revert(model)
    assert model[0].levels == 2
    assert same_state(state(model), before)


def test_reverting_the_whole_forgets_the_plans_of_its_parts(net):
    cs.convert(net.body, input_size=(8, 16, 16))
    cs.revert(net)
    assert not [key for module in net.modules() for key in vars(module) if "coconv" in key]


def test_attributes_of_the_users_are_neither_hidden_nor_overwritten():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    model[0].levels, model[0].dilations = "mine", [7]
    cs.convert(model, input_size=16)
    assert (model[0].levels, model[0].dilations) == ("mine", [7])
    row = cs.get_plan(model).rows[0]
    assert (row.reason_key, row.reason) == (
        cs.Reason.HIDDEN_ATTRIBUTES,
        "a contextual convolution would hide its own dilations, levels",
    )
    with pytest.raises(TypeError, match="rename them first"):
        cs.to_coconv_(model[0], (1, 2))


def test_no_attribute_of_a_users_class_is_hidden():
    class Mine(nn.Conv2d):
        contextual_levels = "mine"

        def from_conv(self):
            return "mine"

    model = nn.Sequential(Mine(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    plan = cs.plan_conversion(model, input_size=16)
    assert plan.rows[0].reason == "a contextual convolution would hide its own contextual_levels, from_conv"


@pytest.mark.parametrize(
    "hold",
    [
        lambda conv: conv.register_buffer("splits", torch.ones(2)),
        lambda conv: conv.register_parameter("dilations", nn.Parameter(torch.ones(2))),
        lambda conv: conv.add_module("levels", nn.Identity()),
    ],
    ids=["buffer", "parameter", "module"],
)
def test_what_a_convolution_holds_under_a_name_of_the_levels_is_not_hidden(hold):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    hold(model[0])
    with pytest.warns(cs.NoChangeWarning):
        cs.convert(model, input_size=16)
    assert cs.get_plan(model).rows[0].reason_key is cs.Reason.HIDDEN_ATTRIBUTES
