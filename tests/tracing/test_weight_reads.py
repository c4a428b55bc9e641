"""A weight that something else uses as well is seen, whatever way it takes."""

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from forwards import IMAGE, READ_TWICE, WAYS, Model, fails_on_torch_2_4

import coconv_surgery as cs
from coconv_surgery.planning.reasons import Reason


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sign()


class Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return F.conv2d(x, weight, padding=1)


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor):
    return torch.conv2d(x, weight, None, [1, 1], [1, 1])


def convolve(x, weight):
    return F.conv2d(x, weight, padding=1)


def reason(way, branch):
    """Why a convolution is left alone beside a branch that is called with it and its input."""
    network = Model(
        lambda self, x: self.mix((self.conv(self.stem(x)) + branch(self.conv, self.stem(x))).relu()),
        stem=nn.Conv2d(3, 16, 3, padding=1),
        conv=nn.Conv2d(16, 16, 3, padding=1),
        mix=nn.Conv2d(16, 4, 1),
    )
    return next(row.reason_key for row in cs.plan_conversion(network, **WAYS[way]).rows if row.name == "conv")


READS = {
    "itself": lambda conv, x: convolve(x, conv.weight),
    "computed with": lambda conv, x: convolve(x, F.softmax(conv.weight * 2, 0)),
    "detached": lambda conv, x: convolve(x, conv.weight.detach()),
    "data": lambda conv, x: convolve(x, conv.weight.data),
    "a parameter of it": lambda conv, x: convolve(x, nn.Parameter(conv.weight.data)),
    "state": lambda conv, x: convolve(x, conv.state_dict()["weight"]),
    "sign": lambda conv, x: convolve(x, Sign.apply(conv.weight)),
    "function": lambda conv, x: Convolve.apply(x, conv.weight),
    "scripted": lambda conv, x: scripted(x, conv.weight),
    "vmap": lambda conv, x: torch.vmap(lambda one: convolve(one[None], conv.weight)[0])(x),
    "no gradients": torch.no_grad()(lambda conv, x: convolve(x, conv.weight)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "read",
    [
        pytest.param(read, marks=fails_on_torch_2_4("maps no function while what is saved is watched"))
        if read == "vmap"
        else read
        for read in READS
    ],
)
def test_a_weight_that_meets_a_map_outside_of_its_convolution_is_read(read, way):
    assert reason(way, READS[read]) is Reason.WEIGHT_READ


OTHERS = {
    "nothing": lambda conv, x: x,
    "shape": lambda conv, x: x.new_zeros(conv.weight.shape[0])[None, :, None, None] + x,
    "type": lambda conv, x: x.to(conv.weight.device, conv.weight.dtype),
    "zeros like it": lambda conv, x: torch.zeros_like(conv.weight).sum() + x,
    "its size, kept": lambda conv, x: (setattr(conv, "size", conv.weight.pow(2).sum()), x)[1],
    "its bias": lambda conv, x: x + conv.bias[:, None, None],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", OTHERS)
def test_a_weight_that_meets_no_map_elsewhere_is_not_read(other, way):
    assert reason(way, OTHERS[other]) is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.mix(F.conv_transpose2d(self.conv(x).relu(), self.conv.weight, padding=1).relu())


@pytest.mark.parametrize(
    "trace",
    [
        lambda net: net,
        fx.symbolic_trace,
        pytest.param(lambda net: torch.export.export(net, (IMAGE,)).module(), marks=READ_TWICE, id="exported"),
    ],
)
def test_a_weight_shared_with_a_transposed_convolution_is_read(trace):
    rows = cs.plan_conversion(trace(Tied()), input_size=32).rows
    assert Reason.WEIGHT_READ in {row.reason_key for row in rows}
    assert not [row for row in rows if row.converted]


def test_a_weight_shared_with_a_transposed_layer_is_read():
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 3, 3), nn.Conv2d(3, 4, 1))
    network[1].weight = network[0].weight
    assert cs.plan_conversion(network, input_size=32).rows[0].reason_key is Reason.WEIGHT_READ
