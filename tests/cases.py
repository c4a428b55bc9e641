"""Contextual convolutions of every kind, drawn by hypothesis, with an input to run each on."""

import contextlib
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from reference import both, centred_padding

from coconv_surgery import CoConv2d

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# Largest error against a float64 reference, relative to the largest entry (or to 1). bfloat16 keeps 8 bits: one
# rounding is 2⁻⁹, and the gradient of the input adds up levels, and with replicate padding pixels, in bfloat16.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass
class Case:
    """A contextual convolution and the input to run it on."""

    arguments: dict  # the plain convolution's
    levels: dict  # CoConv2d's own
    shape: tuple[int, ...]
    seed: int

    def build(self, dtype=torch.float64):
        torch.manual_seed(self.seed)
        coconv = CoConv2d(**self.arguments, **self.levels, dtype=dtype)
        return coconv, torch.randn(self.shape, dtype=dtype)


def sides(values):
    return st.one_of(values, st.tuples(values, values))


def compositions(total, parts):
    """Ways to write a number as a sum of positive parts, in order."""
    cuts = st.sets(st.integers(1, total - 1), min_size=parts - 1, max_size=parts - 1) if parts > 1 else st.just(set())
    return cuts.map(lambda at: [stop - start for start, stop in pairwise([0, *sorted(at), total])])


@st.composite
def plain_arguments(draw, kernels):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    # From 16 on, levels that share a reorder of their input are worth it.
    few_or_many = st.integers(1, 3) if groups > 1 else st.one_of(st.integers(1, 3), st.integers(16, 17))
    depthwise = groups > 1 and draw(st.booleans())
    padding = draw(st.one_of(sides(st.integers(0, 3)), st.sampled_from(["same", "valid"])))
    return {
        "in_channels": groups if depthwise else groups * draw(few_or_many),
        "out_channels": groups * draw(st.integers(1, 3 if groups > 1 else 9)),
        "kernel_size": draw(kernels),
        "stride": 1 if padding == "same" else draw(sides(st.integers(1, 3))),
        "padding": padding,
        "dilation": draw(sides(st.integers(1, 2))),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(PADDING_MODES)),
    }


def draw_shape(draw, arguments, dilations):
    """A map on which every level runs, often no larger than it has to be."""
    kernel = both(arguments["kernel_size"])
    pads = [centred_padding(kernel, arguments["padding"], arguments["dilation"], dilation) for dilation in dilations]
    size = []
    for axis in (0, 1):
        pad = max(level[axis] for level in pads)
        span = both(dilations[0])[axis] * (kernel[axis] - 1) + 1
        fits = span - 2 * pads[0][axis]
        needed = {"zeros": 1, "replicate": 1, "reflect": pad + 1, "circular": max(1, pad)}[arguments["padding_mode"]]
        size.append(max(1, fits, needed) + draw(st.integers(0, 6)))
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return (*batch, arguments["in_channels"], *size)


@st.composite
def cases(draw):
    odd = st.one_of(st.just(3), sides(st.sampled_from([1, 3, 5, 7])).filter(lambda kernel: both(kernel) != (1, 1)))
    arguments = draw(plain_arguments(odd))
    units = arguments["groups"] if arguments["groups"] > 1 else arguments["out_channels"]
    size = arguments["out_channels"] // units
    count = draw(st.integers(1, min(units, 4)))
    base = both(arguments["dilation"])
    dilations = [(level * base[0], level * base[1]) for level in range(1, count + 1)]
    levels = {"levels": count}
    if draw(st.booleans()):
        explicit = st.tuples(st.integers(base[0], 4), st.integers(base[1], 4))
        dilations = draw(st.lists(explicit, min_size=count, max_size=count))
        levels = {"dilations": [height if height == width else (height, width) for height, width in dilations]}
    if draw(st.booleans()):
        levels["splits"] = [share * size for share in draw(compositions(units, count))]
    else:
        levels["splits"] = draw(st.sampled_from(["pow2", "even"]))
    return Case(arguments, levels, draw_shape(draw, arguments, dilations), draw(st.integers(0, 2**16)))


@contextlib.contextmanager
def reliable_kernels(dtype):
    """Torch's own kernels for bfloat16: oneDNN 3.7 gets plain convolutions of some tiny maps wrong, or crashes."""
    torch.backends.mkldnn.enabled = dtype != torch.bfloat16
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


def assert_close(actual, expected, dtype):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale)
