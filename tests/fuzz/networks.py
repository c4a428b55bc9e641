"""Random small networks, drawn by hypothesis.

A kind of part is a function that draws one: it takes what draws and the shape (channels, height, width) of a map, and
gives what makes the part and the shape of its output. With ``keep`` that is the same shape.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d

from coconv_surgery import CoConv2d
from fuzz import parts
from fuzz.recipes import Make, Recipe, make

Shape = tuple[int, int, int]
Drawn = tuple[Make, Shape]

# What a kind says of the networks that have it.
NO_COPY = "cannot be deep-copied, or not so that the copy is one"
NO_PICKLE = "cannot be pickled"
NO_GRAPH = "torch.fx cannot trace it whole, or what it traces computes something else"
NO_TRAINING = "has no training mode"
MAY_REFUSE = "planning may say no"
ONE_IN_A_GRAPH = "several convolutions have one weight, and are one in a graph"
CUT_GRADIENT = "its gradients are cut somewhere"


@dataclass(frozen=True)
class Kind:
    """A kind of part."""

    draw: Callable[..., Drawn]
    flags: frozenset[str]
    wraps: bool
    weight: int


KINDS: dict[str, Kind] = {}


def kind(*flags: str, wraps: bool = False, weight: int = 1) -> Callable[[Callable[..., Drawn]], Callable[..., Drawn]]:
    """Make a function a kind of part, known by its name.

    Args:
        flags: What it says of networks that have it.
        wraps: Whether it holds other parts.
        weight: How often it is drawn.
    """

    def register(function: Callable[..., Drawn]) -> Callable[..., Drawn]:
        KINDS[function.__name__] = Kind(function, frozenset(flags), wraps, weight)
        return function

    return register


@dataclass
class Drawer:
    """What draws the parts of one network."""

    draw: Callable[[st.SearchStrategy], Any]
    kinds: Collection[str]
    batch: int
    used: set[str] = field(default_factory=set)

    def of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def part(self, shape: Shape, keep: bool = False, depth: int = 0, without: Collection[str] = ()) -> Drawn:
        """Draw a part of any kind.

        Args:
            shape: Of its input.
            keep: Whether its output has the same shape.
            depth: How many parts it is in.
            without: Flags that it may not have.
        """
        names = [
            name
            for name, kind in KINDS.items()
            if name in self.kinds and not (depth > 1 and kind.wraps) and not kind.flags & set(without)
            for _ in range(kind.weight)
        ]
        name = self.of(*names) if names else "conv"
        self.used.add(name)
        if not KINDS[name].wraps:
            return KINDS[name].draw(self, shape, keep)

        def inner(shape: Shape = shape, keep: bool = keep, without: Collection[str] = without) -> Drawn:
            return self.part(shape, keep, depth + 1, without)

        return KINDS[name].draw(self, shape, keep, inner)


@st.composite
def networks(draw: Any, kinds: Collection[str] = tuple(KINDS), most: int = 6) -> Recipe:
    """Draw a network.

    Args:
        kinds: The kinds of parts to draw from.
        most: The most parts in a row.
    """
    drawer = Drawer(draw, kinds, batch=draw(st.sampled_from((2, 1))))
    input_shape = shape = drawer.of((3, 16, 16), (3, 20, 24), (1, 17, 19))
    row = [make(nn.Conv2d, shape[0], channels := drawer.of(4, 8, 6, 16), 3, padding=1)]
    shape = (channels, *shape[1:])
    for _ in range(draw(st.integers(1, most))):
        made, shape = drawer.part(shape)
        row.append(made)
    classes = drawer.of(5, 4)
    if drawer.of(True, False):
        head = make(parts.Dense, make(nn.Conv2d, shape[0], classes, drawer.of(3, 1), padding=drawer.of(1, 0)))
    else:
        head = make(parts.Pooled, make(nn.Linear, shape[0], classes))
    outputs = drawer.of(*parts.OUTPUTS)
    network = make(parts.Network, row, head, outputs)
    flags = frozenset().union(*(KINDS[name].flags for name in drawer.used))
    flags |= {NO_GRAPH} if outputs == "object" else set()
    if NO_GRAPH not in flags and drawer.of(False, False, False, True) and "graph" in kinds:
        network = make(parts.traced, network)
        drawer.used.add("graph")
    dtype = torch.float32 if NO_TRAINING in flags else drawer.of(torch.float64, torch.float32)
    return Recipe(network, (drawer.batch, *input_shape), dtype, frozenset(drawer.used), flags)


# Convolutions.


def _after(shape: Shape, channels: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Shape:
    height, width = ((side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in shape[1:])
    return channels, height, width


def _conv(d: Drawer, shape: Shape, keep: bool, cls: Any = nn.Conv2d, **more: Any) -> Drawn:
    channels = shape[0] if keep else d.of(8, 4, 6, 16)
    stride = 1 if keep or min(shape[1:]) < 8 else d.of(1, 1, 1, 2)
    more |= {"bias": False} if d.of(True, False) else {}
    if stride == 2:
        more["stride"] = 2
    return make(cls, shape[0], channels, 3, padding=1, **more), _after(shape, channels, 3, stride, 1)


@kind(weight=6)
def conv(d, shape, keep):
    return _conv(d, shape, keep)


@kind(weight=3)
def any_conv(d, shape, keep):
    """Any kernel, stride, padding, dilation and groups."""
    channels = shape[0] if keep else d.of(8, 4, 6, 16)
    kernel, dilation = d.of(3, 3, 3, 1, 5), d.of(1, 1, 2)
    small = min(shape[1:]) < 10
    stride = 1 if keep or small else d.of(1, 1, 2, 3)
    same = dilation * (kernel - 1) // 2
    padding = same if keep or small else d.of(same, same, 0, same + 1, "same" if stride == 1 else same)
    mode = d.of("zeros", "zeros", "reflect", "replicate", "circular")
    groups = d.of(*(groups for groups in (1, 1, 2, 3, 4, shape[0]) if not shape[0] % groups and not channels % groups))
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    given |= {"padding_mode": mode, "bias": d.of(True, False)}
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros", "bias": True}
    made = make(nn.Conv2d, shape[0], channels, kernel, **{k: v for k, v in given.items() if v != plain[k]})
    return made, _after(shape, channels, kernel, stride, same if padding == "same" else padding, dilation)


@kind(weight=2)
def depthwise(d, shape, keep):
    return make(
        nn.Sequential,
        make(nn.Conv2d, shape[0], shape[0], 3, padding=1, groups=shape[0]),
        make(nn.ReLU),
        make(nn.Conv2d, shape[0], shape[0], 1),
    ), shape


@kind(weight=2)
def subclass(d, shape, keep):
    return _conv(d, shape, keep, d.of(parts.InheritedConv2d, parts.HalvedConv2d, parts.UnknownConv2d))


@kind()
def timm_conv(d, shape, keep):
    return _conv(d, shape, keep, d.of(StdConv2d, ScaledStdConv2d))


@kind(NO_GRAPH)
def same_conv(d, shape, keep):
    made, shape = _conv(d, shape, keep, Conv2dSame)
    return Make(Conv2dSame, made.args, {**made.kwargs, "padding": 0}), shape


@kind()
def contextual(d, shape, keep):
    """Contextual by birth."""
    return _conv(d, shape, keep, CoConv2d, levels=d.of(2, 1, 3))


@kind()
def transposed(d, shape, keep):
    if keep or max(shape[1:]) > 24:
        return make(nn.ConvTranspose2d, shape[0], shape[0], 3, padding=1), shape
    return make(nn.ConvTranspose2d, shape[0], 8, 2, 2), (8, 2 * shape[1], 2 * shape[2])


@kind(NO_PICKLE)
def parametrization(d, shape, keep):
    made, shape = _conv(d, shape, keep)
    wraps = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    return make(parts.parametrized, made, d.of(*wraps)), shape


@kind(NO_COPY, NO_PICKLE, NO_GRAPH)
def old_parametrization(d, shape, keep):
    made, shape = _conv(d, shape, keep)
    return make(parts.parametrized, made, d.of(nn.utils.weight_norm, nn.utils.spectral_norm)), shape


@kind(ONE_IN_A_GRAPH)
def tied(d, shape, keep):
    first = make(nn.Conv2d, shape[0], shape[0], 3, padding=1)
    return make(parts.Tied, first, make(nn.Conv2d, shape[0], shape[0], 3, padding=1, bias=False)), shape


@kind(NO_GRAPH)
def by_function(d, shape, keep):
    return make(parts.ByFunction, make(nn.Conv2d, shape[0], shape[0], 3, padding=1), d.of(True, False)), shape


@kind(NO_GRAPH)
def warp(d, shape, keep):
    return make(parts.Warp, make(nn.Conv2d, shape[0], 2, 3, padding=1)), shape


@kind()
def gate(d, shape, keep):
    return make(parts.Gate, make(nn.Conv2d, shape[0], 4, 1), make(nn.Conv2d, 4, shape[0], 1)), shape


# What stands between convolutions.


@kind(weight=3)
def norm(d, shape, keep):
    choices = [make(nn.BatchNorm2d, shape[0]), make(nn.GroupNorm, 2, shape[0]), make(nn.BatchNorm2d, shape[0])]
    return d.of(*choices), shape


@kind(weight=2)
def activation(d, shape, keep):
    return d.of(make(nn.ReLU), make(nn.GELU), make(nn.PReLU), make(nn.ReLU, inplace=True), make(nn.Hardswish)), shape


@kind()
def pool(d, shape, keep):
    if keep or min(shape[1:]) < 8:
        return make(nn.AvgPool2d, 3, 1, 1), shape
    return d.of(make(nn.MaxPool2d, 2), make(nn.AvgPool2d, 2)), _after(shape, shape[0], 2, 2)


@kind()
def dropout(d, shape, keep):
    return make(nn.Dropout, 0.5), shape


@kind(NO_GRAPH)
def outer_padding(d, shape, keep):
    pad = d.of(nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d, nn.CircularPad2d)
    return make(nn.Sequential, make(pad, 1), make(nn.Conv2d, shape[0], shape[0], 3)), shape


# Parts that hold parts.


@kind(wraps=True, weight=4)
def block(d, shape, keep, inner):
    """Convolution, norm and activation."""
    made, after = _conv(d, shape, keep)
    norms = [make(nn.BatchNorm2d, after[0]), make(nn.GroupNorm, 2, after[0]), make(nn.Identity)]
    return make(nn.Sequential, made, d.of(*norms), make(nn.ReLU, inplace=d.of(False, True))), after


@kind(wraps=True, weight=2)
def sequential(d, shape, keep, inner):
    first, middle = inner(keep=keep)
    second, after = inner(shape=middle, keep=keep)
    return make(nn.Sequential, first, second), after


@kind(wraps=True)
def module_dict(d, shape, keep, inner):
    first, middle = inner(keep=keep)
    second, after = inner(shape=middle, keep=keep)
    return make(parts.Named, a=first, b=second), after


@kind(wraps=True, weight=2)
def residual(d, shape, keep, inner):
    return make(parts.Residual, inner(keep=True)[0]), shape


@kind(wraps=True)
def branches(d, shape, keep, inner):
    how = "sum" if keep or shape[0] > 8 else d.of("sum", "cat")
    made = make(parts.Branches, [inner(keep=True)[0], inner(keep=True)[0]], how)
    return made, (shape if how == "sum" else (2 * shape[0], *shape[1:]))


@kind(wraps=True)
def twice(d, shape, keep, inner):
    return make(parts.Twice, inner(keep=True)[0], d.of(False, True)), shape


@kind(NO_GRAPH, wraps=True)
def on_training(d, shape, keep, inner):
    return make(parts.OnTraining, inner(keep=True)[0], inner(keep=True)[0]), shape


@kind(NO_GRAPH, wraps=True)
def on_shape(d, shape, keep, inner):
    return make(parts.OnShape, inner(keep=True)[0], inner(keep=True)[0]), shape


@kind(NO_GRAPH, wraps=True)
def on_numbers(d, shape, keep, inner):
    return make(parts.OnNumbers, inner(keep=True)[0], inner(keep=True)[0]), shape


@kind(NO_GRAPH, wraps=True)
def rescaled(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Rescaled, made, d.of("item", "numpy")), after


@kind(NO_GRAPH, MAY_REFUSE, wraps=True)
def rejecting(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Rejecting, made), after


@kind(NO_GRAPH, wraps=True)
def swallowing(d, shape, keep, inner):
    return make(parts.Swallowing, inner(keep=True)[0]), shape


@kind(NO_GRAPH)
def unusual(d, shape, keep):
    """What torch.fx does not like, or autograd, or who plans."""
    return make(d.of(parts.Rounding, parts.Watching, parts.Seeding, parts.WritingInput, parts.ByNumpy)), shape


@kind(NO_GRAPH, wraps=True)
def own_gradient(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(d.of(parts.Differentiating, parts.Cast, parts.Offloading), made), after


@kind(NO_GRAPH, wraps=True)
def noisy(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Noisy, made), after


@kind(NO_GRAPH, MAY_REFUSE)
def cache(d, shape, keep):
    """Keeps something outside the network."""
    common = (parts.DictCache, parts.LruCache, parts.ClassCache, parts.ClassSlot, parts.ClosureCache)
    others = (parts.DefaultCache, parts.SeenShapes, parts.SlotsCache, parts.LocalCache, parts.ContextCache)
    return make(d.of(*common, *others, parts.DequeCache, parts.AttributeCache)), shape


@kind(NO_GRAPH, MAY_REFUSE)
def by_module(d, shape, keep):
    """Keeps something outside the network that knows the network."""
    return make(d.of(parts.MethodCache, parts.ByModule)), shape


@kind(NO_GRAPH, NO_COPY, MAY_REFUSE)
def registered(d, shape, keep):
    return make(parts.Registered), shape


@kind(NO_GRAPH)
def own_cache(d, shape, keep):
    return make(d.of(parts.OwnCache, parts.OwnSlot, parts.LazyBuffer)), shape


@kind(NO_GRAPH, MAY_REFUSE, wraps=True)
def kept_features(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.KeptFeatures, made), after


@kind(NO_GRAPH, MAY_REFUSE)
def class_counter(d, shape, keep):
    return make(parts.ClassCounter), shape


@kind(NO_GRAPH)
def own_counter(d, shape, keep):
    return make(parts.OwnCounter), shape


@kind(NO_GRAPH)
def buffer_counter(d, shape, keep):
    return make(parts.BufferCounter), shape


@kind(NO_GRAPH, NO_COPY, NO_PICKLE, MAY_REFUSE, wraps=True)
def fed_by_hook(d, shape, keep, inner):
    made, after = inner(keep=keep, without=(NO_TRAINING,))
    return make(parts.FedByHook, made, d.of("closure", "method", "partial")), after


@kind(NO_GRAPH, wraps=True)
def hooked(d, shape, keep, inner):
    made, after = inner(keep=keep, without=(NO_TRAINING,))
    return d.of(make(parts.hooked, made, 2), make(parts.prehooked, made)), after


@kind(NO_GRAPH, NO_COPY, NO_PICKLE, MAY_REFUSE, wraps=True)
def closing_over(d, shape, keep, inner):
    made, after = inner(keep=keep, without=(NO_TRAINING,))
    return d.of(make(parts.Holding, made, "lambda"), make(parts.replaced, made, 2)), after


@kind(NO_GRAPH, wraps=True)
def holding(d, shape, keep, inner):
    made, after = inner(keep=keep, without=(NO_TRAINING,))
    return make(parts.Holding, made, d.of("partial", "method", "forward")), after


@kind(NO_GRAPH, NO_COPY, NO_PICKLE, wraps=True)
def locked(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Locked, made), after


@kind(NO_GRAPH, NO_COPY, MAY_REFUSE, wraps=True)
def teacher(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Teacher, made), after


@kind(NO_GRAPH, wraps=True)
def writing(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Writing, made), after


@kind(wraps=True)
def with_property(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Property, made), after


@kind(NO_GRAPH, CUT_GRADIENT, wraps=True)
def switched(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return d.of(*(make(parts.Switched, made, mode) for mode in parts.GRADIENTS), make(parts.Decorated, made)), after


@kind(CUT_GRADIENT, NO_GRAPH, wraps=True)
def detached(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Detached, made), after


@kind(NO_GRAPH, wraps=True)
def checkpointed(d, shape, keep, inner):
    made, after = inner(keep=keep)
    return make(parts.Checkpointed, made, d.of(False, True)), after


@kind(wraps=True)
def graph(d, shape, keep, inner):
    """A part that torch.fx has traced."""
    made, after = inner(keep=keep, without=(NO_GRAPH, NO_TRAINING))
    return make(parts.traced, make(nn.Sequential, made)), after


@kind(NO_GRAPH, NO_TRAINING, NO_PICKLE, wraps=True)
def export(d, shape, keep, inner):
    """A part that torch.export has exported."""
    made, after = inner(keep=keep, without=(NO_GRAPH, NO_TRAINING, ONE_IN_A_GRAPH))
    return make(parts.exported, made, (d.batch, *shape), d.of(False, True)), after
