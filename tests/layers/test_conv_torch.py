"""CoConv2d in PyTorch's tools, and switching a convolution into one and back."""

import copy
import pickle

import pytest
import torch
import torch.fx
import torch.nn as nn
from reference import naive_forward
from sampling import few
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from coconv_surgery import CoConv2d, coconv2d
from coconv_surgery.layers.switch import to_coconv_, to_conv_

KINDS = {
    "plain": {"levels": 3},
    "strided": {"levels": 4, "stride": 2, "bias": False},
    "grouped": {"levels": 3, "groups": 4},
    "depthwise": {"levels": 4, "groups": 8, "splits": "even"},
    "reflect": {"levels": 2, "padding_mode": "reflect"},
    "replicate": {"levels": 3, "padding_mode": "replicate"},
    "circular": {"levels": 2, "padding_mode": "circular"},
    "same": {"levels": 3, "padding": "same"},
    "pairs": {"dilations": ((1, 2), (3, 1)), "splits": (5, 3)},
}


def build(kind, **changes):
    torch.manual_seed(0)
    return CoConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, **KINDS[kind], **changes})


def images(batch=2):
    return torch.randn(batch, 8, 11, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def coconv(request):
    return build(request.param)


# ------------------------------------------------------------------------------------------------- PyTorch's tools


def test_autocast_computes_in_bfloat16(coconv):
    input = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = coconv(input)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert coconv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), naive_forward(coconv, input), atol=2e-2, rtol=2e-2)


def test_channels_last_is_kept_and_changes_no_number(coconv):
    input = images()
    expected = naive_forward(coconv, input)
    output = coconv.to(memory_format=torch.channels_last)(input.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_gradient_has_the_layout_of_the_input(groups, stride, memory_format):
    conv = torch.nn.Conv2d(24, 24, 3, stride, padding=1, groups=groups)
    to_coconv_(conv, (1, 2, 3))
    input = torch.rand(2, 24, 12, 12).contiguous(memory_format=memory_format).requires_grad_()
    inside = input * 1  # a leaf's gradient is laid out as the leaf is
    (gradient,) = torch.autograd.grad(conv.to(memory_format=memory_format)(inside).sum(), inside)
    assert gradient.is_contiguous(memory_format=memory_format)


def test_a_deepcopy_computes_the_same_with_parameters_of_its_own(coconv):
    twin = copy.deepcopy(coconv)
    assert (twin.levels, twin.dilations, twin.splits) == (coconv.levels, coconv.dilations, coconv.splits)
    assert torch.equal(twin(images()), coconv(images()))
    expected = coconv(images())
    nn.init.zeros_(twin.weight)
    assert torch.equal(coconv(images()), expected)


def test_a_pickled_module_computes_the_same(coconv):
    restored = pickle.loads(pickle.dumps(coconv))
    assert repr(restored) == repr(coconv)
    assert torch.equal(restored(images()), coconv(images()))


def test_conv_forward_uses_the_weights_it_is_given(coconv):
    weight, bias = torch.randn_like(coconv.weight), torch.randn(8)
    output = coconv._conv_forward(images(), weight, bias)
    torch.testing.assert_close(output, naive_forward(coconv, images(), weight=weight, bias=bias))


def test_fused_with_batch_norm_it_keeps_its_levels(coconv):
    norm = nn.BatchNorm2d(8)
    norm(10 * images() + 3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    coconv.eval(), norm.eval()
    fused = fuse_conv_bn_eval(coconv, norm)
    assert (fused.dilations, fused.splits) == (coconv.dilations, coconv.splits)
    torch.testing.assert_close(fused(images()), norm(naive_forward(coconv, images())))


def test_fx_sees_one_call(coconv):
    traced = torch.fx.symbolic_trace(coconv)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [coconv2d]
    assert torch.equal(traced(images()), coconv(images()))


@pytest.mark.parametrize("kind", ["plain", "grouped"])
def test_compiled_as_one_graph_it_computes_and_differentiates_the_same(kind):
    coconv = build(kind, levels=2)
    output = torch.compile(coconv, fullgraph=True, backend="inductor")(images())
    expected = naive_forward(coconv, images())
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), list(coconv.parameters()))
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(coconv.parameters()))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def test_exported_it_computes_the_same(coconv):
    program = torch.export.export(coconv, (images(),))
    torch.testing.assert_close(program.module()(images()), naive_forward(coconv, images()))


def test_exported_with_a_dynamic_batch_it_takes_any(coconv):
    program = torch.export.export(coconv, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 5):
        torch.testing.assert_close(program.module()(images(batch)), naive_forward(coconv, images(batch)))


@pytest.mark.parametrize("kind", few(["plain", "strided", "grouped", "reflect", "pairs"], 3))
def test_onnxruntime_computes_the_same_for_any_batch(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    coconv = build(kind).eval()
    file = tmp_path / "coconv.onnx"
    batch = ({0: "batch"},)
    torch.onnx.export(coconv, (images(),), file, dynamo=True, dynamic_shapes=batch, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession(file)
    for size in (1, 3):
        (output,) = session.run(None, {"x": images(size).numpy()})
        torch.testing.assert_close(
            torch.from_numpy(output), naive_forward(coconv, images(size)).detach(), rtol=0, atol=1e-5
        )


# ---------------------------------------------------------------------------------------- from a convolution, and back


def plain_conv(kind):
    coconv = build(kind)
    arguments = {"stride": coconv.stride, "padding": coconv.padding, "groups": coconv.groups}
    conv = nn.Conv2d(8, 8, 3, **arguments, bias=coconv.bias is not None, padding_mode=coconv.padding_mode)
    return conv, coconv.dilations, coconv.splits


@pytest.fixture(params=KINDS)
def conv_and_levels(request):
    return plain_conv(request.param)


def test_from_conv_shares_the_parameters_and_leaves_the_conv_alone(conv_and_levels):
    conv, dilations, splits = conv_and_levels
    before = conv(images())
    coconv = CoConv2d.from_conv(conv, dilations=dilations, splits=splits)
    assert coconv.weight is conv.weight
    assert coconv.bias is conv.bias
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv(images()), before)
    to_coconv_(conv, dilations, splits)
    assert torch.equal(coconv(images()), conv(images()))


def test_from_conv_keeps_flags_and_dtype_and_draws_no_random_number():
    conv = nn.Conv2d(8, 8, 3, dtype=torch.bfloat16).requires_grad_(False).eval()
    state = torch.get_rng_state()
    coconv = CoConv2d.from_conv(conv, levels=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not coconv.training
    assert not coconv.weight.requires_grad
    assert coconv.weight.dtype == torch.bfloat16


def test_switched_in_place_it_computes_the_reference(conv_and_levels):
    conv, dilations, splits = conv_and_levels
    to_coconv_(conv, dilations, splits)
    assert type(conv) is CoConv2d
    assert (conv.dilations, conv.splits) == (dilations, splits)
    torch.testing.assert_close(conv(images()), naive_forward(conv, images()))


def test_switched_back_it_is_what_it_was(conv_and_levels):
    conv, dilations, splits = conv_and_levels
    contents, output = dict(vars(conv)), conv(images())
    parameters = [id(parameter) for parameter in conv.parameters()]
    to_coconv_(conv, dilations, splits)
    to_conv_(conv)
    assert type(conv) is nn.Conv2d
    assert vars(conv) == contents
    assert [id(parameter) for parameter in conv.parameters()] == parameters
    assert torch.equal(conv(images()), output)


def test_switched_again_it_takes_the_new_levels():
    conv, *levels = plain_conv("plain")
    to_coconv_(conv, *levels)
    to_coconv_(conv, (1, 4), (2, 6))
    assert (conv.dilations, conv.splits) == ((1, 4), (2, 6))
    torch.testing.assert_close(conv(images()), naive_forward(conv, images()))


def test_another_dilation_set_by_hand_is_refused_as_the_levels_would_not_follow_it():
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    to_coconv_(conv, (1, 2))
    conv.dilation = 1  # its own
    with pytest.raises(AttributeError, match=r"the levels have dilations of their own, \(1, 2\)"):
        conv.dilation = (2, 2)
    assert conv.dilation == 1
    to_conv_(conv)
    conv.dilation = (2, 2)


def test_a_subclass_of_coconv_keeps_its_class_with_new_levels():
    class Registered(CoConv2d):
        pass

    coconv = Registered(8, 8, 3, padding=1, levels=2)
    to_coconv_(coconv, (1, 4), (2, 6))
    assert type(coconv) is Registered
    assert (coconv.dilations, coconv.splits) == ((1, 4), (2, 6))


def test_levels_that_cannot_be_leave_the_conv_as_it_was():
    conv, *_ = plain_conv("plain")
    contents = dict(vars(conv))
    with pytest.raises(ValueError, match="sum up to the 8 out_channels"):
        to_coconv_(conv, (1, 2), (4, 5))
    assert type(conv) is nn.Conv2d
    assert vars(conv) == contents


def test_hooks_frozen_weights_and_the_eval_flag_survive_the_switch():
    conv, *levels = plain_conv("plain")
    seen = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    conv.eval().weight.requires_grad_(False)
    to_coconv_(conv, *levels)
    conv(images())
    assert seen == [CoConv2d]
    assert not conv.training
    assert [parameter.requires_grad for parameter in conv.parameters()] == [False, True]


def test_momentum_survives_the_switch():
    conv, *levels = plain_conv("plain")
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1, momentum=0.9)
    conv(images()).sum().backward()
    optimizer.step()
    momentum = optimizer.state[conv.weight]["momentum_buffer"].clone()
    to_coconv_(conv, *levels)
    before = conv.weight.detach().clone()
    optimizer.zero_grad()
    conv(images()).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(conv.weight, before - 0.1 * (0.9 * momentum + conv.weight.grad))


def test_weight_norm_computes_the_reference_once_switched(conv_and_levels):
    conv, dilations, splits = conv_and_levels
    weight_norm(conv)
    keys = list(conv.state_dict())
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(1.5)
    weight = conv.weight.detach().clone()
    to_coconv_(conv, dilations, splits)
    assert isinstance(conv, CoConv2d)
    assert is_parametrized(conv, "weight")
    assert list(conv.state_dict()) == keys
    assert torch.equal(conv.weight, weight)
    torch.testing.assert_close(conv(images()), naive_forward(conv, images(), weight=weight))


def test_weight_norm_gradients_pass_through_every_level():
    conv, *levels = plain_conv("plain")
    weight_norm(conv)
    to_coconv_(conv, *levels)
    originals = list(conv.parametrizations.weight.parameters())
    gradients = torch.autograd.grad(conv(images()).square().sum(), originals)
    expected = torch.autograd.grad(naive_forward(conv, images()).square().sum(), originals)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_weight_norm_survives_the_way_back():
    conv, *levels = plain_conv("plain")
    weight_norm(conv)
    output = conv(images())
    to_coconv_(conv, *levels)
    to_conv_(conv)
    assert not isinstance(conv, CoConv2d)
    assert is_parametrized(conv, "weight")
    assert torch.equal(conv(images()), output)
    remove_parametrizations(conv, "weight")
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv(images()), output)


def test_weight_norm_can_be_removed_from_a_switched_conv():
    conv, *levels = plain_conv("plain")
    weight_norm(conv)
    to_coconv_(conv, *levels)
    output = conv(images())
    remove_parametrizations(conv, "weight")
    assert type(conv) is CoConv2d
    assert torch.equal(conv(images()), output)


def test_weight_norm_can_be_put_on_and_copied():
    coconv = build("plain")
    output = coconv(images())
    twin = copy.deepcopy(weight_norm(coconv))
    assert isinstance(twin, CoConv2d)
    torch.testing.assert_close(twin(images()), output)
    to_conv_(twin)
    assert not isinstance(twin, CoConv2d)
    assert isinstance(coconv, CoConv2d)


def test_old_style_weight_norm_computes_the_reference_and_comes_back():
    conv, *levels = plain_conv("plain")
    old_weight_norm(conv)
    output = conv(images())
    to_coconv_(conv, *levels)
    with torch.no_grad():
        conv.weight_g.mul_(2)
    switched = conv(images())
    torch.testing.assert_close(switched, naive_forward(conv, images()))
    with torch.no_grad():
        conv.weight_g.div_(2)
    to_conv_(conv)
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv(images()), output)


def test_a_bound_forward_that_somebody_keeps_goes_with_the_class():
    conv, image = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 9, 9)
    plain = conv.forward
    to_coconv_(conv, (1, 2))
    contextual, expected = conv.forward, conv(image)
    assert torch.equal(plain(image), expected)
    conv.forward = lambda input: contextual(input)  # as accelerate and profilers wrap it
    assert torch.equal(conv(image), expected)
    to_conv_(conv)
    assert torch.equal(contextual(image), conv(image))
