"""Together with other surgery, before and after: right, or one clear refusal that names the order that works."""

import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, parametrize, prune

import coconv_surgery as cs


def convert(net):
    return cs.convert(net, input_size=32)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# -- Adapters -----------------------------------------------------------------------------------------------------

ADAPTERS = {
    "LoRA": ("LoraConfig", {"r": 4, "init_lora_weights": False}),
    "DoRA": ("LoraConfig", {"r": 4, "init_lora_weights": False, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 4, "init_weights": False}),
    "LoKr": ("LoKrConfig", {"r": 4, "init_weights": False}),
    "HRA": ("HRAConfig", {"r": 4}),
    "IA3": ("IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}),
}


def adapt(net, *targets, kind="LoRA"):
    peft = pytest.importorskip("peft")
    name, arguments = ADAPTERS[kind]
    adapted = peft.get_peft_model(net, getattr(peft, name)(target_modules=list(targets), **arguments)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    return adapted


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_convolution_stays_plain_and_merges_exactly(net, image, kind):
    adapted = convert(adapt(net, "body.0", kind=kind))
    reasons = {row.name.partition("model.model.")[2]: row.reason_key for row in cs.get_plan(adapted).rows}
    assert reasons.pop("stem") is None
    assert {key for name, key in reasons.items() if name.startswith("body.0.")} <= {cs.Reason.ADAPTED, cs.Reason.KERNEL}
    assert reasons["body.0.base_layer"] is cs.Reason.ADAPTED
    before = adapted(image)
    adapted.merge_adapter()
    close(adapted(image), before)
    adapted.unmerge_adapter()
    alone = adapted.merge_and_unload()
    close(alone(image), before)
    assert (type(alone.stem), type(alone.body[0])) == (cs.CoConv2d, nn.Conv2d)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_on_a_contextual_convolution_is_refused(net, kind):
    with pytest.raises(TypeError, match=r"adapt a contextual convolution.*revert\(\) the network, adapt it, and conv"):
        adapt(convert(net), "body.0", kind=kind)


def test_a_network_that_refused_an_adapter_takes_it_reverted(net, image):
    with pytest.raises(TypeError, match="contextual"):
        adapt(convert(net), "body.0")
    adapted = adapt(cs.revert(net), "body.0")
    before = convert(adapted)(image)
    close(adapted.merge_and_unload()(image), before)


def test_what_stayed_plain_is_adapted_after_a_conversion_and_merges_exactly(net, image):
    adapted = adapt(convert(net), "body.2", "head")
    before = adapted(image)
    close(adapted.merge_and_unload()(image), before)
    assert [row.name for row in cs.get_plan(net).converted] == ["stem", "body.0"]


def test_what_an_adapter_was_merged_into_converts(net):
    alone = convert(adapt(net, "body.0").merge_and_unload())
    assert [row.name for row in cs.get_plan(alone).converted] == ["stem", "body.0"]


def test_a_part_of_an_adapter_is_not_converted_by_name_or_by_a_plan(net):
    adapted = adapt(net, "body.0")
    name = "base_model.model.body.0.base_layer"
    with pytest.raises(ValueError, match="names a conv that cannot be split: it is within an adapter"):
        cs.convert(adapted, input_size=32, overrides={name: 2})
    plan = cs.plan_conversion(adapted, input_size=32)
    rows = [
        replace(row, dilations=(1, 2), splits=(4, 4), reason=None) if row.name == name else row for row in plan.rows
    ]
    with pytest.raises(cs.PlanError, match=rf"{name} \(it is within an adapter"):
        cs.apply_plan(adapted, replace(plan, rows=tuple(rows)))


def test_saved_adapters_come_back_before_the_plan(net, image, tmp_path):
    peft = pytest.importorskip("peft")
    plain = copy.deepcopy(net)
    adapted = convert(adapt(net, "body.0"))
    adapted.save_pretrained(tmp_path)
    again = cs.apply_plan(peft.PeftModel.from_pretrained(plain, tmp_path), cs.get_plan(adapted)).eval()
    assert torch.equal(again(image), adapted(image))


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_a_module_that_peft_trains_a_copy_of_is_what_its_original_is(net, image, first):
    peft = pytest.importorskip("peft")
    if first == "convert":
        convert(net)
    adapted = peft.get_peft_model(net, peft.LoraConfig(target_modules=["head"], modules_to_save=["body"], r=2)).eval()
    if first == "adapt":
        convert(adapted)
    before = adapted(image)
    with adapted.disable_adapter():
        close(adapted(image), before)
    alone = adapted.merge_and_unload()
    close(alone(image), before)
    assert (type(alone.stem), type(alone.body[0])) == (cs.CoConv2d, cs.CoConv2d if first == "convert" else nn.Conv2d)


# -- Pruning ------------------------------------------------------------------------------------------------------


def thin(net, image, layer="stem", channels=(1, 4, 6)):
    pruning = pytest.importorskip("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(net, example_inputs=image)
    graph.get_pruning_group(net.get_submodule(layer), pruning.prune_conv_out_channels, idxs=list(channels)).prune()
    return net


def test_a_pruned_network_converts_and_reverts(net, image):
    before = thin(net, image)(image)
    assert [row.splits for row in cs.get_plan(convert(net)).converted] == [(3, 1, 1), (4, 4)]
    assert not torch.equal(net(image), before)
    assert torch.equal(cs.revert(net)(image), before)


@pytest.mark.parametrize(
    "use",
    [
        lambda net, plan, path: net(torch.ones(1, 3, 32, 32)),
        lambda net, plan, path: cs.get_plan(net),
        lambda net, plan, path: convert(net),
        lambda net, plan, path: cs.plan_conversion(net, input_size=32),
        lambda net, plan, path: cs.apply_plan(net, plan),
        lambda net, plan, path: cs.save_converted(net, path),
    ],
    ids=["forward", "get_plan", "convert", "plan_conversion", "apply_plan", "save_converted"],
)
def test_a_contextual_convolution_that_was_pruned_says_so(net, image, tmp_path, use):
    plan = cs.get_plan(convert(net))
    thin(net, image)
    with pytest.raises(ValueError, match=r"splits.* prun(ed|ing).*revert\(\)"):
        use(net, plan, tmp_path / "file.safetensors")


def test_a_contextual_convolution_that_was_pruned_reverts_and_converts_anew(net, image):
    expected = thin(copy.deepcopy(net), image)
    thin(convert(net), image)
    assert torch.equal(cs.revert(net)(image), expected(image))
    assert torch.equal(convert(net)(image), convert(expected)(image))


def test_a_plain_convolution_is_pruned_after_a_conversion_as_before_it(net, image):
    expected = convert(thin(copy.deepcopy(net), image, layer="body.2", channels=(0, 3)))
    thin(convert(net), image, layer="body.2", channels=(0, 3))
    assert torch.equal(net(image), expected(image))
    assert [row.splits for row in cs.get_plan(net).converted] == [(4, 2, 2), (4, 4)]


def test_the_inputs_of_a_contextual_convolution_are_pruned(net, image):
    expected = convert(thin(copy.deepcopy(net), image))
    cs.convert(net, input_size=32, include="body.*")
    thin(net, image)
    convert(net)
    assert torch.equal(net(image), expected(image))


@pytest.mark.parametrize("first", ["prune", "convert"])
def test_masks_of_torch_prune_hold_in_either_order(net, image, first):
    expected = copy.deepcopy(net)
    steps = [lambda: prune.ln_structured(net.stem, "weight", 0.5, n=2, dim=0), lambda: convert(net)]
    for step in steps if first == "prune" else steps[::-1]:
        step()
    prune.ln_structured(expected.stem, "weight", 0.5, n=2, dim=0)
    prune.remove(expected.stem, "weight")
    close(net(image), convert(expected)(image))
    prune.remove(net.stem, "weight")
    close(net(image), expected(image))


# -- Parametrizations ---------------------------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "custom": lambda conv: parametrize.register_parametrization(conv, "weight", Halved(), unsafe=True),
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("first", ["parametrize", "convert"])
def test_a_parametrized_convolution_computes_with_the_weight_that_it_reports(net, image, kind, first):
    expected = copy.deepcopy(net)
    steps = [lambda: PARAMETRIZATIONS[kind](net.stem), lambda: convert(net)]
    for step in steps if first == "parametrize" else steps[::-1]:
        step()
    net.eval()
    with torch.no_grad():
        expected.stem.weight.copy_(net.stem.weight)
    close(net(image), convert(expected)(image))
    parametrize.remove_parametrizations(net.stem, "weight")
    close(net(image), expected(image))
    assert type(cs.revert(net).stem) is nn.Conv2d


# -- Quantisation -------------------------------------------------------------------------------------------------


@pytest.fixture
def quantisable():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()


def nearly(found, expected):
    """What eight bits leave of it."""
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("first", ["convert", "prepare"])
def test_fx_graph_mode_leaves_contextual_convolutions_in_floating_point(quantisable, image, first):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    expected = convert(copy.deepcopy(quantisable))(image)
    net = convert(quantisable) if first == "convert" else quantisable
    prepared = prepare_fx(net, get_default_qconfig_mapping("x86"), (image,))
    if first == "prepare":
        convert(prepared)
    close(prepared(image), expected)
    nearly(convert_fx(prepared)(image), expected)


def test_quantisation_aware_training_comes_after_a_conversion(quantisable, image):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    expected = convert(copy.deepcopy(quantisable))(image)
    mapping = get_default_qat_qconfig_mapping("x86")
    late = prepare_qat_fx(copy.deepcopy(quantisable).train(), mapping, (image,)).eval()
    with pytest.warns(cs.NoChangeWarning, match="ConvReLU2d has a forward of its own"):
        convert(late)
    prepared = prepare_qat_fx(convert(quantisable).train(), mapping, (image,)).eval()
    prepared(image)
    nearly(convert_fx(prepared)(image), expected)


@pytest.mark.parametrize("first", ["convert", "export"])
def test_pt2e_works_with_either_order_of_conversion_and_export(quantisable, image, first):
    from torch.ao.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e

    expected = convert(copy.deepcopy(quantisable))(image)
    net = convert(quantisable) if first == "convert" else quantisable
    graph = torch.export.export(net, (image,)).module()
    if first == "export":
        cs.convert(graph, example_inputs=image)
    prepared = prepare_pt2e(graph, eight_bits())
    close(prepared(image), expected)
    quantised = convert_pt2e(prepared)
    nearly(quantised(image), expected)
    floating = [node for node in quantised.graph.nodes if node.target is cs.coconv2d]
    assert len(floating) == (2 if first == "export" else 0)


@pytest.mark.parametrize("quantised", [False, True], ids=["prepared", "quantised"])
def test_a_converted_network_that_pt2e_has_prepared_does_not_revert(quantisable, image, quantised):
    from torch.ao.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e

    graph = prepare_pt2e(torch.export.export(convert(quantisable), (image,)).module(), eight_bits())
    graph(image)
    graph = convert_pt2e(graph) if quantised else graph
    assert [row.reason_key for row in cs.get_plan(graph).rows] == [*8 * [cs.Reason.FIXED_LEVELS], cs.Reason.PLAIN]
    before = graph(image)
    with pytest.raises(ValueError, match=r"level of a contextual convolution, taken apart.*revert before the export"):
        cs.revert(graph)
    assert torch.equal(graph(image), before)


def test_what_pt2e_has_prepared_is_left_alone_with_a_reason(quantisable, image):
    from torch.ao.quantization.quantize_pt2e import prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(quantisable, (image,)).module(), eight_bits())
    with pytest.warns(cs.NoChangeWarning, match="its weight is computed"):
        cs.convert(prepared, example_inputs=image)


def eight_bits():
    from torch.ao.quantization.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config())


@pytest.mark.parametrize("first", ["convert", "prepare"])
def test_eager_quantisation_of_a_contextual_convolution_is_refused(quantisable, image, first):
    from torch.ao import quantization

    net = convert(quantisable) if first == "convert" else quantisable
    net = quantization.QuantWrapper(net)
    net.qconfig = quantization.get_default_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.prepare(net, inplace=True)
        if first == "prepare":
            convert(net)
        net(image)
        quantization.convert(net, inplace=True)
    with pytest.raises(TypeError, match=r"input is quantised.*eager quantisation does not know it; use torch.ao's FX"):
        net(image)


@pytest.mark.parametrize("first", ["convert", "quantise"])
def test_dynamic_quantisation_of_linear_layers_goes_in_either_order(net, image, first):
    from torch.ao.quantization import quantize_dynamic

    expected = convert(copy.deepcopy(net))(image)
    steps = [lambda: quantize_dynamic(net, {nn.Linear}, inplace=True), lambda: convert(net)]
    for step in steps if first == "quantise" else steps[::-1]:
        step()
    nearly(net(image), expected)


# -- The page -----------------------------------------------------------------------------------------------------


def test_the_page_names_tests_that_there_are_and_all_of_these(request):
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "together-with.md").read_text()
    files = "test_together_with", "test_where_networks_live", "two_ranks"
    defined = {name for file in files for name in re.findall(r"^def (\w+)\(", (tests / f"{file}.py").read_text(), re.M)}
    named = {name for name in re.findall(r"`(\w+)`", page) if name.count("_") > 3}
    assert named <= defined
    checks = set(re.findall(r"^    (\w+),$", (tests / "two_ranks.py").read_text().partition("CHECKS = [")[2], re.M))
    assert named >= checks | {name for name in defined if name.startswith("test_")} - {request.node.name}
