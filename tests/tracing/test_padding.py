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
from coconv_surgery.tracing.axes import Axis
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
    rows = cs.plan_conversion(network, input_size=32).rows
    return next(row.reason_key for row in rows if row.name == "conv")


class Through(nn.Module):
    """Layers by name, called by a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function, self.mix = function, nn.Conv2d(16, 4, 1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.mix(self.function(self, x))


def down(x):
    return F.pad(x, (1, 1, 2, 0))


def into(buffer, place, x):
    buffer[place] = x
    return buffer


def around(x, left, right):
    """Columns joined on both sides."""
    return torch.cat([left, x, right], 3)


def into_part(whole, part, x):
    part(whole).copy_(x)
    return whole


def added_to(whole, part, x):
    part(whole).add_(x)
    return whole


def multiplied(whole, x, rows=slice(2, None)):
    whole[:, :, rows].mul_(x)
    return whole


ALL = slice(None)
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
    "zeros joined": Around(conv(padding=(0, 1)), lambda x: torch.cat([torch.zeros_like(x[:, :, :2]).detach(), x], 2)),
    "zeros joined behind": Around(conv(padding=(0, 1)), lambda x: torch.cat([x, x.new_zeros(1, 3, 2, x.shape[3])], 2)),
    "cropping behind a squashing function": Around(conv(padding=(2, 1)), behind=lambda x: x.tanh()[:, :, :-2] + 1),
    "cropping behind": Around(conv(padding=(2, 1)), behind=lambda x: x[:, :, :-2]),
    "cropping the width behind": Around(conv(padding=(1, 2)), behind=lambda x: x[..., :-2]),
    "narrowing behind": Around(conv(padding=(2, 1)), behind=lambda x: x.narrow(2, 0, 32)),
    "negative padding behind": Around(conv(padding=(2, 1)), behind=lambda x: F.pad(x, (0, 0, 0, -2))),
    "cropping behind an activation": Around(conv(padding=(2, 1)), behind=lambda x: x.relu()[:, :, :-2, :]),
    "cropping behind a norm": Around(
        conv(padding=(2, 1)), behind=nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.ZeroPad2d((0, 0, 0, -2)))
    ),
    # Padding in other ways.
    "a buffer written to": Around(
        conv(padding=(0, 1)), lambda x: into(x.new_zeros(1, 3, 34, 32), (..., slice(2, None), ALL), x)
    ),
    "a buffer scattered into": Around(conv(padding=(0, 1)), lambda x: x.new_zeros(1, 3, 34, 32).slice_scatter(x, 2, 2)),
    "rows copied somewhere": Around(
        conv(padding=(0, 1)), lambda x: x.new_zeros(1, 3, 34, 32).index_copy(2, torch.arange(2, 34), x)
    ),
    "windows of a padded map": Around(conv(padding=(0, 1)), lambda x: F.pad(x, (0, 0, 4, 0)).unfold(2, 3, 1).mean(-1)),
    "a transposed map padded": Around(conv(), lambda x: F.pad(x.transpose(2, 3), (2, 0, 1, 1)).transpose(2, 3)),
    "a map with one more dimension padded": Around(conv(), lambda x: down(x.unsqueeze(0)).squeeze(0)),
    "flattened rows padded": Around(
        conv(padding=(0, 1)), lambda x: F.pad(x.flatten(2), (64, 0)).unflatten(2, (34, 32))
    ),
    "a shift by rolling and a mask": Around(
        conv(padding=1), lambda x: torch.roll(x, 1, 2) * (torch.arange(32) > 0).float()[:, None]
    ),
    "a shift by rolling and a write": Around(conv(padding=1), lambda x: into(torch.roll(x, 1, 2), (ALL, ALL, 0), 0.0)),
    "a learned start": Through(
        lambda s, x: s.conv(torch.cat([s.start.expand(1, 3, 2, 32), x], 2)),
        conv=conv(padding=(0, 1)),
        start=nn.Parameter(torch.zeros(1, 3, 2, 32)),
    ),
    # Something between.
    "padding and a gate": Around(conv(), lambda x: down(x) * down(x).sigmoid()),
    "padding and a gate of one channel": Around(conv(), lambda x: (lambda y: y * y.mean(1).unsqueeze(1))(down(x))),
    "padding and a choice": Around(conv(), lambda x: torch.where(down(x) > 0, down(x), 0.1 * down(x))),
    "padding and a view": Around(conv(), lambda x: down(x).view(1, 3, 34, 34)),
    "padding and tokens": Around(
        conv(), lambda x: down(x).flatten(2).transpose(1, 2).relu().transpose(1, 2).unflatten(2, (34, 34))
    ),
    "padding and a product": Around(
        conv(), lambda x: (down(x).permute(0, 2, 3, 1) @ torch.ones(3, 3)).permute(0, 3, 1, 2)
    ),
    "padding and a 1×1 convolution": Through(
        lambda s, x: s.conv(s.other(down(x))), conv=conv(), other=nn.Conv2d(3, 3, 1)
    ),
    "padding for two convolutions": Through(
        lambda s, x: s.conv(s.other(F.pad(x, (2, 2, 4, 0)))), conv=conv(), other=nn.Conv2d(3, 3, 3)
    ),
    "a sum of padded maps": Around(conv(), lambda x: down(x) + down(2 * x)),
    # Cropping in other ways.
    "cropping behind two convolutions": Through(
        lambda s, x: s.other(s.conv(x))[:, :, :-4],
        conv=conv(padding=(2, 1)),
        other=nn.Conv2d(16, 16, 3, padding=(2, 1)),
    ),
    "cropping behind a 1×1 convolution": Through(
        lambda s, x: s.other(s.conv(x))[:, :, :-2], conv=conv(padding=(2, 1)), other=nn.Conv2d(16, 16, 1)
    ),
}
CROPPED = {
    "both halves of a gate": lambda y: torch.cat([y[:, :8, :-2].tanh(), y[:, 8:, :-2].sigmoid()], 1),
    "behind a gate": lambda y: (y * y.sigmoid())[:, :, :-2],
    "behind two that are stacked": lambda y: torch.stack([y.tanh(), y.sigmoid()]).prod(0)[:, :, :-2],
    "by splitting": lambda y: torch.split(y, [32, 2], 2)[0],
    "by an index": lambda y: y[:, :, torch.arange(32)],
    "by selection": lambda y: y.index_select(2, torch.arange(32)),
    "row by row": lambda y: torch.stack(y.unbind(2)[:-2], 2),
    "behind a norm over channels": lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2)[:, :, :-2],
    "with channels last": lambda y: y.permute(0, 2, 3, 1)[:, :-2].permute(0, 3, 1, 2),
    "flattened": lambda y: y.flatten(2)[..., : 32 * 32].unflatten(2, (32, 32)),
}
CROPPED |= {
    "by narrowing a copy": lambda y: torch.narrow_copy(y, 2, 0, 32),
    "by slicing a copy": lambda y: torch.slice_copy(y, 2, 0, 32),
    "by an index that nobody checks": lambda y: torch.ops.aten._unsafe_index(y, [None, None, torch.arange(32)]),
}
ROWS = torch.arange(2, 34)
PLACES = ROWS[:, None].expand(1, 3, 32, 32)
SCATTERED = {
    "added by an index": lambda whole, x: whole.index_add(2, ROWS, x),
    "added in place": lambda whole, x: whole.index_add_(2, ROWS, x, alpha=0.5),
    "reduced by an index": lambda whole, x: whole.index_reduce(2, ROWS, x, "amax"),
    "scattered and added": lambda whole, x: whole.scatter_add(2, PLACES, x),
    "scattered and added in place": lambda whole, x: whole.scatter_add_(2, PLACES, x),
    "scattered and reduced": lambda whole, x: whole.scatter_reduce(2, PLACES, x, "sum"),
    "scattered by a mask": lambda whole, x: whole.masked_scatter((torch.arange(34) > 1)[:, None], x),
    "scattered by a mask in place": lambda whole, x: whole.masked_scatter_((torch.arange(34) > 1)[:, None], x),
}
# A part of zeros in memory of its own is written.
WRITTEN = {
    "added in place to a part": lambda x: added_to(x.new_zeros(1, 3, 34, 32), lambda whole: whole[:, :, 2:], x),
    "added to a part with channels last": lambda x: added_to(
        x.new_zeros(1, 34, 32, 3), lambda whole: whole.permute(0, 3, 1, 2)[:, :, 2:], x
    ).permute(0, 3, 1, 2),
    "copied to a part of a transposed map": lambda x: into_part(
        x.new_zeros(1, 3, 32, 34), lambda whole: whole.transpose(2, 3)[:, :, 2:], x
    ).transpose(2, 3),
    "copied to a part of a detached map": lambda x: into_part(
        torch.zeros(1, 3, 34, 32), lambda whole: whole.detach()[:, :, 2:], x
    ),
    "multiplied into ones": lambda x: multiplied(F.pad(x.new_ones(1, 3, 32, 32), (0, 0, 2, 0)), x),
    "put at an index": lambda x: into(x.new_zeros(1, 3, 34, 32), (ALL, ALL, ROWS), x),
    "put at a list": lambda x: into(x.new_zeros(1, 3, 34, 32), (ALL, ALL, ROWS.tolist()), x),
    "stacked behind zeros": lambda x: torch.stack([torch.zeros_like(x[:, :, 0])] * 2 + [*x.unbind(2)], 2),
}
HIDDEN = {
    "filled": lambda x: torch.roll(x, 1, 2).index_fill(2, torch.tensor([0]), 0),
    "put": lambda x: into(torch.roll(x, 1, 2), (ALL, ALL, torch.tensor([0])), 0.0),
    "selected and scattered": lambda x: torch.roll(x, 1, 2).select_scatter(torch.zeros(1, 3, 32), 2, 0),
}
SHIFTED = {
    "by padding and cropping": lambda y: F.pad(y, (0, 0, 1, 0))[:, :, :-1],
    "by negative padding": lambda y: F.pad(y, (0, 0, 1, -1)),
    "by joining zeros": lambda y: torch.cat([torch.zeros_like(y[:, :, :1]), y[:, :, :-1]], 2),
    "in place": lambda y: into(into(y.clone(), (ALL, ALL, slice(1, None)), y[:, :, :-1]), (ALL, ALL, slice(1)), 0.0),
}
CAUSAL |= {f"cropping {how}": Around(conv(padding=(2, 1)), behind=crop) for how, crop in CROPPED.items()}
CAUSAL |= {f"a shift behind {how}": Around(conv(padding=1), behind=shift) for how, shift in SHIFTED.items()}
CAUSAL |= {
    f"rows {how}": Around(conv(padding=(0, 1)), lambda x, put=put: put(x.new_zeros(1, 3, 34, 32), x))
    for how, put in SCATTERED.items()
}
CAUSAL |= {f"rows {how}": Around(conv(padding=(0, 1)), pad) for how, pad in WRITTEN.items()}
CAUSAL |= {f"a shift by rolling and a row {how}": Around(conv(padding=1), hide) for how, hide in HIDDEN.items()}
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
    "windows": Around(conv(padding=1), lambda x: F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))),
    "patches": Around(conv(padding=1), lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).amax((4, 5))),
    "a subsampled output": Around(conv(padding=1), behind=lambda x: x[:, :, ::2, ::2]),
    "zeros joined on both sides": Around(
        conv(padding=(1, 0)), lambda x: around(x, torch.zeros_like(x[..., :1]), x.new_zeros(1, 3, 32, 1))
    ),
    "a buffer written to in the middle": Around(
        conv(), lambda x: into(x.new_zeros(1, 3, 34, 34), (..., slice(1, -1), slice(1, -1)), x)
    ),
    "padding to a multiple of a size": Around(
        conv(padding=1), lambda x: F.pad(x, (0, 8, 0, 8)), lambda x: x[:, :, :-8, :-8]
    ),
    "cropping what upsampling made too large": Around(
        conv(padding=1), behind=lambda x: F.interpolate(x, scale_factor=2)[:, :, :63, :63]
    ),
    "a buffer added to in the middle": Around(
        conv(), lambda x: added_to(x.new_zeros(1, 3, 34, 34), lambda whole: whole[:, :, 1:-1, 1:-1], x)
    ),
    "a row that is scaled in place": Around(conv(padding=1), behind=lambda y: multiplied(y.clone(), 0.5, slice(0, 1))),
    "rows stacked": Around(conv(padding=1), lambda x: torch.stack([*x.unbind(2)], 2)),
    "differences of rows": Around(conv(padding=1), behind=lambda x: x[:, :, 1:] - x[:, :, :-1]),
    "channels shifted one way and the other": Around(
        conv(padding=1), behind=lambda x: torch.cat([torch.roll(x[:, :8], 1, 2), torch.roll(x[:, 8:], -1, 2)], 1)
    ),
    "rolling and back": Around(conv(padding=1), behind=lambda x: torch.roll(torch.roll(x, -3, 2).relu(), 3, 2)),
    "a shifted branch beside one that is not": Around(
        conv(padding=1), behind=lambda x: F.avg_pool2d(x, 1, 2) + F.avg_pool2d(F.pad(x, (-1, 1, -1, 1)), 1, 2)
    ),
    "halves that are joined again": Around(conv(padding=1), lambda x: torch.cat([x[:, :, :16] * 2, x[:, :, 16:]], 2)),
    "two images side by side": Around(conv(padding=1), lambda x: torch.cat([x, x.flip(3)], 3)),
    "upsampling by an index": Around(conv(padding=1), lambda x: x[:, :, torch.arange(64) // 2]),
    "strides as TensorFlow pads them, twice": Through(
        lambda s, x: s.conv(F.pad(s.other(F.pad(x, (0, 1, 0, 1))), (0, 1, 0, 1))),
        conv=conv(stride=2),
        other=nn.Conv2d(3, 3, 3, stride=2),
    ),
    "kernels of even size before": Through(
        lambda s, x: s.conv(s.other(F.pad(s.other(F.pad(x, (0, 1, 0, 1))), (0, 1, 0, 1)))),
        conv=conv(padding=1),
        other=nn.Conv2d(3, 3, 2),
    ),
    "wide padding and cropping by the next layer": Through(
        lambda s, x: s.other(s.conv(x)), conv=conv(padding=2), other=nn.Conv2d(16, 16, 3)
    ),
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


BY_HAND = {
    "circular, joined": lambda x: around(x, x[..., -1:], x[..., :1]),
    "circular, joined in two steps": lambda x: torch.cat([y := torch.cat([x[..., -1:], x], 3), y[..., 1:2]], 3),
    "circular, columns stacked": lambda x: torch.stack([x[..., column % 32] for column in range(-1, 33)], 3),
    "circular, indexed": lambda x: x[..., torch.arange(-1, 33) % 32],
    "circular, selected": lambda x: x.index_select(3, torch.arange(-1, 33) % 32),
    "circular, gathered": lambda x: torch.take_along_dim(x, (torch.arange(-1, 33) % 32).view(1, 1, 1, -1), 3),
    "circular, of tiles": lambda x: x.repeat(1, 1, 1, 3)[..., 31:65],
    "circular, written": lambda x: into(
        into(into(x.new_zeros(1, 3, 32, 34), (..., slice(1, -1)), x), (..., slice(1)), x[..., -1:]),
        (..., slice(33, 34)),
        x[..., :1],
    ),
    "circular, and a 1×1 convolution": lambda x: F.conv2d(around(x, x[..., -1:], x[..., :1]), torch.ones(3, 3, 1, 1)),
    "reflected, joined": lambda x: around(x, x[..., 1:2], x[..., -2:-1]),
    "replicated, joined": lambda x: around(x, x[..., :1], x[..., -1:]),
    "replicated, indexed": lambda x: x[..., torch.arange(-1, 33).clamp(0, 31)],
    "ones, joined": lambda x: around(x, torch.ones(1, 3, 32, 1), torch.ones(1, 3, 32, 1)),
    "a buffer of ones": lambda x: into(x.new_ones(1, 3, 32, 34), (..., slice(1, -1)), x),
    "as graphs of dynamo call it": lambda x: torch._C._nn.pad(x, (1, 1, 0, 0), "constant", 5.0),
}


@pytest.mark.parametrize("pad", BY_HAND.values(), ids=BY_HAND)
def test_padding_by_hand_with_anything_but_zeros_leaves_a_convolution_alone(pad):
    assert reason(Around(conv(padding=(1, 0)), pad)) is Reason.PADDED_OUTSIDE


def test_padding_that_is_cropped_off_behind_leaves_a_convolution_alone():
    network = Around(conv(padding=1), lambda x: around(x, x[..., :1], x[..., -1:]), lambda x: x[..., 1:-1])
    assert reason(network) is Reason.PADDED_OUTSIDE


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


def test_in_a_deeper_network_a_convolution_is_not_looked_at_more_often(monkeypatch):
    looks = []
    span = Axis.span
    monkeypatch.setattr(Axis, "span", lambda axis, root: looks.append(axis) or span(axis, root))

    def looked_at(depth):
        looks.clear()
        cs.plan_conversion(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth))), input_size=32)
        return len(looks) / depth

    assert looked_at(40) <= 1.1 * looked_at(20)
