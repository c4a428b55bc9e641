"""Convolutions that are nodes of a torch.fx graph, found and described.

Three forms of one thing are read: a call of a convolution function (with the padding before it, where that is not of
zeros), a call of :func:`~coconv_surgery.layers.functional.coconv2d`, and what an export makes of the latter: a split of
the weight, a convolution for each level, and a concatenation.
"""

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn.functional as F

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.layers.functional import DIM_IF_NOT_PLAIN, coconv2d
from coconv_surgery.layers.levels import Levels, squeeze
from coconv_surgery.layers.switch import is_contextual_name

aten = torch.ops.aten
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.conv2d: _CONV,
    aten.conv2d.default: _CONV,
    aten.conv2d.padding: _CONV,
    aten.conv2d: _CONV,
    aten.convolution.default: _CONVOLUTION,
    aten.convolution: _CONVOLUTION,
    torch.convolution: _CONVOLUTION,
    F.conv_transpose2d: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    coconv2d: _CONV,
}
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_PADS: dict[Any, str | None] = {
    F.pad: None,
    torch._C._nn.pad: None,
    aten.pad.default: None,
    aten.reflection_pad2d.default: "reflect",
    aten.replication_pad2d.default: "replicate",
}
# What padding becomes in some exports: that of a size that is open, and circular one.
_WRITTEN_PIECE_BY_PIECE = (
    aten.index.Tensor,
    aten.slice_scatter.default,
    aten.new_empty.default,
    aten.empty.memory_format,
)
_INDEXED = "an export has written its padding as indices"
_WRITTEN_OUT = "an export has written its padding out"
_APART = "it is a level of a contextual convolution, taken apart as by a quantiser"
_OWN_DILATION = "its own dilation is not in the exported graph"


@dataclass(frozen=True)
class GraphConv:
    """A convolution in a graph.

    Attributes:
        node: The node whose output is the convolution's.
        input: Node of the input.
        weight: Node of the weight.
        bias: Node of the bias, if there is one.
        stride: Of the plain convolution, as all that follow.
        padding: Numbers, or ``"same"`` or ``"valid"``.
        dilation: Height and width.
        groups: Groups.
        padding_mode: As in :class:`torch.nn.Conv2d`; another than zeros is a node of its own before a plain one.
        output_padding: Of a transposed convolution; None for any other.
        kernel: Height and width of the kernel, where the weight's shape is known.
        levels: Its levels, if it is contextual.
        paddings: Padding of each level, where an export has written them out.
        parts: Other nodes that make it up, and are of no use without it.
        fixed: Why it cannot take other levels, if so.
        no_plain_form: Why its plain form is not known, if so.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: Pair
    padding: Pair | str
    dilation: Pair
    groups: int
    padding_mode: str = "zeros"
    output_padding: Pair | None = None
    kernel: Pair | None = None
    levels: Levels | None = None
    paddings: tuple[Pair, ...] = ()
    parts: tuple[fx.Node, ...] = ()
    fixed: str | None = None
    no_plain_form: str | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What it is, apart from the node, its input and its bias."""
        plain = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode, self.output_padding)
        return (*plain, self.levels)


def find_graph_convs(graph: fx.Graph) -> list[GraphConv]:
    """The 2D convolutions of a graph, in its order."""
    found: dict[fx.Node, GraphConv] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.cat.default:
            if conv := _joined_levels(node, found):
                found = {key: value for key, value in found.items() if key not in conv.parts}
                found[node] = conv
        elif node.target in _ARGUMENTS and (conv := _read(node)):
            found[node] = conv
    return _levels_apart(list(found.values()))


def _levels_apart(convs: list[GraphConv]) -> list[GraphConv]:
    """Say of levels that no concatenation joins, as with observers between, what they are: their node remembers."""
    dilations: dict[Any, set[Pair]] = defaultdict(set)
    for conv in convs:
        if conv.levels is None:
            dilations[_contextual_module(conv.node)].add(conv.dilation)
    return [
        replace(conv, fixed=_APART, no_plain_form=_APART)
        if conv.levels is None and (module := _contextual_module(conv.node)) and len(dilations[module]) > 1
        else conv
        for conv in convs
    ]


def _contextual_module(node: fx.Node) -> str | None:
    """Name of the contextual convolution that an exported node was a part of, if it was."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, cls = list(stack.values())[-1]
    name = (cls if isinstance(cls, str) else cls.__name__).rpartition(".")[2]
    return str(path) if is_contextual_name(name) else None


def _named(node: fx.Node) -> dict[str, Any]:
    given = dict(zip(_ARGUMENTS[node.target], node.args, strict=False)) | dict(node.kwargs)
    return {**_DEFAULTS, **given}


def _read(node: fx.Node) -> GraphConv | None:
    named = _named(node)
    sizes = {name: _sides(named[name]) for name in ("stride", "dilation")}
    padding = named["padding"] if isinstance(named["padding"], str) else _sides(named["padding"])
    nodes = named["input"], named["weight"]
    known = isinstance(named["groups"], int) and padding is not None and None not in sizes.values()
    if not known or not all(isinstance(value, fx.Node) for value in nodes):
        return None
    transposed = named.get("transposed", _ARGUMENTS[node.target] is _TRANSPOSED)
    conv = GraphConv(
        node,
        *nodes,
        named["bias"],
        cast(Pair, sizes["stride"]),
        cast(Any, padding),
        cast(Pair, sizes["dilation"]),
        named["groups"],
        named.get("padding_mode", "zeros"),
        cast(Pair, _sides(named.get("output_padding", 0))) if transposed else None,
    )
    if node.target is coconv2d:
        return replace(conv, levels=Levels(tuple(named["dilations"]), tuple(named["splits"])))
    pad = _pad(conv.input)
    if pad is not None and len(conv.input.users) == 1 and not transposed and conv.padding in ((0, 0), "valid"):
        source, sides, mode = pad
        return replace(conv, input=source, padding=sides, padding_mode=mode, parts=(conv.input,))
    if _gathered_from(conv.input) is not None:
        return replace(conv, fixed=_INDEXED)
    return replace(conv, fixed=_WRITTEN_OUT) if conv.input.target in _WRITTEN_PIECE_BY_PIECE else conv


def _pad(node: fx.Node) -> tuple[fx.Node, Pair, str] | None:
    """The source, the width and the mode of an even padding that is not of zeros."""
    if node.op != "call_function" or node.target not in _PADS:
        return None
    named: dict[str, Any] = dict(zip(("input", "pad", "mode"), node.args, strict=False)) | dict(node.kwargs)
    named |= {name: named[other] for name, other in (("input", "self"), ("pad", "padding")) if other in named}
    mode, sides = _PADS[node.target] or named.get("mode"), cast(Any, named.get("pad"))
    if mode not in ("reflect", "replicate", "circular") or not isinstance(named.get("input"), fx.Node):
        return None
    if not isinstance(sides, list | tuple) or len(sides) != 4 or not all(isinstance(side, int) for side in sides):
        return None
    left, right, top, bottom = sides
    even = (left, top) == (right, bottom) and min(sides) >= 0
    return (named["input"], (top, left), cast(str, mode)) if even else None


def _joined_levels(cat: fx.Node, convs: Mapping[fx.Node, GraphConv]) -> GraphConv | None:
    """What :func:`~coconv_surgery.layers.functional.coconv2d` becomes in an export, if a concatenation is its end."""
    outputs = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else 0
    if not isinstance(outputs, list | tuple) or not outputs or dim not in (-3, 1):
        return None
    if not all(isinstance(output, fx.Node) and output in convs and len(output.users) == 1 for output in outputs):
        return None
    levels = [convs[cast(fx.Node, output)] for output in outputs]
    first = levels[0]
    alike = len({(level.stride, level.padding_mode, level.bias is None) for level in levels}) == 1
    if not alike or any(level.output_padding or level.levels or isinstance(level.padding, str) for level in levels):
        return None
    splits = [_splits([level.weight for level in levels])]
    if first.bias is not None:
        splits.append(_splits([cast(fx.Node, level.bias) for level in levels]))
    inputs = [level.input for level in levels]
    gathered = [_gathered_from(node) for node in inputs]
    groups, fixed = 1, first.fixed
    grouped = any(level.groups > 1 for level in levels)
    source: Any = _only(inputs)
    if input_splits := _splits(inputs):
        groups, source = sum(level.groups for level in levels), input_splits[0].args[0]
        splits.append(input_splits)
    elif source is None:
        # Padding that an export has written out: by constant indices, or in a way that cannot be told.
        groups = sum(level.groups for level in levels) if grouped else 1
        source = first.input
        fixed = _INDEXED if groups == 1 and None not in gathered and _only(gathered) else _WRITTEN_OUT
    if not all(splits) or not isinstance(source, fx.Node) or (groups == 1 and grouped):
        return None
    split = splits[0][0]
    own_dilation = split.args[2:] == (DIM_IF_NOT_PLAIN,)
    wholes = [whole for same in splits for whole in same]
    pieces = [user for whole in wholes for user in whole.users]
    parts = [*(part for level in levels for part in (level.node, *level.parts)), *pieces, *wholes]
    return replace(
        first,
        node=cat,
        input=source,
        weight=cast(fx.Node, split.args[0]),
        bias=cast(fx.Node, splits[1][0].args[0]) if first.bias is not None else None,
        groups=groups,
        levels=Levels(tuple(squeeze(level.dilation) for level in levels), tuple(cast(Sequence[int], split.args[1]))),
        paddings=() if fixed else tuple(cast(Pair, level.padding) for level in levels),
        parts=tuple(dict.fromkeys(parts)),
        fixed=_OWN_DILATION if own_dilation else fixed,
        no_plain_form=_OWN_DILATION if own_dilation else fixed if fixed == _WRITTEN_OUT else None,
    )


def _splits(pieces: Sequence[fx.Node]) -> list[fx.Node]:
    """The splits that some nodes are the pieces of, all of them and in this order.

    It is one, or as many of the same, as where an export has made a view anew after a change in place.
    """
    if any(piece.target is not operator.getitem for piece in pieces):
        return []
    splits = [cast(fx.Node, piece.args[0]) for piece in pieces]
    first = splits[0]
    same = all(split.target is first.target and split.args == first.args for split in splits)
    if not same or first.target is not aten.split_with_sizes.default:
        return []
    in_order = [piece.args[1] for piece in pieces] == list(range(len(cast(Sequence[int], first.args[1]))))
    return list(dict.fromkeys(splits)) if in_order else []


def _gathered_from(node: fx.Node) -> fx.Node | None:
    """What a map is taken from by constant indices, which is what decompositions make of padding; None if it is not."""
    source = node
    while source.target is aten.index.Tensor:
        indices = [index for index in cast(Sequence[Any], source.args[1]) if index is not None]
        if any(step.op != "call_function" for index in indices for step in upstream(index)):
            return None
        source = cast(fx.Node, source.args[0])
    return None if source is node else source


def _only(nodes: Sequence[Any]) -> fx.Node | None:
    return nodes[0] if nodes and all(node is nodes[0] for node in nodes) else None


def _sides(value: Any) -> Pair | None:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(values) not in (1, 2) or not all(isinstance(side, int) for side in values):
        return None
    return values[0], values[-1]


def upstream(node: fx.Node) -> list[fx.Node]:
    """A node and all that it depends on, each after what it depends on itself."""
    order: dict[fx.Node, None] = {}
    stack = [(node, False)]
    while stack:
        step, expanded = stack.pop()
        if expanded:
            order[step] = None
        elif step not in order:
            stack.append((step, True))
            stack.extend((source, False) for source in step.all_input_nodes if source not in order)
    return list(order)
