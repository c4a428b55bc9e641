"""CoConv2d: arithmetic, levels and splits, errors."""

import pytest
import torch
import torch.nn as nn
from cases import TOLERANCE, Case, assert_close, cases, plain_arguments, reliable_kernels, sides
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import both, naive_coconv2d, naive_forward

from coconv_surgery import CoConv2d, coconv2d, split_channels
from coconv_surgery.layers.switch import to_conv_


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_output_and_gradients_are_the_reference_s(dtype, case):
    coconv, input = case.build(dtype)
    inputs = [input.requires_grad_(), *coconv.parameters()]
    with reliable_kernels(dtype):
        output = coconv(input)
        probe = torch.randn_like(output)
        gradients = torch.autograd.grad(output, inputs, probe)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = naive_forward(coconv, exact[0], weight=exact[1], bias=exact[2] if len(exact) > 2 else None)
    expected_gradients = torch.autograd.grad(expected, exact, probe.double())

    assert output.dtype == dtype
    assert_close(output, expected, dtype)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, dtype)


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_the_functional_form_is_the_module(case):
    coconv, input = case.build()
    arguments = (coconv.stride, coconv.padding, coconv.dilation, coconv.groups)
    levels = {"dilations": coconv.dilations, "splits": coconv.splits, "padding_mode": coconv.padding_mode}
    output = coconv2d(input, coconv.weight, coconv.bias, *arguments, **levels)
    assert_close(output, naive_coconv2d(input, coconv.weight, coconv.bias, *arguments, **levels), torch.float64)
    assert_close(output, coconv(input), torch.float64)


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_output_size_is_the_plain_convolution_s(case):
    coconv, input = case.build()
    plain = nn.Conv2d(**case.arguments, dtype=torch.float64)
    assert coconv(input).shape == plain(input).shape


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_parameters_are_the_plain_convolution_s(case):
    coconv, _ = case.build()
    torch.manual_seed(case.seed)
    plain = nn.Conv2d(**case.arguments, dtype=torch.float64)
    assert list(coconv.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(coconv.state_dict()[name], value) for name, value in plain.state_dict().items())
    plain.load_state_dict(coconv.state_dict())
    coconv.load_state_dict(plain.state_dict())


@st.composite
def single_levels(draw):
    arguments = draw(plain_arguments(sides(st.integers(1, 6))))
    kernel, dilation = both(arguments["kernel_size"]), both(arguments["dilation"])
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(span, 4) + draw(st.integers(0, 3)) for span in spans]
    levels = draw(st.sampled_from([{}, {"levels": 1}, {"dilations": [arguments["dilation"]]}]))
    return Case(arguments, levels, (2, arguments["in_channels"], *size), draw(st.integers(0, 2**16)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(case=single_levels())
@settings(max_examples=150, deadline=None)
def test_one_level_is_bit_identical_to_the_plain_convolution_for_every_kernel(case):
    coconv, input = case.build(torch.float32)
    plain = nn.Conv2d(**case.arguments)
    plain.load_state_dict(coconv.state_dict())
    assert torch.equal(coconv(input), plain(input))


def test_second_derivatives_are_right():
    coconv = CoConv2d(2, 3, 3, padding=1, levels=2, dtype=torch.float64)
    input = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(input, weight, bias):
        return torch.func.functional_call(coconv, {"weight": weight, "bias": bias}, (input,))

    assert torch.autograd.gradgradcheck(run, (input, *coconv.parameters()))


# ------------------------------------------------------------------------------------------------- levels and splits


@given(data=st.data(), levels=st.integers(1, 12), rule=st.sampled_from(["pow2", "even"]))
@settings(max_examples=300, deadline=None)
def test_splits_share_out_every_channel_and_favour_the_first_levels(data, levels, rule):
    channels = data.draw(st.integers(levels, 2048))
    splits = split_channels(channels, levels, rule)
    assert len(splits) == levels
    assert sum(splits) == channels
    assert min(splits) >= 1
    assert list(splits) == sorted(splits, reverse=True)


AUTHORS_SHARES = {1: [8], 2: [4, 4], 3: [4, 2, 2], 4: [2, 2, 2, 2], 5: [2, 2, 2, 1, 1]}  # in eighths


@pytest.mark.parametrize("levels", AUTHORS_SHARES)
@given(eighth=st.integers(1, 256))
@settings(deadline=None)
def test_pow2_gives_the_authors_shares_where_they_divide(levels, eighth):
    assert split_channels(8 * eighth, levels) == tuple(share * eighth for share in AUTHORS_SHARES[levels])


@pytest.mark.parametrize(("channels", "levels"), [(66, 4), (7, 3), (5, 4), (15, 9)])
def test_pow2_gives_the_first_level_what_does_not_divide(channels, levels):
    first, *others = split_channels(channels, levels)
    units = 1 << (levels - 1).bit_length()
    assert others[-1] == max(1, channels // units)
    assert first == channels - sum(others)


def test_splits_of_table_1():
    assert split_channels(64, 4) == (16, 16, 16, 16)
    assert split_channels(128, 3) == (64, 32, 32)
    assert split_channels(256, 2) == (128, 128)
    assert split_channels(512, 1) == (512,)


def test_splits_of_table_2():
    assert split_channels(512, 1, "even") == (512,)
    assert split_channels(512, 2, "even") == (256, 256)
    assert split_channels(512, 3, "even") == (172, 170, 170)
    assert split_channels(512, 4, "even") == (128, 128, 128, 128)
    assert split_channels(256, 4, "even") == (64, 64, 64, 64)
    assert split_channels(128, 4, "even") == (32, 32, 32, 32)


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_levels_take_whole_groups(case):
    coconv, _ = case.build()
    if coconv.groups > 1:
        assert all(channels % (coconv.out_channels // coconv.groups) == 0 for channels in coconv.splits)
    assert sum(coconv.splits) == coconv.out_channels
    assert len(coconv.splits) == len(coconv.dilations) == coconv.levels


def test_without_levels_it_has_one():
    coconv = CoConv2d(4, 6, 3)
    assert (coconv.levels, coconv.dilations, coconv.splits) == (1, (1,), (6,))


def test_level_k_has_k_times_the_conv_s_own_dilation():
    assert CoConv2d(4, 8, 3, levels=4).dilations == (1, 2, 3, 4)
    assert CoConv2d(4, 8, 3, dilation=2, levels=3).dilations == (2, 4, 6)
    assert CoConv2d(4, 8, 3, dilation=(1, 2), levels=2).dilations == ((1, 2), (2, 4))


def test_attributes_are_tuples_with_one_entry_a_level():
    coconv = CoConv2d(4, 8, 3, dilations=[1, (2, 2), (1, 3)], splits=[1, 2, 5])
    assert coconv.levels == 3
    assert coconv.dilations == (1, 2, (1, 3))
    assert coconv.splits == (1, 2, 5)


@pytest.mark.parametrize(("rule", "splits"), [("pow2", (8, 4, 4)), ("even", (6, 5, 5))])
def test_splits_can_be_named_by_a_rule(rule, splits):
    assert CoConv2d(4, 16, 3, levels=3, splits=rule).splits == splits


def test_splits_of_a_grouped_conv_count_in_groups():
    assert CoConv2d(12, 24, 3, groups=4, levels=3).splits == (12, 6, 6)
    assert CoConv2d(7, 7, 3, groups=7, levels=3).splits == (5, 1, 1)


def test_repr_ends_with_the_levels():
    coconv = CoConv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False, levels=2)
    plain = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False)
    assert coconv.extra_repr() == f"{plain.extra_repr()}, dilations=(1, 2), splits=(4, 4)"


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": (4, 5), "levels": 2}, r"splits \(4, 5\) must be positive and sum up to the 8 out_channels"),
        ({"splits": (3, 3), "levels": 2}, r"splits \(3, 3\).*8 out_channels"),
        ({"splits": (8, 0), "levels": 2}, r"splits \(8, 0\) must be positive"),
        ({"splits": (9, -1), "levels": 2}, r"splits \(9, -1\) must be positive"),
        ({"splits": (4, 2, 2), "levels": 2}, r"dilations \(1, 2\) and splits \(4, 2, 2\) must have one entry"),
        ({"splits": (4,), "dilations": (1, 2)}, r"dilations \(1, 2\) and splits \(4,\) must have one entry"),
        ({"dilations": ()}, r"dilations \(\).*one entry for each level"),
        ({"levels": 9}, "9 levels need at least as many out_channels, and this conv has 8"),
        ({"levels": 5, "groups": 4}, "5 levels need at least as many groups, and this conv has 4"),
        ({"levels": 2, "groups": 2, "splits": (6, 2)}, r"splits \(6, 2\) cut through a group.*groups=2.*of 4 channels"),
        ({"levels": 0}, "levels=0 must be at least 1"),
        ({"levels": -1}, "levels=-1 must be at least 1"),
        ({"levels": 2, "dilations": (1, 2)}, "either levels= .* or dilations="),
        ({"dilations": (0, 1)}, r"dilations \(0, 1\) must be at least 1"),
        ({"dilations": (1, (2, -1))}, r"dilations \(1, \(2, -1\)\) must be at least 1"),
        ({"kernel_size": 2, "levels": 2}, r"kernel_size \(2, 2\) is even"),
        ({"kernel_size": (3, 4), "levels": 2}, r"kernel_size \(3, 4\) is even"),
        ({"kernel_size": 4, "dilations": (2,)}, r"kernel_size \(4, 4\) is even"),
        ({"kernel_size": 1, "levels": 2}, "1×1 kernel has no dilation"),
        ({"dilation": 2, "dilations": (1, 2)}, r"dilation 1 with padding \(0, 0\).*negative padding.*own, \(2, 2\)"),
        (
            {"dilation": (1, 3), "padding": 1, "dilations": (1, 3)},
            r"dilation 1 with padding \(1, 1\).*negative padding",
        ),
        ({"dilation": 2, "padding": "valid", "dilations": (1, 2)}, "dilation 1 with padding valid.*negative padding"),
        ({"levels": 2, "splits": "odd"}, "splits='odd': choose 'pow2' or 'even'"),
    ],
)
def test_what_cannot_be_split_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        CoConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **arguments})


def test_padding_may_shrink_as_long_as_some_is_left():
    coconv = CoConv2d(4, 4, 3, padding=1, dilation=2, dilations=(1, 2))
    input = torch.randn(1, 4, 9, 9)
    torch.testing.assert_close(coconv(input), naive_forward(coconv, input))


def test_from_conv_needs_levels_or_dilations():
    with pytest.raises(ValueError, match=r"either levels= .* or dilations="):
        CoConv2d.from_conv(nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 2, "odd"), "rule='odd': choose 'pow2' or 'even'"),
        ((3, 4), "cannot split 3 channels over 4 levels"),
        ((3, 0), "cannot split 3 channels over 0 levels"),
    ],
)
def test_split_channels_says_what_it_cannot_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_channels(*arguments)


def test_from_conv_names_what_is_no_convolution():
    with pytest.raises(TypeError, match=r"conv must be an nn\.Conv2d, not ReLU"):
        CoConv2d.from_conv(nn.ReLU(), levels=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"splits": (4, 5)},
            r"splits=\(4, 5\) must sum up to the first of the four sides of weight, \(8, 4, 3, 3\)",
        ),
        ({"splits": (8,)}, r"dilations=\(1, 2\) and splits=\(8,\) must have one entry for each level"),
        ({"bias": torch.ones(4)}, r"bias must have 8 numbers, .* not \(4,\)"),
        ({"groups": 2}, r"input must be .* with 8 channels \(groups=2\), not \(1, 4, 9, 9\)"),
        ({"padding": 0, "dilation": 2}, r"dilation 1 with padding 0 .*negative padding"),
        ({"padding": "full"}, "padding='full': choose 'same' or 'valid'"),
    ],
)
def test_the_functional_form_says_which_argument_is_wrong(arguments, message):
    tensors = {"input": torch.ones(1, 4, 9, 9), "weight": torch.ones(8, 4, 3, 3)}
    with pytest.raises(ValueError, match=message):
        coconv2d(**{**tensors, "padding": 1, "dilations": (1, 2), "splits": (4, 4), **arguments})


def test_from_conv_refuses_a_computed_weight():
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"weight_norm: use to_coconv_\(\)"):
        CoConv2d.from_conv(conv, levels=2)


def test_to_conv_refuses_a_conv_that_is_not_contextual():
    conv = nn.Conv2d(4, 4, 3)
    with pytest.raises(TypeError, match="coconv must be a CoConv2d, not Conv2d"):
        to_conv_(conv)
    assert type(conv) is nn.Conv2d
