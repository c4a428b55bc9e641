"""The FX map of a network, and convolutions that are function calls in a graph."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm.models
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.layers.functional import coconv2d
from coconv_surgery.layers.switch import to_coconv_

# What symbolic tracing is known to raise in modules that look at their input.
_TRACING_ERRORS = (
    fx.proxy.TraceError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class GraphMap:
    """Where each module is called, according to torch.fx.

    Attributes:
        calls: For every module by name, the names of the graph nodes that call it.
        failures: For every module that could not be traced by name (``""`` is the network), the reason. Such a module
            is one node of its parent's graph, and its children are traced apart.
    """

    calls: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def why_unseen(self, name: str) -> str | None:
        """Why no node calls a module: the innermost module around it that is one node, or could not be traced."""
        holder = name
        while holder:
            holder = holder.rpartition(".")[0]
            if holder in self.failures:
                return f"torch.fx cannot trace {holder or 'the network'}: {self.failures[holder]}"
            if holder in self.calls:
                return f"torch.fx takes {holder} as one node"
        return None


def map_graphs(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> GraphMap:
    """Trace a network with timm's leaf modules, and around every module that cannot be traced.

    Args:
        model: The network, or a graph module, whose own graph is taken.
        concrete_args: Arguments of its ``forward`` to be taken as constants.
    """
    graphs = GraphMap()
    if isinstance(model, fx.GraphModule):
        _record(model, model.graph, "", graphs)
        for name, node in function_convs(model):
            graphs.calls[name] = [node.name]
    else:
        _map_module(model, "", concrete_args, graphs)
    return graphs


def _map_module(module: nn.Module, path: str, concrete_args: dict[str, Any] | None, graphs: GraphMap) -> None:
    tracer = _Tracer()
    try:
        with warnings.catch_warnings():
            # A constant argument that torch.fx cannot compare is no matter for a graph that is only read.
            warnings.filterwarnings("ignore", "Was not able to add assertion")
            graph = tracer.trace(module, concrete_args)
    except _TRACING_ERRORS as error:
        graphs.failures[path] = _message(error)
        untraced = list(module.named_children())
    else:
        _record(module, graph, path, graphs)
        untraced = []
        for name, failure in tracer.failures.items():
            graphs.failures[_join(path, name)] = failure
            untraced += [(f"{name}.{child}", sub) for child, sub in module.get_submodule(name).named_children()]
    for name, child in untraced:
        if _holds_conv(child):
            _map_module(child, _join(path, name), None, graphs)


def _record(module: nn.Module, graph: fx.Graph, path: str, graphs: GraphMap) -> None:
    for node in graph.nodes:
        if node.op == "call_module":
            graphs.calls.setdefault(_join(path, node.target), []).append(node.name)


class _Tracer(fx.Tracer):
    """Traces with timm's leaves; a module that fails becomes a leaf, with its reason."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(timm.models.get_notrace_functions()))
        self.leaves = (nn.Conv2d, *timm.models.get_notrace_modules())
        self.failures: dict[str, str] = {}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)

    def call_module(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(module)
        before = len(self.graph.nodes)
        if name not in self.failures:
            try:
                return super().call_module(module, forward, args, kwargs)
            except _TRACING_ERRORS as error:
                self.failures = {
                    other: reason for other, reason in self.failures.items() if not other.startswith(name + ".")
                }
                self.failures[name] = _message(error)
                for node in reversed(list(self.graph.nodes)[before:]):
                    self.graph.erase_node(node)
        return self.create_proxy("call_module", name, args, kwargs)


def _message(error: Exception) -> str:
    first_line, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first_line}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _holds_conv(module: nn.Module) -> bool:
    return any(isinstance(sub, nn.Conv2d) for sub in module.modules())


# -- Convolutions that are function calls -------------------------------------------------------------------------

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
_CONV_FUNCTIONS = (F.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
_ORIGINAL = "coconv_surgery.original_target"
_WRAPPED = "is_wrapped"  # torch.fx's own mark of a function that a trace of the generated code must not enter


def function_convs(model: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """The 2D convolutions that are function calls in a graph, as ``torch.export`` makes them.

    Yields:
        A name, that of the module which holds the weight where there is one, and the node. A weight that several nodes
        read gives them the same name with a counter.
    """
    seen: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target in (*_CONV_FUNCTIONS, coconv2d):
            weight = _arguments(node)["weight"]
            held = isinstance(weight, fx.Node) and weight.op == "get_attr"
            name = str(weight.target).removesuffix(".weight") if held else node.name
            seen[name] = seen.get(name, 0) + 1
            yield (name if seen[name] == 1 else f"{name}#{seen[name]}"), node


def node_conv(node: fx.Node, weight: torch.Tensor) -> nn.Conv2d:
    """Describe a convolution node as a module, on the meta device.

    Args:
        node: A node of :func:`function_convs`.
        weight: Its weight; only the shape is used.
    """
    arguments = _arguments(node)
    conv = nn.Conv2d(
        weight.shape[1] * arguments["groups"],
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        _numbers(arguments["stride"]),
        _numbers(arguments["padding"]),
        _numbers(arguments["dilation"]),
        arguments["groups"],
        arguments["bias"] is not None,
        device="meta",
    )
    if node.target is coconv2d:
        levels: dict[str, Any] = dict(node.kwargs)
        to_coconv_(conv, levels["dilations"], levels["splits"])
    return conv


def node_to_coconv_(node: fx.Node, dilations: tuple[Any, ...], splits: tuple[int, ...]) -> None:
    """Make a convolution node a contextual one in place; the caller recompiles."""
    node.meta.setdefault(_ORIGINAL, node.target)
    node.meta[_WRAPPED] = True
    node.args, node.kwargs = (), {**_arguments(node), "dilations": dilations, "splits": splits}
    node.target = coconv2d


def node_to_conv_(node: fx.Node) -> None:
    """Undo :func:`node_to_coconv_`; the caller recompiles."""
    arguments = _arguments(node)
    target = node.meta.pop(_ORIGINAL, F.conv2d)
    node.meta.pop(_WRAPPED, None)
    node.target, node.args, node.kwargs = target, tuple(arguments[name] for name in _ARGUMENTS), {}


def _arguments(node: fx.Node) -> dict[str, Any]:
    given = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    return {name: given[name] if name in given else _DEFAULTS[name] for name in _ARGUMENTS}


def _numbers(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    return tuple(value) if len(value) > 1 else value[0]
