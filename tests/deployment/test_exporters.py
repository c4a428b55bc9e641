"""A converted network is traced, exported and counted as a plain one, without being deployed."""

import copy
import warnings

import openvino
import pnnx
import ptflops
import pytest
import thop
import timm
import torch
from ptflops.pytorch_ops import conv_flops_counter_hook
from thop.vision.basic_hooks import count_convNd
from torch.utils.tensorboard import SummaryWriter

from coconv_surgery import CoConv2d, convert, revert

# One of each kind of family: strided, grouped, depthwise, standardised, "same" padding, merging, attention.
NAMES = ("test_resnet", "test_efficientnet", "test_nfnet", "test_byobnet")
LARGER = ("resnet18", "resnetv2_50d_gn", "repvgg_a0", "regnety_002")


@pytest.fixture(params=[*NAMES, *(pytest.param(name, marks=pytest.mark.long) for name in LARGER)])
def network(request):
    return convert(timm.create_model(request.param), input_size=64).eval()


IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_jit_trace_with_its_check_gives_equal_outputs(network):
    traced = torch.jit.trace(network, IMAGE)
    torch.testing.assert_close(traced(IMAGE), network(IMAGE))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_export_with_gradients_on_is_the_one_without(network, strict):
    def operations():
        exported = torch.export.export(network, (IMAGE,), strict=strict)
        return [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]

    with_gradients = operations()
    assert not any("slice" in name for name in with_gradients)
    with torch.no_grad():
        without = operations()
    wrapped = ("_set_grad_enabled", "wrap_with_set_grad_enabled")
    assert with_gradients == [name for name in without if not name.endswith(wrapped)]


def test_tensorboard_draws_it(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(convert(timm.create_model("resnet18"), input_size=64), IMAGE)
    (events,) = tmp_path.iterdir()
    assert events.stat().st_size > 10_000


def test_openvino_reads_it_from_an_example(network):
    with warnings.catch_warnings(action="ignore"):
        read = openvino.convert_model(network, example_input=IMAGE)
    compiled = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = network(IMAGE)
    found = torch.from_numpy(compiled(IMAGE.numpy())[0])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_pnnx_reads_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = convert(timm.create_model("resnet18"), input_size=64).eval()
    expected = network(IMAGE)
    found = pnnx.export(network, "network.pt", (IMAGE,))(IMAGE)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "test_nfnet", "regnety_002"])
def test_counters_that_look_up_types_are_told_in_one_line(name):
    network = convert(timm.create_model(name), input_size=64).eval()
    plain = revert(copy.deepcopy(network))
    with warnings.catch_warnings(action="ignore"):
        told = {type(module): count_convNd for module in network.modules() if isinstance(module, CoConv2d)}
        usual = {type(module): count_convNd for module in plain.modules() if isinstance(module, torch.nn.Conv2d)}
        counts = [
            thop.profile(copy.deepcopy(model), (IMAGE,), custom_ops=ops, verbose=False)
            for model, ops in ((network, told | usual), (plain, usual))
        ]
        assert counts[0] == counts[1]
        told = {type(module): conv_flops_counter_hook for module in network.modules() if isinstance(module, CoConv2d)}
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
        counts = [
            ptflops.get_model_complexity_info(model, (3, 64, 64), custom_modules_hooks=ops, **options)
            for model, ops in ((network, told), (plain, {}))
        ]
        assert counts[0][1] == counts[1][1]
        assert name == "test_nfnet" or counts[0] == counts[1]
