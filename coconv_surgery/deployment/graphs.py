"""Convolutions and norms that are nodes of a graph, made modules of it where their numbers are constant."""

from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import level_padding, pair
from coconv_surgery.tracing.graph_convs import GraphConv, find_graph_convs, upstream
from coconv_surgery.tracing.graph_weights import attribute, compute
from coconv_surgery.tracing.sites import graphs_of

aten = torch.ops.aten
_FUNCTION = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_OPERATOR = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_NORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: _FUNCTION,
    torch.batch_norm: _OPERATOR,
    aten.batch_norm.default: _OPERATOR,
    aten._native_batch_norm_legit_no_training.default: tuple(name for name in _OPERATOR if name != "training"),
}


def nodes_to_modules(model: nn.Module) -> None:
    """Replace nodes of a network's graphs by calls of modules that compute the same.

    Args:
        model: The network, changed in place.
    """
    for owner in list(model.modules()):
        for graph in graphs_of(owner).values():
            for conv in find_graph_convs(graph):
                if (module := _conv_module(owner, conv)) is not None:
                    _replace(owner, conv.node, module, conv.input, conv.parts)
            for node in list(graph.nodes):
                if node.op == "call_function" and node.target in _NORMS:
                    _replace_norm(owner, node)
        if isinstance(owner, fx.GraphModule):
            owner.graph.eliminate_dead_code(_has_effect)
            owner.recompile()


def _has_effect(node: fx.Node) -> bool:
    return node.is_impure() or node.op == "call_module"


def _conv_module(owner: nn.Module, conv: GraphConv) -> nn.Module | None:
    weight = _constant(owner, conv.weight)
    bias = None if conv.bias is None else _constant(owner, conv.bias)
    if (
        weight is None
        or weight.dim() != 4
        or conv.output_padding is not None
        or (bias is None) is not (conv.bias is None)
    ):
        return None
    made = CoConv2d(
        weight.shape[1] * conv.groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias is not None,
        cast(Any, conv.padding_mode),
        device="meta",
        dilations=[conv.dilation] if conv.levels is None else conv.levels.dilations,
        splits=[len(weight)] if conv.levels is None else cast(Any, conv.levels.splits),
    )
    padded = tuple(level_padding(pair(made.kernel_size), conv.padding, conv.dilation, pair(d)) for d in made.dilations)
    if conv.paddings not in ((), padded):
        return None
    made.weight, made.bias = _parameter(weight), None if bias is None else _parameter(bias)
    return made.eval()


def _replace_norm(owner: nn.Module, node: fx.Node) -> None:
    named: dict[str, Any] = {**dict(zip(_NORMS[node.target], node.args, strict=False)), **node.kwargs}
    first = node
    if node.target is aten._native_batch_norm_legit_no_training.default:
        if [user.args[1:] for user in node.users] != [(0,)]:
            return
        (first,) = node.users
    tensors = {name: _constant(owner, named.get(name)) for name in ("running_mean", "running_var", "weight", "bias")}
    known = all(tensors[name] is not None or named.get(name) is None for name in tensors)
    mean, variance = tensors["running_mean"], tensors["running_var"]
    if named.get("training") or mean is None or variance is None or not known:
        return
    norm: Any = nn.BatchNorm2d(len(mean), eps=named.get("eps", 1e-5), affine=False, device="meta")
    norm.running_mean, norm.running_var = mean.clone(), variance.clone()
    norm.num_batches_tracked = torch.tensor(0)
    for name in ("weight", "bias"):
        if (tensor := tensors[name]) is not None:
            setattr(norm, name, _parameter(tensor))
    _replace(owner, first, norm.eval(), named["input"], (node,) if first is not node else ())


def _replace(owner: nn.Module, node: fx.Node, module: nn.Module, source: fx.Node, parts: tuple[fx.Node, ...]) -> None:
    name = node.name
    while hasattr(owner, name):
        name += "_"
    owner.add_module(name, module)
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}
    for part in reversed(list(node.graph.nodes)):
        if part in parts and not part.users:
            node.graph.erase_node(part)


def _constant(owner: nn.Module, node: Any) -> torch.Tensor | None:
    """The numbers of a node that depends on nothing but tensors of the module."""
    if not isinstance(node, fx.Node):
        return None
    values: dict[fx.Node, Any] = {}
    for step in upstream(node):
        if step.op == "get_attr":
            values[step] = attribute(owner, str(step.target))
        elif step.op in ("call_function", "call_method"):
            try:
                with torch.no_grad():
                    values[step] = compute(step, values)
            except Exception:  # the graph's own code
                return None
        else:
            return None
    value = values[node]
    return value.detach() if isinstance(value, torch.Tensor) else None


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)
