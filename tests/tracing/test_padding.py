"""What stands around a convolution pads its input or crops its output, and some of that forbids levels."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame

import coconv_surgery as cs
from coconv_surgery.planning.reasons import Reason
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.trace import trace_network


class Around(nn.Module):
    """A convolution with something before and behind it, and a layer that reads it."""

    def __init__(self, conv, before=lambda x: x, behind=lambda x: x):
        super().__init__()
        self.conv, self.mix, self.before, self.behind = conv, nn.Conv2d(16, 4, 1), before, behind

    def forward(self, x):
        return self.mix(self.behind(self.conv(self.before(x))))


def conv(**arguments):
    return nn.Conv2d(3, 16, 3, **arguments)


def reason(network):
    return cs.plan_conversion(network, input_size=32).rows[0].reason_key


JOINED = pytest.mark.xfail(torch.__version__ < (2, 5), reason="torch 2.4 does not tell what is joined", strict=True)
CAUSAL = {
    "a padding layer": Around(conv(), nn.ConstantPad2d((1, 1, 2, 0), 0.0)),
    "a zero padding layer": Around(conv(), nn.ZeroPad2d((2, 0, 1, 1))),
    "padding by a function": Around(conv(), lambda x: F.pad(x, (1, 1, 2, 0))),
    "the other way round": Around(conv(), lambda x: F.pad(x, (1, 1, 0, 2))),
    "both axes": Around(conv(), lambda x: F.pad(x, (2, 0, 2, 0))),
    "a larger dilation": Around(conv(dilation=2), lambda x: F.pad(x, (2, 2, 4, 0))),
    "a stride": Around(conv(stride=2), lambda x: F.pad(x, (1, 1, 2, 0))),
    "padding and cropping": Around(conv(), lambda x: F.pad(x, (1, 1, 2, 2))[:, :, :-2]),
    "a shift before": Around(conv(padding=1), lambda x: F.pad(x, (0, 0, 1, -1))),
    "padding and a copy": Around(conv(), lambda x: F.pad(x, (1, 1, 2, 0)).clone()),
    "padding and another type": Around(conv(), lambda x: F.pad(x, (1, 1, 2, 0)).double().float()),
    "padding and an activation": Around(conv(), lambda x: F.pad(x, (1, 1, 2, 0)).relu() * 0.9),
    "zeros joined": pytest.param(
        Around(conv(padding=(0, 1)), lambda x: torch.cat([torch.zeros_like(x[:, :, :2]).detach(), x], 2)), marks=JOINED
    ),
    "zeros joined behind": pytest.param(
        Around(conv(padding=(0, 1)), lambda x: torch.cat([x, x.new_zeros(1, 3, 2, x.shape[3])], 2)), marks=JOINED
    ),
    "cropping behind a squashing function": Around(conv(padding=(2, 1)), behind=lambda x: x.tanh()[:, :, :-2] + 1),
    "cropping behind": Around(conv(padding=(2, 1)), behind=lambda x: x[:, :, :-2]),
    "cropping the width behind": Around(conv(padding=(1, 2)), behind=lambda x: x[..., :-2]),
    "narrowing behind": Around(conv(padding=(2, 1)), behind=lambda x: x.narrow(2, 0, 32)),
    "negative padding behind": Around(conv(padding=(2, 1)), behind=lambda x: F.pad(x, (0, 0, 0, -2))),
    "cropping behind an activation": Around(conv(padding=(2, 1)), behind=lambda x: x.relu()[:, :, :-2, :]),
    "cropping behind a norm": Around(
        conv(padding=(2, 1)), behind=nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.ZeroPad2d((0, 0, 0, -2)))
    ),
}
SYMMETRIC = {
    "no padding": Around(conv()),
    "own padding": Around(conv(padding=1)),
    "padding of the same size": Around(conv(padding="same")),
    "padding by a layer": Around(conv(), nn.ZeroPad2d(1)),
    "as TensorFlow does with strides": Around(conv(stride=2), nn.ZeroPad2d((0, 1, 0, 1))),
    "cropping both sides": Around(conv(padding=2), behind=lambda x: x[:, :, 1:-1, 1:-1]),
    "padding and cropping both sides": Around(conv(), lambda x: F.pad(x, (2, 2, 2, 2))[:, :, 1:-1, 1:-1]),
    "half the channels": Around(conv(padding=1), behind=lambda x: torch.cat([x[:, :8], x[:, 8:]], 1)),
    "padding for the next layer": Around(conv(padding=1), behind=nn.Sequential(nn.ReLU(), nn.ZeroPad2d((0, 2, 0, 2)))),
    "padding of its own before that of the next layer": Around(
        Conv2dSame(3, 16, 3, stride=2), behind=nn.ZeroPad2d((0, 1, 0, 1))
    ),
    "a subsampled output": Around(conv(padding=1), behind=lambda x: x[:, :, ::2, ::2]),
}


@pytest.mark.parametrize("network", CAUSAL.values(), ids=CAUSAL)
def test_a_convolution_whose_padding_is_all_on_one_side_is_left_alone(network):
    assert reason(network) is Reason.CAUSAL


@pytest.mark.parametrize("network", SYMMETRIC.values(), ids=SYMMETRIC)
def test_a_convolution_that_is_padded_on_both_sides_is_converted(network):
    assert reason(network) is None


def test_a_converted_network_does_not_see_what_comes_later():
    causal = Around(conv(), nn.ZeroPad2d((1, 1, 2, 0)))
    network = nn.Sequential(causal, nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 2, 1))
    assert [row.name for row in cs.get_plan(cs.convert(network, input_size=(3, 32, 32))).converted] == ["1"]
    image = torch.rand(1, 3, 32, 32)
    later = image.clone()
    later[:, :, 16:] = 0
    assert torch.equal(causal(image)[:, :, :16], causal(later)[:, :, :16])


@pytest.mark.parametrize(
    ("pad", "mode"),
    [
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), "circular"),
        (nn.CircularPad2d(1), "circular"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "reflection"),
        (nn.ReplicationPad2d(1), "replication"),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=5.0), "constant"),
        (nn.ConstantPad2d(1, -1.0), "constant"),
        (lambda x: F.pad(x, (1, 1, 0, 0), mode="circular"), "circular"),
        (lambda x: F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1)), "circular"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect").relu().clone() * 2, "reflection"),
    ],
)
@pytest.mark.parametrize("own", [0, (1, 0)])
def test_padding_with_anything_but_zeros_leaves_a_convolution_alone(pad, mode, own):
    row = cs.plan_conversion(Around(conv(padding=own), pad), input_size=32).rows[0]
    assert row.reason_key is Reason.PADDED_OUTSIDE
    assert row.reason.startswith(f"{mode} padding by another layer")


sides = st.integers(-2, 4)


@settings(deadline=None, max_examples=40)
@given(left=sides, right=sides, top=sides, bottom=sides, crop=st.tuples(*[st.integers(0, 2)] * 4))
def test_padding_is_one_sided_if_what_is_added_less_what_is_cropped_is(left, right, top, bottom, crop):
    above, below, before, after = crop

    def behind(x):
        return x[:, :, above : x.shape[2] - below, before : x.shape[3] - after]

    network = Around(conv(padding=1), lambda x: F.pad(x, (left, right, top, bottom)), behind)
    (found, *_) = trace_network(network, find_sites(network), Inputs((torch.ones(1, 3, 16, 16),))).convs
    padded = [(1 + top, 1 + bottom), (1 + left, 1 + right)]
    cropped = [(1 + top - above, 1 + bottom - below), (1 + left - before, 1 + right - after)]
    assert found.calls[0].one_sided == any(max(sides) >= 2 and min(sides) <= 0 for sides in padded + cropped)
