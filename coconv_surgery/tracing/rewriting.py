"""Convolutions of a torch.fx graph, rewritten in place, node by node, and back to what they were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.fx.node import map_aggregate

from coconv_surgery.layers.functional import coconv2d, level_padding
from coconv_surgery.layers.levels import Levels
from coconv_surgery.tracing.graph_convs import GraphConv

aten = torch.ops.aten
_ORIGIN = "coconv_surgery.origin"
_WRAPPED = "is_wrapped"  # torch.fx's own mark of a function that a trace of the generated code must not enter


@dataclass(frozen=True)
class Origin:
    """What a node was before it was rewritten, without a reference to a node, so that it survives a graph's copy.

    Attributes:
        levels: Its levels, or None if it was a plain convolution.
        target: The function that it called.
        args: Its arguments, with the name of a role where a node stood.
        kwargs: The same by name.
        pad: The node that padded its input with something other than zeros.
    """

    levels: Levels | None
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pad: "Pad | None" = None


@dataclass(frozen=True)
class Pad:
    """A node that padded a convolution's input.

    Attributes:
        target: The function that it called.
        args: Its arguments, with the name of a role where a node stood.
        kwargs: The same by name.
        name: Its name.
        before: The name of the node that it stood before.
        meta: Its metadata.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    before: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Role:
    name: str


def mark(conv: GraphConv) -> None:
    """Keep in mind what a convolution is now, unless that was done before."""
    conv.node.meta.setdefault(_ORIGIN, _origin(conv))


def is_marked(conv: GraphConv) -> bool:
    """Whether it is kept in mind what a convolution was."""
    return _ORIGIN in conv.node.meta


def levels_before(conv: GraphConv) -> Levels | None:
    """The levels that a convolution had when it was marked; None if it was plain, or never was marked."""
    origin: Origin | None = conv.node.meta.get(_ORIGIN)
    return None if origin is None else origin.levels


def set_levels(conv: GraphConv, levels: Levels | None) -> GraphConv:
    """Give a convolution levels, or make it the plain one, in place; the caller recompiles.

    Returns:
        The convolution, described anew.
    """
    if levels is not None:
        return _write_coconv(conv, levels)
    origin = conv.node.meta.get(_ORIGIN)
    if origin is None or origin.levels is not None:
        return _write(conv, _plain_form(conv))
    del conv.node.meta[_ORIGIN]
    return _write(conv, origin)


def restore(conv: GraphConv) -> GraphConv:
    """Make a convolution what it was when it was marked, or plain if it never was; the caller recompiles.

    Returns:
        The convolution, described anew.
    """
    levels = levels_before(conv)
    restored = conv if levels == conv.levels else set_levels(conv, levels)
    conv.node.meta.pop(_ORIGIN, None)
    return restored


def _write_coconv(conv: GraphConv, levels: Levels) -> GraphConv:
    node = conv.node
    node.args = ()
    node.kwargs = {
        "input": conv.input,
        "weight": conv.weight,
        "bias": conv.bias,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "dilations": levels.dilations,
        "splits": cast(tuple[int, ...], levels.splits),
        "padding_mode": conv.padding_mode,
    }
    node.target = coconv2d
    node.meta[_WRAPPED] = True
    _erase_unused(conv.parts)
    return replace(conv, levels=levels, paddings=(), parts=())


def _write(conv: GraphConv, origin: Origin) -> GraphConv:
    node, source = conv.node, conv.input
    if (pad := origin.pad) is not None:
        before = next(other for other in node.graph.nodes if other is node or other.name == pad.before)
        args, kwargs = _filled((pad.args, dict(pad.kwargs)), {"input": conv.input})
        with node.graph.inserting_before(before):
            source = node.graph.create_node("call_function", pad.target, args, kwargs)
        source.name = pad.name or source.name
        source.meta.update(pad.meta)
    nodes = {"input": source, "weight": conv.weight, "bias": conv.bias}
    node.args, node.kwargs = _filled((origin.args, dict(origin.kwargs)), nodes)
    node.target = origin.target
    node.meta.pop(_WRAPPED, None)
    _erase_unused(conv.parts)
    return replace(conv, levels=None, paddings=(), parts=() if source is conv.input else (source,))


def _erase_unused(nodes: Sequence[fx.Node]) -> None:
    remaining = set(nodes)
    while unused := [node for node in remaining if not node.users]:
        for node in unused:
            remaining.remove(node)
            node.graph.erase_node(node)


def _origin(conv: GraphConv) -> Origin:
    """What a convolution is now."""
    node, source = conv.node, conv.input
    if conv.levels is not None:
        return Origin(conv.levels, coconv2d)
    pad = None
    if conv.parts:
        (source,) = conv.parts
        args, kwargs = _emptied((source.args, dict(source.kwargs)), {conv.input: "input"})
        pad = Pad(source.target, args, kwargs, source.name, source.next.name, dict(source.meta))
    roles = {source: "input", conv.weight: "weight"}
    if conv.bias is not None:
        roles[conv.bias] = "bias"
    args, kwargs = _emptied((node.args, dict(node.kwargs)), roles)
    return Origin(None, node.target, args, kwargs, pad)


def _plain_form(conv: GraphConv) -> Origin:
    """The plain convolution of one that was contextual from the start, in the graph's own operators."""
    functions = {node.target for node in conv.parts}
    in_aten = bool(functions & {aten.conv2d.default, aten.convolution.default})
    padding, pad = conv.padding, None
    if conv.padding_mode != "zeros":
        assert conv.kernel is not None
        height, width = level_padding(conv.kernel, conv.padding, conv.dilation, conv.dilation)
        function = aten.pad.default if in_aten else F.pad
        pad = Pad(function, (_Role("input"), [width, width, height, height], conv.padding_mode))
        padding = (0, 0)
    nodes = tuple(map(_Role, ("input", "weight", "bias")))
    numbers: tuple[Any, ...] = (conv.stride, padding, conv.dilation, conv.groups)
    if aten.convolution.default in functions:
        numbers = (conv.stride, padding, conv.dilation, False, (0, 0), conv.groups)
        return Origin(None, aten.convolution.default, nodes + numbers, {}, pad)
    return Origin(None, aten.conv2d.default if in_aten else F.conv2d, nodes + numbers, {}, pad)


def _emptied(arguments: Any, roles: Mapping[fx.Node, str]) -> Any:
    def empty(value: Any) -> Any:
        return _Role(roles[value]) if isinstance(value, fx.Node) else value

    return map_aggregate(arguments, empty)


def _filled(arguments: Any, nodes: Mapping[str, fx.Node | None]) -> Any:
    def fill(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Role) else value

    return map_aggregate(arguments, fill)
