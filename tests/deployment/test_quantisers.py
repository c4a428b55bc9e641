"""Quantisers take every convolution of a deployed network, and those that train with it every level before."""

import copy
import warnings

import nncf
import onnx
import onnxruntime
import openvino
import pytest
import timm
import torch
import torch.nn as nn
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from randomising import randomise_norms
from sampling import few
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.ao.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torch.ao.quantization.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from torch.ao.quantization.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

from coconv_surgery import convert, deploy

SIDE = 64
NETWORKS = few(("test_resnet", "test_efficientnet", "resnet18"), 1)


def x86(*, is_qat=False):
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=is_qat))


def xnnpack(*, is_qat=False):
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat))


@pytest.fixture(scope="module", params=NETWORKS)
def networks(request):
    """A plain network and the same one converted, both deployed, and images."""
    torch.manual_seed(0)
    plain = timm.create_model(request.param).eval()
    randomise_norms(plain)
    converted = convert(copy.deepcopy(plain), input_size=SIDE)
    return deploy(plain, input_size=SIDE), deploy(converted, input_size=SIDE), torch.rand(8, 3, SIDE, SIDE)


def convs(network):
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


def check(networks, quantise):
    """Every convolution is quantised, and the error is what it is in the plain network.

    Args:
        networks: The plain and the contextual network, deployed, and images.
        quantise: Gives the number of quantised convolutions, and what the quantised network makes of the images.
    """
    errors = []
    for network in networks[:2]:
        quantised, found = quantise(network, networks[2])
        assert quantised == convs(network)
        expected = network(networks[2])
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("quantiser", [x86, xnnpack])
def test_pt2e_quantises_every_convolution(networks, quantiser):
    def quantise(network, images):
        with warnings.catch_warnings(action="ignore"):
            prepared = prepare_pt2e(torch.export.export(network, (images,), strict=True).module(), quantiser())
            prepared(images)
            quantised = convert_pt2e(prepared)
        return sum(map(is_quantised, nodes(quantised))), quantised(images)

    check(networks, quantise)


def nodes(graph_module):
    return [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.conv2d.default]


def is_quantised(node):
    return all("dequantize" in str(source.target) for source in node.args[:2])


@pytest.mark.parametrize("quantiser", [x86, xnnpack])
@pytest.mark.parametrize("name", NETWORKS)
def test_pt2e_annotates_every_level_for_training(name, quantiser):
    network = convert(timm.create_model(name), input_size=SIDE)
    with warnings.catch_warnings(action="ignore"):
        exported = torch.export.export(network, (torch.rand(2, 3, SIDE, SIDE),), strict=True).module()
        prepared = prepare_qat_pt2e(exported, quantiser(is_qat=True))
    found = nodes(prepared)
    assert len(found) == convs(deploy(network, input_size=SIDE))
    assert all(source.op == "call_module" for node in found for source in node.args[:2])  # a fake quantisation each


def test_fx_mode_quantises_every_convolution(networks):
    def quantise(network, images):
        with warnings.catch_warnings(action="ignore"):
            prepared = prepare_fx(network, get_default_qconfig_mapping("x86"), images)
            prepared(images)
            quantised = convert_fx(prepared)
        assert convs(quantised) == 0
        kinds = [type(module) for module in quantised.modules()]
        return sum("quantized" in kind.__module__ and "Conv" in kind.__name__ for kind in kinds), quantised(images)

    check(networks, quantise)


class Images(CalibrationDataReader):
    def __init__(self, images):
        self.left = [{"images": images.numpy()}]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_onnx_runtime_quantises_every_convolution(networks, kind, tmp_path):
    def quantise(network, images):
        plain, written = tmp_path / "plain.onnx", tmp_path / "quantised.onnx"
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                network, (images,), plain, input_names=["images"], dynamo=True, external_data=False, verbose=False
            )
        if kind == "static":
            quantize_static(plain, written, Images(images))
        else:
            quantize_dynamic(plain, written, weight_type=QuantType.QUInt8)
        graph = onnx.load(written).graph
        makers = {output: node.op_type for node in graph.node for output in node.output}
        counted = sum(
            node.op_type == "ConvInteger"
            or (node.op_type == "Conv" and [makers.get(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2)
            for node in graph.node
        )
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        return counted, torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    check(networks, quantise)


def test_nncf_quantises_every_convolution(networks):
    def quantise(network, images):
        # On so few images a correction of the biases adds error to either network.
        options = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
        read, data = openvino.convert_model(network, example_input=images), nncf.Dataset([images.numpy()])
        quantised = nncf.quantize(read, data, advanced_parameters=options)
        found = [operation for operation in quantised.get_ops() if "Convolution" in operation.get_type_name()]
        counted = sum(
            above(operation.input_value(0).get_node(), "MaxPool", "VariadicSplit").get_type_name() == "FakeQuantize"
            and above(operation.input_value(1).get_node(), "Multiply", "Subtract", "Convert", "Reshape")
            .get_element_type()
            .is_integral_number()
            for operation in found
        )
        compiled = openvino.compile_model(quantised, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return counted, torch.from_numpy(compiled(images.numpy())[0])

    check(networks, quantise)


def above(node, *passed):
    """What a node gets its numbers from, through others of some types."""
    while node.get_type_name() in passed:
        node = node.input_value(0).get_node()
    return node
