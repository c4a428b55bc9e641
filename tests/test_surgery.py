"""Surgery: what changes is the levels, and nothing else."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn as nn
from launching import python
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations

import coconv_surgery as cs


def snapshot(model):
    return {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name][0] is second[name][0] and first[name][1].keys() == second[name][1].keys() for name in first
    )


def test_convert_returns_the_same_model_object(net):
    assert cs.convert(net, input_size=32) is net
    assert type(net.stem) is type(net.body[0]) is cs.CoConv2d
    assert (net.stem.levels, net.body[0].levels) == (3, 2)


def test_inplace_false_leaves_the_original_plain(net, image):
    before = net(image)
    converted = cs.convert(net, input_size=32, inplace=False)
    assert type(converted.stem) is cs.CoConv2d
    assert type(net.stem) is nn.Conv2d
    assert torch.equal(net(image), before)


def test_parameters_and_state_dict_keys_stay_the_same_objects(net):
    parameters = dict(net.named_parameters())
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    cs.convert(net, input_size=32)
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert {key: value.shape for key, value in net.state_dict().items()} == shapes


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152"])
def test_resnets_get_exactly_table_1(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cs.convert(model)
    table = {
        1: (64, (1, 2, 3, 4), (16, 16, 16, 16)),
        2: (128, (1, 2, 3), (64, 32, 32)),
        3: (256, (1, 2), (128, 128)),
        4: (512, (1,), (512,)),
    }
    rows = [row for row in cs.get_plan(model).rows if row.signature.kernel_size == (3, 3)]
    assert len(rows) == sum(model.get_submodule(f"layer{stage}").__len__() for stage in table)
    for row in rows:
        channels, dilations, splits = table[int(row.name.removeprefix("layer")[0])]
        assert (row.signature.out_channels, row.dilations, row.splits) == (channels, dilations, splits)
        assert row.converted == (len(dilations) > 1)


@pytest.mark.parametrize(("size", "levels"), [(224, "4321"), (288, "4432"), (448, "4432")])
def test_larger_inputs_shift_the_levels_by_the_rule(size, levels):
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    rows = cs.plan_conversion(model, input_size=size).rows
    by_stage = {row.name.removeprefix("layer")[0]: row.levels for row in rows if row.name.endswith("conv2")}
    assert "".join(str(by_stage[stage]) for stage in "1234") == levels


def test_momentum_survives_a_conversion_in_the_middle_of_training(net, image):
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(image).square().mean().backward()
    optimizer.step()
    momentum = copy.deepcopy(optimizer.state_dict())
    cs.convert(net, input_size=32)
    assert all(parameter in optimizer.state for parameter in net.parameters())
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum["state"][index]["momentum_buffer"])
    weight = net.stem.weight.clone()
    optimizer.zero_grad()
    net(image).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net.stem.weight, weight)


def test_flags_dtype_frozen_weights_and_hooks_survive(net, image):
    net.to(torch.bfloat16)
    net.body.train()
    net.stem.weight.requires_grad_(False)
    seen = []
    net.stem.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    cs.convert(net, input_size=32)
    assert seen == [], "planning must not fire other people's hooks"
    assert net.stem.weight.dtype == torch.bfloat16
    assert not net.stem.weight.requires_grad
    assert [m.training for m in (net, net.stem, net.body, net.body[0])] == [False, False, True, True]
    net(image.bfloat16())
    assert len(seen) == 1


def test_one_module_under_two_names_stays_one_module():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(8, 8, 3, padding=1)
            self.second = self.first
            self.block = nn.Sequential(self.first, nn.Conv2d(8, 2, 1))

        def forward(self, x):
            return self.block(self.second(self.first(x)))

    model = Aliased()
    cs.convert(model, input_size=(8, 16, 16))
    assert model.first is model.second is model.block[0]
    assert type(model.first) is cs.CoConv2d
    row = cs.get_plan(model).rows[0]
    assert (row.name, row.aliases, row.calls) == ("first", ("second", "block.0"), 3)


def test_a_module_called_at_two_sizes_takes_the_smallest():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.mix = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return [self.mix(self.conv(level)) for level in (x, x[..., ::2, ::2], x[..., ::4, ::4])]

    plan = cs.plan_conversion(Shared(), input_size=(8, 64, 64))
    assert (plan.rows[0].levels, plan.rows[0].output_sizes) == (3, ((64, 64), (32, 32), (16, 16)))
    plan = cs.plan_conversion(Shared(), cs.ResolutionPolicy(shared="max"), input_size=(8, 64, 64))
    assert plan.rows[0].levels == 4


def test_a_lone_convolution_is_converted_itself():
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1))[0]
    cs.convert(conv, overrides={"": 2}, input_size=16)
    assert type(conv) is cs.CoConv2d


def test_a_parametrized_convolution_keeps_its_parametrization(net, image):
    parametrizations.weight_norm(net.stem)
    before = net(image)
    cs.convert(net, input_size=32)
    assert isinstance(net.stem, cs.CoConv2d)
    assert "parametrizations.weight.original0" in net.stem.state_dict()
    assert not torch.equal(net(image), before)
    assert torch.equal(cs.revert(net)(image), before)


def test_revert_restores_outputs_bit_for_bit(net, image):
    before, modules = net(image), snapshot(net)
    cs.convert(net, input_size=32)
    assert not torch.equal(net(image), before)
    assert cs.revert(net) is net
    assert torch.equal(net(image), before)
    assert same(snapshot(net), modules)


def test_a_second_conversion_changes_nothing_and_says_so(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs.convert(net, input_size=32)
    modules = snapshot(net)
    with pytest.warns(cs.NoChangeWarning, match="already as planned"):
        cs.convert(net, input_size=32)
    assert same(snapshot(net), modules)


def test_another_policy_takes_a_converted_network_further(net):
    cs.convert(net, input_size=32)
    cs.convert(net, cs.UniformPolicy(4), input_size=32)
    assert net.stem.dilations == (1, 2, 3, 4)


def test_an_override_by_pattern_sets_the_levels_of_what_is_eligible():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    plan = cs.plan_conversion(model, overrides={"layer2.0.conv2": None, "layer[12]": 2, "conv1": (1, 2)})
    levels = {row.name: row.levels for row in plan.converted}
    assert [levels.get(name) for name in ("conv1", "layer1.0.conv2", "layer2.1.conv2", "layer3.0.conv2")] == [2] * 4
    assert not {"layer2.0.conv2", "layer1.0.conv1"} & levels.keys()


def test_what_is_excluded_stays_what_it_is(net):
    cs.convert(net, input_size=32, include="stem")
    assert (type(net.stem), type(net.body[0])) == (cs.CoConv2d, nn.Conv2d)
    cs.convert(net, cs.UniformPolicy(4), input_size=32, exclude="stem")
    assert (net.stem.levels, net.body[0].levels) == (3, 4)
    assert [row.levels for row in cs.get_plan(net).converted] == [3, 4]


def test_patterns_may_come_from_an_iterator(net):
    plan = cs.plan_conversion(net, input_size=32, include=iter(["stem", "body.*"]), exclude=(n for n in ["body.0"]))
    assert [row.name for row in plan.converted] == ["stem"]


def test_a_converted_network_copies_and_pickles_with_its_plan(net, image):
    cs.convert(net, input_size=32)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(image), net(image))
        assert cs.get_plan(twin) == cs.get_plan(net)


def test_get_plan_reads_what_is_there_when_the_plan_is_outdated(net):
    cs.convert(net, input_size=32)
    cs.revert(net.body)
    assert [row.levels for row in cs.get_plan(net).rows] == [3, 1, 1]
    assert cs.get_plan(net).policy == "as found"


def test_planning_leaves_the_network_exactly_as_it_was(net, image):
    net.train()
    state = copy.deepcopy(net.state_dict())
    modules = snapshot(net)
    cs.plan_conversion(net, input_size=32)
    assert net.training
    assert same(snapshot(net), modules)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_exact_name_wins_over_patterns_and_an_alias_is_a_name(net):
    net.again = net.stem
    net.odd = nn.ModuleDict({"a[0]": nn.Conv2d(3, 3, 3)})
    plan = cs.plan_conversion(net, input_size=32, include=["odd.a[0]", "again"], overrides={"*": 2, "again": 4})
    assert [row.levels for row in plan.rows if row.name in ("stem", "body.0")] == [4, 2]


def test_what_is_contextual_by_birth_is_left_as_it_is(net):
    net.body[0] = cs.CoConv2d(8, 8, 5, padding=2, stride=2, bias=False, dilations=(1, 3))
    cs.convert(net, input_size=32)
    assert net.body[0].dilations == (1, 3)
    assert {row.name for row in cs.get_plan(net).converted} == {"stem", "body.0"}


def test_a_new_classifier_is_counted(net):
    cs.convert(net, input_size=32)
    net.head = nn.Linear(6, 50)
    assert cs.get_plan(net).parameters == sum(parameter.numel() for parameter in net.parameters())


def test_old_spectral_norm_does_not_hide_who_reads_an_output():
    convs = [torch.nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1, bias=False)) for _ in range(3)]
    plan = cs.plan_conversion(nn.Sequential(*convs), input_size=(8, 32, 32))
    assert [row.converted for row in plan.rows] == [True, True, False]


# -- Graph modules ------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(net):
    return cs.convert(net, input_size=32, inplace=False)


def test_function_calls_of_an_exported_graph_are_rewritten(net, image, converted):
    exported = torch.export.export(net, (image,)).module()
    before = exported(image)
    cs.convert(exported)
    assert [row.dilations for row in cs.get_plan(exported).converted] == [(1, 2, 3), (1, 2)]
    torch.testing.assert_close(exported(image), converted(image))
    torch.testing.assert_close(copy.deepcopy(exported)(image), converted(image))
    torch.testing.assert_close(torch.export.export(exported, (image,)).module()(image), converted(image))
    assert torch.equal(cs.revert(exported)(image), before)


def test_a_graph_exported_with_an_open_batch_size_converts(net, image, converted):
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(net, (image,), dynamic_shapes=({0: batch},)).module()
    cs.convert(exported)
    torch.testing.assert_close(exported(image), converted(image))


def test_modules_called_by_a_symbolic_trace_are_converted(net, image, converted):
    graph = torch.fx.symbolic_trace(net)
    cs.convert(graph, input_size=32)
    torch.testing.assert_close(graph(image), converted(image))


def test_a_trace_of_a_converted_network_has_one_node_a_conv(net, converted, image):
    graph = torch.fx.symbolic_trace(converted)
    assert [node.target for node in graph.graph.nodes].count(cs.coconv2d) == 2
    torch.testing.assert_close(graph(image), converted(image))
    torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(image), converted(image))
    cs.revert(graph)
    assert cs.coconv2d not in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(image), net(image))
    torch.fx.symbolic_trace(net)  # still works: torch.fx keeps a global list of wrapped functions


# -- Copies -------------------------------------------------------------------------------------------------------


class Contrast(nn.Module):
    """An encoder, and what training has for a slow copy of it."""

    def __init__(self, net, build):
        super().__init__()
        self.query, self.key = net, build(net)

    def forward(self, x):
        return self.query(x)


def test_a_slow_copy_is_warned_of_and_takes_the_plan_of_its_original(net, image):
    model = Contrast(net, copy.deepcopy)
    with pytest.warns(cs.PlainCopyWarning, match=r'apply_plan\(model.get_submodule\("key"\), get_plan\(') as caught:
        cs.convert(model, input_size=32)
    assert len(caught) == 1
    cs.apply_plan(model.key, cs.get_plan(model.query))
    assert torch.equal(model.key(image), model.query(image))


def test_a_slow_copy_is_told_from_other_parts_that_are_built_alike():
    model = nn.ModuleList([timm.create_model("test_resnet") for _ in range(2)])
    model[0].forward_head = None
    model.append(copy.deepcopy(model[0]))
    model.forward = model[0].forward_features
    with torch.no_grad():
        for parameter in model[2].parameters():
            parameter.mul_(0.9)
    with pytest.warns(cs.PlainCopyWarning) as caught:
        cs.convert(model, input_size=64)
    assert [str(warning.message).partition(" ")[0] for warning in caught] == ["2"]


def test_parts_that_are_built_alike_are_no_copies(net, recwarn):
    cs.convert(Contrast(net, lambda net: type(net)()), input_size=32)
    assert not [warning for warning in recwarn if warning.category is cs.PlainCopyWarning]


def test_a_warning_that_is_an_error_changes_nothing(net):
    model = Contrast(net, copy.deepcopy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(cs.PlainCopyWarning):
            cs.convert(model, input_size=32)
    assert not cs.get_plan(model).converted


# -- Bad input ----------------------------------------------------------------------------------------------------


def in_a_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def ddp(net):
    if not torch.distributed.is_initialized():
        in_a_process_group()
    return nn.parallel.DistributedDataParallel(net)


def fsdp(net):
    if not torch.distributed.is_initialized():
        in_a_process_group()
    return FullyShardedDataParallel(net, device_id=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (lambda net: "resnet50", {}, TypeError, "must be a torch.nn.Module, not str"),
        (lambda net: net, {"policy": "resolutoin"}, ValueError, "did you mean 'resolution'"),
        (lambda net: net, {"policy": cs.ResolutionPolicy}, TypeError, r"as ResolutionPolicy\(\), not the class"),
        (lambda net: net, {"policy": 3}, TypeError, "a name or a callable, not int"),
        (lambda net: net, {"include": "bdoy.*"}, ValueError, "include: no convolution matches 'bdoy.*'.*'body.0'"),
        (lambda net: net, {"exclude": ["stem", "neck"]}, ValueError, "exclude: no convolution matches 'neck'"),
        (lambda net: net, {"overrides": {"layer9": 2}}, ValueError, "overrides: no convolution matches 'layer9'"),
        (lambda net: net, {"overrides": {"stem": 9}}, ValueError, r"overrides\['stem'\] gave stem.*9 levels"),
        (
            lambda net: net,
            {"overrides": {"body.2": 2}},
            ValueError,
            r"overrides\['body.2'\] names a conv that cannot be split: kernel 1×1",
        ),
        (lambda net: net, {"policy": lambda conv: 99}, ValueError, "gave stem the levels 99"),
        (lambda net: net, {"inplace": "no"}, TypeError, "inplace must be True or False, not str"),
        (fsdp, {}, TypeError, "is sharded, by FullyShardedDataParallel.*: do this to the network before"),
        (lambda net: fsdp(net).module, {}, TypeError, "is sharded, by FullyShardedDataParallel"),
        (lambda net: net, {"input_size": 10**7}, ValueError, "input_size=10000000 is too large: there is no memory"),
        (
            lambda net: net,
            {"input_size": None, "example_inputs": 5},
            TypeError,
            "example_inputs must be a tensor, a tuple of arguments, a dict of them by name, or Inputs, not int",
        ),
        (lambda net: net, {"input_size": None, "example_inputs": "x"}, TypeError, "example_inputs must be .*, not str"),
        (
            lambda net: net,
            {"input_size": None, "example_inputs": [None]},
            ValueError,
            "or example_inputs= that suit it",
        ),
        (lambda net: net, {"input_size": None}, ValueError, "give input_size="),
        (lambda net: net, {"input_size": (1, 2, 3, 4)}, ValueError, "input_size=.*height, width"),
        (lambda net: net, {"input_size": 0}, ValueError, "input_size=0"),
        (lambda net: net, {"input_size": (4, 32, 32)}, ValueError, "does not run on a 32 × 32 input"),
        (lambda net: net, {"example_inputs": torch.ones(1, 3, 32, 32)}, ValueError, "not both"),
        (ddp, {}, TypeError, "DistributedDataParallel: give model.module instead"),
        (nn.DataParallel, {}, TypeError, "DataParallel: give model.module instead"),
        (torch.compile, {}, TypeError, "OptimizedModule: give model._orig_mod instead"),
        (lambda net: torch.jit.trace(net, torch.ones(1, 3, 32, 32)), {}, TypeError, "before torch.jit"),
        (lambda net: nn.Sequential(net, nn.LazyConv2d(3, 3)), {}, ValueError, "model.1 is a lazy LazyConv2d"),
    ],
)
def test_bad_input_is_one_clear_error_and_no_change(net, image, change, arguments, error, message):
    before, changed = net(image), change(net)
    modules = snapshot(net)
    with pytest.raises(error, match=message):
        cs.convert(changed, **{"input_size": 32, **arguments})
    assert same(snapshot(net), modules)
    assert torch.equal(net(image), before)


def test_a_forward_that_was_replaced_by_a_function_is_named(net):
    original = net.body.forward
    net.body.forward = lambda x: original(x)
    with pytest.raises(TypeError, match=r"forward of model\.body was replaced by a function"):
        cs.convert(net, input_size=32)
    assert type(net.stem) is nn.Conv2d


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: cs.apply_plan(net, "plan.json"), r"plan must be a Plan, not str: Plan.from_json\(\) reads one"),
        (lambda net: cs.apply_plan(net, cs.Plan), r"plan must be a Plan, not the class Plan: Plan.from_json\(\)"),
        (lambda net: cs.load_converted("resnet18", "x"), "model must be a torch.nn.Module, not str"),
        (lambda net: cs.get_plan(None), "model must be a torch.nn.Module, not NoneType"),
    ],
)
def test_what_is_not_a_network_or_a_plan_is_named(net, call, message):
    with pytest.raises(TypeError, match=message):
        call(net)


def test_an_input_too_small_for_the_network_is_named():
    with pytest.raises(ValueError, match="VisionTransformer does not run on a 16 × 16 input"):
        cs.plan_conversion(timm.create_model("vit_tiny_patch16_224"), input_size=16)


def test_a_plan_for_another_network_is_refused_with_every_difference(net, image):
    other = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
    plan = cs.plan_conversion(other, input_size=32)
    before = net(image)
    with pytest.raises(cs.PlanError, match=r"(?s)2 missing in the network: 0; 1.*3 unexpected.*body\.0"):
        cs.apply_plan(net, plan)
    changed = copy.deepcopy(net)
    changed.body[0] = nn.Conv2d(8, 8, 5, padding=2, stride=2, bias=False)
    with pytest.raises(cs.PlanError, match=r"1 different in the network: body\.0 \(kernel_size=\(3, 3\), planned"):
        cs.apply_plan(net, cs.plan_conversion(changed, input_size=32))
    assert torch.equal(net(image), before)


# -- The package --------------------------------------------------------------------------------------------------


def test_importing_the_package_needs_torch_and_timm_alone():
    code = (
        "import sys, coconv_surgery; "
        "heavy = {'mmdet', 'mmcv', 'mmengine', 'matplotlib', 'click', 'rich'} & set(sys.modules); "
        "print(heavy)"
    )
    assert python(code).stdout == "set()\n"


def test_reverting_a_part_and_then_the_whole_is_reverting_the_whole():
    part = nn.Sequential(cs.CoConv2d(16, 8, 3, padding=1, levels=2), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), part, nn.Conv2d(8, 4, 1)).eval()
    image = torch.randn(1, 3, 32, 32)
    before = model(image)
    cs.convert(model, input_size=32)
    cs.revert(part)
    cs.revert(model)
    assert type(part[0]) is cs.CoConv2d
    assert torch.equal(model(image), before)
