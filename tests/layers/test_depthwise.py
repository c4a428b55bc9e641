"""The operator for depthwise levels computes what the levels one by one compute, and is used where it is for."""

import copy
import logging
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from cases import assert_close, compositions
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from coconv_surgery import CoConv2d, build_depthwise
from coconv_surgery.layers import depthwise


@pytest.fixture(scope="module", autouse=True)
def _built(tmp_path_factory):
    """Both processes of a test run share one library, in a folder of the run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch, FileLock(folder / "depthwise.lock"):
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.delenv("COCONV_NATIVE")
        build_depthwise()
        assert depthwise.operators() is not None
        yield
    depthwise.operators.cache_clear()


@pytest.fixture
def used(monkeypatch):
    """How often the operator was used."""
    calls = []
    kept = depthwise._operators
    monkeypatch.setattr(depthwise, "_operators", lambda: calls.append(1) or kept())
    return calls


@st.composite
def cases(draw):
    """A depthwise contextual convolution, and the map that it is run on."""
    channels = draw(st.integers(2, 70))
    levels = draw(st.integers(1, min(4, channels)))
    dilation, padding = draw(st.integers(1, 2)), draw(st.integers(0, 3))
    stride = draw(st.sampled_from([1, 2]))
    dilations = sorted(draw(st.lists(st.integers(dilation, 5), min_size=levels, max_size=levels)))
    splits = draw(compositions(channels, levels))
    least = max(1, 2 * dilation + 1 - 2 * padding)
    shape = (draw(st.integers(1, 2)), channels, least + draw(st.integers(0, 12)), least + draw(st.integers(0, 12)))
    torch.manual_seed(draw(st.integers(0, 5)))
    coconv = CoConv2d(
        *(channels, channels, 3, stride, padding, dilation, channels, draw(st.booleans())),
        dilations=dilations,
        splits=splits,
    )
    image = torch.randn(shape)
    return coconv, image.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else image


def everything(coconv, image):
    """The output, and the gradients by input and parameters, of numbers that differ from pixel to pixel."""
    image = image.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = coconv(image)
    numbers = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, (image, *coconv.parameters()), numbers)]


@settings(max_examples=300, deadline=None)
@given(cases())
def test_output_and_gradients_are_those_of_double_precision(case):
    coconv, image = case
    found = everything(coconv, image)
    expected = everything(copy.deepcopy(coconv).double(), image.double())
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, torch.float32)


def layer(stride=1, **arguments):
    return CoConv2d(24, 24, 3, stride, 1, groups=24, **{"levels": 3} | arguments)


@pytest.fixture
def image():
    return torch.randn(2, 24, 14, 14)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_used_and_keeps_the_memory_format(stride, memory_format, image, used):
    image = image.contiguous(memory_format=memory_format)
    with torch.no_grad():
        output = layer(stride)(image)
    assert used == [1]
    assert output.is_contiguous(memory_format=memory_format)
    everything(layer(stride), image)
    assert len(used) == 4  # forward, and two gradients


def test_training_saves_the_input_and_the_parameters_alone(image, used):
    coconv, saved = layer(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        coconv(image.requires_grad_())
    assert used
    assert {tensor.data_ptr() for tensor in saved} == {t.data_ptr() for t in (image, coconv.weight, coconv.bias)}


def test_second_derivatives_are_right(image, used):
    coconv = layer()
    image = image[:1, :, :5, :5].contiguous().requires_grad_()

    def penalty(coconv, image):
        (gradient,) = torch.autograd.grad(coconv(image).square().sum(), image, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (image, coconv.weight, coconv.bias))

    found = penalty(coconv, image)
    assert used
    expected = penalty(copy.deepcopy(coconv).double(), image.detach().double().requires_grad_())
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, torch.float32)


def frozen(coconv):
    coconv.requires_grad_(False)
    return coconv


@pytest.mark.parametrize(
    ("run", "is_used"),
    [
        (lambda coconv, image: coconv(image), True),
        (lambda coconv, image: frozen(coconv)(image.requires_grad_()), True),
        (lambda coconv, image: checkpoint(coconv, image, use_reentrant=False), True),
        (lambda coconv, image: coconv(image[:0]), True),
        (lambda coconv, image: coconv(image[..., :1, :1].contiguous()), True),
        (lambda coconv, image: coconv(image.expand(2, -1, -1, -1)), True),
        (lambda coconv, image: coconv(image[..., ::2]), False),
        (lambda coconv, image: coconv(image[0]), False),
        (lambda coconv, image: coconv.double()(image.double()), False),
        (lambda coconv, image: coconv.bfloat16()(image.bfloat16()), False),
        (lambda coconv, image: coconv.to("meta")(image.to("meta")), False),
        (lambda coconv, image: torch.vmap(coconv)(image[:, None]), False),
        (lambda coconv, image: torch.jit.trace(coconv, image, check_trace=False)(image), False),
        (lambda coconv, image: torch.export.export(coconv, (image,)).module()(image), False),
    ],
)
def test_whatever_runs_it_computes_the_same(run, is_used, image, used, monkeypatch):
    coconv = layer()
    found = run(copy.deepcopy(coconv), image)
    assert bool(used) == is_used
    monkeypatch.setattr(depthwise, "operators", lambda: None)
    expected = run(copy.deepcopy(coconv), image.detach())
    assert found.shape == expected.shape
    if not found.is_meta:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_autocast_forward_mode_and_compilation_go_level_by_level(image, used):
    coconv = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert coconv(image).dtype == torch.bfloat16
    with forward_ad.dual_level():
        coconv(forward_ad.make_dual(image, image))
    torch.compile(coconv, backend="eager", fullgraph=True)(image)
    with FlopCounterMode(display=False) as counter:
        coconv(image)
    assert counter.get_total_flops() == 2 * 2 * 24 * 9 * 14 * 14
    assert not used


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding_mode": "reflect"},
        {"kernel_size": 5, "padding": 2},
        {"stride": 3},
        {"stride": (1, 2)},
        {"groups": 12},
        {"out_channels": 48},
        {"padding": (1, 2)},
        {"padding": 5},
    ],
    ids=str,
)
def test_other_convolutions_go_level_by_level(arguments, image, used):
    plain = {"in_channels": 24, "out_channels": 24, "kernel_size": 3, "padding": 1, "groups": 24} | arguments
    coconv = CoConv2d(**plain, levels=2)
    with torch.no_grad():
        expected = copy.deepcopy(coconv).double()(image.double())
        assert_close(coconv(image), expected, torch.float32)
    assert not used


def test_a_map_that_is_too_small_is_an_error_as_ever(used):
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        CoConv2d(4, 4, 3, groups=4, dilations=(1, 1), splits=(2, 2))(torch.rand(1, 4, 2, 2))


def test_the_command_finds_what_is_built(coconv):
    done = coconv("build")
    assert done.code == 0
    assert done.out.strip() == str(depthwise._library())


def test_a_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv("COCONV_NATIVE", "0")
    depthwise.operators.cache_clear()
    assert depthwise.operators() is None
    monkeypatch.delenv("COCONV_NATIVE")
    depthwise.operators.cache_clear()
    assert depthwise.operators() is not None


def test_what_cannot_be_compiled_is_one_message(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    logging.disable(logging.CRITICAL)  # torch's warning has a mistake in its format
    try:
        with pytest.raises(RuntimeError, match=r"was not compiled, and they go one by one .* install a C\+\+ compiler"):
            build_depthwise()
    finally:
        logging.disable(logging.NOTSET)
    assert list((tmp_path / "coconv_surgery").iterdir()) == []


def test_a_network_trains_as_without(used, monkeypatch):
    def losses():
        torch.manual_seed(0)
        net = nn.Sequential(layer(), nn.BatchNorm2d(24), nn.ReLU(), layer(2))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(5):
            loss = F.mse_loss(net(torch.randn(4, 24, 12, 12)), torch.randn(4, 24, 6, 6))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    found = list(losses())
    assert used
    monkeypatch.setattr(depthwise, "operators", lambda: None)
    assert found == pytest.approx(list(losses()), rel=1e-5)
