"""Kernels against a closed form in double precision, written without anything of the package's."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import coconv_surgery as cs
from coconv_surgery.calibration.moments import Moments

KINDS = {
    "plain": {},
    "stride": {"stride": 2},
    "uneven stride": {"stride": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 8},
    "no bias": {"bias": False},
    "bias and groups": {"groups": 4, "stride": 2},
    "wide padding": {"padding": 2},
    "same": {"padding": "same"},
    "reflect": {"padding_mode": "reflect"},
    "replicate": {"padding_mode": "replicate"},
    "circular": {"padding_mode": "circular"},
}


def solved_by_hand(conv, x, y, dilations, splits, ridges):
    """Level by level and group by group: least squares drawn towards the kernels that were there."""
    kernels, biases = conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
    padding = (1, 1) if conv.padding == "same" else conv.padding
    mode = {"zeros": "constant"}.get(conv.padding_mode, conv.padding_mode)
    out_per_group, in_per_group = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    start = 0
    for dilation, channels, ridge in zip(dilations, splits, ridges, strict=True):
        pad = [p + dilation - 1 for p in (padding[1], padding[1], padding[0], padding[0])]
        step = conv.out_channels if conv.groups == 1 else out_per_group
        for first in range(0 if conv.groups == 1 else start, start + channels, step):
            rows = slice(start, start + channels) if conv.groups == 1 else slice(first, first + out_per_group)
            group = rows.start // out_per_group if conv.groups > 1 else 0
            part = x[:, group * in_per_group : (group + 1) * in_per_group]
            columns = F.unfold(F.pad(part, pad, mode=mode), conv.kernel_size, dilation=dilation, stride=conv.stride)
            patches = columns.transpose(1, 2).flatten(0, 1)
            trained = kernels[rows].flatten(1)
            penalty = None
            if ridge is not None:
                penalty = torch.full((patches.shape[1],), ridge * patches.square().sum(0).mean(), dtype=x.dtype)
            if biases is not None:
                patches = F.pad(patches, (0, 1), value=1.0)
                trained = torch.cat((trained, biases[rows, None]), 1)
                penalty = None if penalty is None else F.pad(penalty, (0, 1))
            if ridge is not None:
                wanted = y[:, rows].flatten(2).transpose(1, 2).flatten(0, 1)
                gram = patches.T @ patches + torch.diag(penalty)
                new = torch.linalg.solve(gram, patches.T @ wanted + penalty[:, None] * trained.T).T
                kernels[rows] = new[:, : trained.shape[1] - (biases is not None)].view_as(kernels[rows])
                if biases is not None:
                    biases[rows] = new[:, -1]
            if conv.groups == 1:
                break
        start += channels
    return kernels, biases


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_those_of_the_closed_form(kind):
    conv = nn.Conv2d(8, 8, 3, **{"padding": 1, **KINDS[kind]}).double()
    x = F.avg_pool2d(torch.randn(8, 8, 22, 22, dtype=torch.float64), 5, stride=1, padding=2)
    y = conv(x).detach()
    model = nn.Sequential(conv)
    trained = nn.Conv2d(8, 8, 3, **{"padding": 1, **KINDS[kind]}).double()
    trained.load_state_dict(conv.state_dict())
    cs.to_coconv_(conv, (1, 2), (4, 4))
    (row,) = cs.calibrate(model, x, arrange=False).layers
    kernels, biases = solved_by_hand(trained, x, y, (1, 2), (4, 4), row.ridge)
    torch.testing.assert_close(conv.weight, kernels, rtol=1e-6, atol=1e-8)
    if biases is not None:
        torch.testing.assert_close(conv.bias, biases, rtol=1e-6, atol=1e-8)
    assert row.after < row.before


def test_the_first_level_at_the_plain_dilation_keeps_its_kernels_exactly_where_nothing_comes_before_it():
    conv = nn.Conv2d(4, 8, 3, padding=1)
    trained = conv.weight.detach().clone()
    cs.to_coconv_(conv, (1, 2), (4, 4))
    (row,) = cs.calibrate(nn.Sequential(conv), torch.randn(8, 4, 16, 16), arrange=False).layers
    assert row.ridge[0] is None or torch.allclose(conv.weight[:4], trained[:4], atol=1e-4)


@given(st.integers(1, 3), st.integers(5, 40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**16))
def test_moments_give_the_error_that_the_patches_give(groups, count, width, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(groups, count, width, generator=generator, dtype=torch.float64)
    targets = torch.randn(groups, count, outputs, generator=generator, dtype=torch.float64)
    kernels = torch.randn(groups, outputs, width, generator=generator, dtype=torch.float64)
    moments = Moments.of(patches, targets)
    torch.testing.assert_close(moments.error(kernels), (patches @ kernels.mT - targets).square().sum(1))
    halves = Moments.of(patches[:, :3], targets[:, :3]) + Moments.of(patches[:, 3:], targets[:, 3:])
    torch.testing.assert_close(halves.gram, moments.gram)
    assert halves.count == count


@given(st.integers(20, 60), st.integers(1, 4), st.integers(0, 2**16))
def test_no_other_kernels_cost_less(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(1, count, width, generator=generator, dtype=torch.float64)
    targets = torch.randn(1, count, 2, generator=generator, dtype=torch.float64)
    moments, nothing = Moments.of(patches, targets), torch.zeros(1, 2, width, dtype=torch.float64)
    solved = moments.solve(nothing, 1e-12, with_bias=False)
    other = solved + 0.1 * torch.randn(solved.shape, generator=generator, dtype=torch.float64)
    assert (moments.error(solved) <= moments.error(other) + 1e-9).all()


def test_a_singular_system_keeps_the_kernels_that_were_there():
    patches = torch.zeros(1, 10, 3)
    kernels = torch.randn(1, 2, 3, dtype=torch.float64)
    assert torch.equal(Moments.of(patches, torch.ones(1, 10, 2)).solve(kernels, 1e-3, with_bias=False), kernels)


def test_mean_free_moments_are_those_of_patches_without_their_mean():
    patches, targets = torch.randn(2, 30, 5).double(), torch.randn(2, 30, 3).double()
    centred = torch.cat((patches[..., :4] - patches[..., :4].mean(-1, keepdim=True), patches[..., 4:]), -1)
    found, expected = Moments.of(patches, targets).of_mean_free(with_bias=True), Moments.of(centred, targets)
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(found.cross, expected.cross)
