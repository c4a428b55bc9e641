"""Convolutions and norms that are nodes of a graph, made modules of it where their numbers are constant."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.deployment.kernels import constant
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


def nodes_to_modules(model: nn.Module) -> dict[str, str]:
    """Replace nodes of a network's graphs by calls of modules that compute the same.

    Args:
        model: The network, changed in place.

    Returns:
        Norms that stay nodes, and why.
    """
    left = {}
    for prefix, owner in list(model.named_modules()):
        for graph in graphs_of(owner).values():
            for conv in find_graph_convs(graph):
                if (module := _conv_module(owner, conv)) is not None:
                    sources = [*conv.parts, *upstream(conv.weight), *(upstream(conv.bias) if conv.bias else ())]
                    _replace_node(owner, conv.node, module, conv.input, sources)
            for node in list(graph.nodes):
                if node.op == "call_function" and node.target in _NORMS and not _replace_norm(owner, node):
                    left[f"{prefix}.{node.name}".lstrip(".")] = "a graph does not tell its numbers, or its kind"
        if isinstance(owner, fx.GraphModule):
            owner.recompile()
    return left


def _conv_module(owner: nn.Module, conv: GraphConv) -> nn.Module | None:
    weight = _numbers_of(owner, conv.weight)
    bias = None if conv.bias is None else _numbers_of(owner, conv.bias)
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
    made.weight, made.bias = constant(weight), None if bias is None else constant(bias)
    return made.eval()


def _replace_norm(owner: nn.Module, node: fx.Node) -> bool:
    """Replace a norm by a module, if its numbers and its kind are known."""
    named: dict[str, Any] = {**dict(zip(_NORMS[node.target], node.args, strict=False)), **node.kwargs}
    first = node
    if node.target is aten._native_batch_norm_legit_no_training.default:
        if [user.args[1:] for user in node.users] != [(0,)]:
            return False
        (first,) = node.users
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: _numbers_of(owner, named.get(name)) for name in names}
    known = all(tensors[name] is not None or named.get(name) is None for name in tensors)
    mean, variance = tensors["running_mean"], tensors["running_var"]
    kind = _kind_of_norm(owner, named["input"])
    if named.get("training") or mean is None or variance is None or not known or kind is None:
        return False
    norm: Any = kind(len(mean), eps=named.get("eps", 1e-5), affine=False, device="meta")
    norm.running_mean, norm.running_var = mean.clone(), variance.clone()
    norm.num_batches_tracked = torch.tensor(0)
    for name in ("weight", "bias"):
        if (tensor := tensors[name]) is not None:
            setattr(norm, name, constant(tensor))
    sources = [step for name in names if isinstance(named.get(name), fx.Node) for step in upstream(named[name])]
    _replace_node(owner, first, norm.eval(), named["input"], [*([node] if first is not node else []), *sources])
    return True


def _kind_of_norm(owner: nn.Module, source: fx.Node) -> Any:
    """The norm for maps of as many dimensions as a node's, if that is known."""
    shape = getattr(source.meta.get("val"), "shape", None)
    if shape is not None:
        return {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(len(shape))
    behind_conv = source.op == "call_module" and isinstance(owner.get_submodule(str(source.target)), nn.Conv2d)
    return nn.BatchNorm2d if behind_conv else None


def _replace_node(
    owner: nn.Module, node: fx.Node, module: nn.Module, source: fx.Node, parts: Sequence[fx.Node]
) -> None:
    """Let a node call a module on a source; what it took besides goes, where nothing else takes it."""
    name = node.name
    while hasattr(owner, name):
        name += "_"
    owner.add_module(name, module)
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}
    for part in reversed(list(node.graph.nodes)):
        if part in parts and not part.users and part.op != "placeholder":
            node.graph.erase_node(part)


def _numbers_of(owner: nn.Module, node: Any) -> torch.Tensor | None:
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
