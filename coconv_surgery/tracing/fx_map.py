"""The FX map of a network: which node of which graph calls which module."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import timm.models
import torch.fx as fx
import torch.nn as nn

from coconv_surgery.tracing.sites import WatchedConv, graphs_of

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
        model: The network. Modules that are graphs, in it or itself, are not traced: their own graph is taken.
        concrete_args: Arguments of its ``forward`` to be taken as constants.
    """
    graphs = GraphMap()
    _map_module(model, "", concrete_args, graphs)
    return graphs


def _map_module(module: nn.Module, path: str, concrete_args: dict[str, Any] | None, graphs: GraphMap) -> None:
    if own := graphs_of(module):
        called = _record(module, next(iter(own.values())), path, graphs)
    else:
        called = _trace(module, path, concrete_args, graphs)
    for name, child in called:
        if _holds_conv(child):
            _map_module(child, _join(path, name), None, graphs)


def _trace(
    module: nn.Module, path: str, concrete_args: dict[str, Any] | None, graphs: GraphMap
) -> list[tuple[str, nn.Module]]:
    """Trace a module.

    Returns:
        What is to be mapped apart: graphs that it calls, and the children of what cannot be traced.
    """
    tracer = _Tracer()
    try:
        with warnings.catch_warnings():
            # A constant argument that torch.fx cannot compare does not matter in a graph that is only read.
            warnings.filterwarnings("ignore", "Was not able to add assertion")
            graph = tracer.trace(module, concrete_args)
    except _TRACING_ERRORS as error:
        graphs.failures[path] = _message(error)
        return list(module.named_children())
    apart = _record(module, graph, path, graphs)
    for name, failure in tracer.failures.items():
        graphs.failures[_join(path, name)] = failure
        apart += [(f"{name}.{child}", sub) for child, sub in module.get_submodule(name).named_children()]
    return apart


def _record(module: nn.Module, graph: fx.Graph, path: str, graphs: GraphMap) -> list[tuple[str, nn.Module]]:
    """Take note of the calls in a graph.

    Returns:
        The modules called that are graphs themselves.
    """
    called = {}
    for node in graph.nodes:
        if node.op == "call_module":
            graphs.calls.setdefault(_join(path, node.target), []).append(node.name)
            if graphs_of(sub := module.get_submodule(node.target)):
                called[node.target] = sub
    return list(called.items())


class _Tracer(fx.Tracer):
    """Traces with timm's leaves; a module that fails becomes a leaf, with its reason."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(timm.models.get_notrace_functions()))
        self.leaves = (nn.Conv2d, WatchedConv, *timm.models.get_notrace_modules())
        self.failures: dict[str, str] = {}

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        leaf = isinstance(module, self.leaves) or bool(graphs_of(module))
        return leaf or super().is_leaf_module(module, qualified_name)

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
    return any(isinstance(sub, nn.Conv2d | WatchedConv) for sub in module.modules())
