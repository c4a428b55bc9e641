"""The FX map of a network: which node of which graph calls which module."""

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm.models
import torch.fx as fx
import torch.nn as nn
from torch.fx import _symbolic_trace

from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.objects import in_short, tensors_in
from coconv_surgery.tracing.sites import WatchedConv, graphs_of
from coconv_surgery.tracing.surroundings import COMPILED
from coconv_surgery.tracing.twin import call_alone

# Whatever the network's code raises where there are no numbers; it may even want to exit.
_FAILURES = (Exception, SystemExit)


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


def map_graphs(model: nn.Module, inputs: Inputs | None = None) -> GraphMap:
    """Trace a network with timm's leaf modules, and around every module that cannot be traced.

    Nothing of torch.fx is patched: the calls of the network's own modules are, which nobody else runs.

    Args:
        model: A twin. Modules that are graphs, in it or itself, are not traced: their own graph is taken.
        inputs: What the network is called with; what holds no tensors is taken as constant.
    """
    graphs = GraphMap()
    with _wrapped_functions(model):
        _map_module(model, "", inputs, graphs)
    return graphs


def _map_module(module: nn.Module, path: str, inputs: Inputs | None, graphs: GraphMap) -> None:
    if own := graphs_of(module):
        called = _record(module, next(iter(own.values())), path, graphs)
    else:
        called = _trace(module, path, inputs, graphs)
    for name, child in called:
        if _holds_conv(child):
            _map_module(child, _join(path, name), None, graphs)


def _trace(module: nn.Module, path: str, inputs: Inputs | None, graphs: GraphMap) -> list[tuple[str, nn.Module]]:
    """Trace a module.

    Returns:
        What is to be mapped apart: graphs that it calls, and the children of what cannot be traced.
    """
    tracer = _Tracer(module)
    try:
        tracer.follow(inputs)
    except _FAILURES as error:
        if tracer.fault is not None:
            raise tracer.fault from None
        graphs.failures[path] = in_short(error)
        return list(module.named_children())
    if tracer.fault is not None:
        raise tracer.fault
    apart = _record(module, tracer.graph, path, graphs)
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
    """Traces with timm's leaves; a module that fails becomes a leaf, with its reason.

    Args:
        root: The module to trace, of a twin.

    Attributes:
        failures: Reasons by module.
        fault: What went wrong in the tracer itself.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.leaves = (nn.Conv2d, WatchedConv, *timm.models.get_notrace_modules())
        self.failures: dict[str, str] = {}
        self.fault: Exception | None = None
        self.root, self.graph = root, fx.Graph(tracer_cls=type(self))
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self.tensor_attrs: dict[Any, str] = {}

    def follow(self, inputs: Inputs | None) -> None:
        """Trace the module into the graph."""
        with self._calls_followed():
            args, kwargs = self._placeholders(inputs)
            self.create_node("output", "output", (self.create_arg(self.root.forward(*args, **kwargs)),), {})

    def _placeholders(self, inputs: Inputs | None) -> tuple[list[Any], dict[str, Any]]:
        if inputs is not None and inputs.call is None:
            args = [self._placeholder(f"input_{number}", value) for number, value in enumerate(inputs.args)]
            return args, {name: self._placeholder(name, value) for name, value in inputs.kwargs.items()}
        required = [p for p in inspect.signature(self.root.forward).parameters.values() if p.default is p.empty]
        by_position = [p.name for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        by_name = [p.name for p in required if p.kind is p.KEYWORD_ONLY]
        return [*map(self._placeholder, by_position)], {name: self._placeholder(name) for name in by_name}

    def _placeholder(self, name: str, *value: Any) -> Any:
        if value and next(tensors_in(*value), None) is None:
            try:
                return copy.deepcopy(value[0])
            except Exception:  # whatever the value's own code raises
                pass
        return self.create_proxy("placeholder", name, (), {})

    @contextlib.contextmanager
    def _calls_followed(self) -> Iterator[None]:
        """Let the root's modules call the tracer, and give proxies for their parameters."""
        before = {module: (vars(module).get(COMPILED), module._parameters) for module in self.root.modules()}
        try:
            for module, (_, parameters) in before.items():
                vars(module)[COMPILED] = functools.partial(self._called, module)
                if parameters:
                    vars(module)["_parameters"] = _Proxied(parameters, functools.partial(self._parameter, module))
            yield
        finally:
            for module, (call, parameters) in before.items():
                vars(module).update({COMPILED: call, "_parameters": parameters})

    def _parameter(self, module: nn.Module, name: str) -> Any:
        return self.create_proxy("get_attr", _join(self.path_of_module(module), name), (), {})

    def _called(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.call_module(module, functools.partial(call_alone, module), args, kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        leaf = isinstance(module, self.leaves) or bool(graphs_of(module))
        return leaf or super().is_leaf_module(module, qualified_name)

    def call_module(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(module)
        before, depth = len(self.graph.nodes), len(self.module_stack)
        if name not in self.failures:
            try:
                return super().call_module(module, forward, args, kwargs)
            except _FAILURES as error:
                self._fail(name, before, depth, error)
        return self.create_proxy("call_module", name, args, kwargs)

    def _fail(self, name: str, before: int, depth: int, error: BaseException) -> None:
        try:
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self.failures = {
                other: reason for other, reason in self.failures.items() if not other.startswith(name + ".")
            }
            self.failures[name] = in_short(error)
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
        except Exception as fault:
            self.fault = fault
            raise


class _Proxy(fx.Proxy):
    """A proxy that can be rounded; torch.fx patches the functions of ``math`` instead, for everybody."""

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})


class _Proxied(dict[str, Any]):
    """A module's parameters, of which those that are asked for by name are proxies."""

    def __init__(self, parameters: Mapping[str, Any], proxy: Callable[[str], Any]) -> None:
        super().__init__(parameters)
        self._proxy, self._proxies = proxy, dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            return None
        if name not in self._proxies:
            self._proxies[name] = self._proxy(name)
        return self._proxies[name]


@contextlib.contextmanager
def _wrapped_functions(model: nn.Module) -> Iterator[None]:
    """Make functions that are not to be traced into nodes: those of ``fx.wrap``, and timm's.

    They stand in the namespaces of modules, where others call them as well; without a proxy among their arguments they
    are what they were.
    """
    functions = {id(function): function for function in timm.models.get_notrace_functions()}
    forwards = [inspect.unwrap(type(module).forward) for module in model.modules()]
    namespaces = {id(space): space for forward in forwards if (space := getattr(forward, "__globals__", None))}
    found = [
        (space, name)
        for space in namespaces.values()
        for name, value in list(space.items())
        if id(value) in functions and callable(value)
    ]
    found += [(space, name) for (_, name), space in list(_symbolic_trace._wrapped_fns_to_patch.items())]
    wrapped = [(space, name, space[name], _node_of(space[name])) for space, name in found if name in space]
    try:
        for space, name, _, wrapper in wrapped:
            space[name] = wrapper
        yield
    finally:
        for space, name, function, wrapper in reversed(wrapped):
            if space.get(name) is wrapper:
                space[name] = function


def _node_of(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        found: list[fx.Proxy] = []
        fx.node.map_aggregate(
            (args, kwargs), lambda value: found.append(value) if isinstance(value, fx.Proxy) else None
        )
        if not found:
            return function(*args, **kwargs)
        return found[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _holds_conv(module: nn.Module) -> bool:
    return any(isinstance(sub, nn.Conv2d | WatchedConv) for sub in module.modules())
