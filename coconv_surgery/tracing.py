"""Which convolution of a network runs where, how often, on how large a map, and what reads its output."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from coconv_surgery.conv import Pair
from coconv_surgery.dataflow import Reader, find_readers
from coconv_surgery.graphs import GraphMap, function_convs, map_graphs, node_conv
from coconv_surgery.inputs import Inputs
from coconv_surgery.twin import Twin

# What a network is known to raise when its input does not suit it, or when it needs numbers and the twin has none.
_FORWARD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Call:
    """One call of a convolution.

    Attributes:
        input_size: Height and width of its input.
        output_size: Height and width of its output.
        reader: What reads the output.
        padded_by: The operation that pads the input with something other than zeros, if one does.
    """

    input_size: Pair
    output_size: Pair
    reader: Reader
    padded_by: str | None = None


@dataclass(frozen=True)
class TracedConv:
    """One convolution of a network, as seen by the trace.

    Attributes:
        name: Its qualified name.
        aliases: Other names of the same module.
        conv: The module; for a convolution that is a function call in a graph, a description of it on the meta device.
        calls: Its calls in one forward pass, in order.
        network_size: Height and width of the network's input, if it has an image for one.
        nodes: Names of the graph nodes that call it, as far as torch.fx can trace.
        untraced: Why torch.fx could not trace to it, if so: the module, and the reason.
        weight_reads: Graph nodes that read its weight without calling it.
    """

    name: str
    conv: nn.Conv2d
    aliases: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    network_size: Pair | None = None
    nodes: tuple[str, ...] = ()
    untraced: str | None = None
    weight_reads: tuple[str, ...] = ()


def trace_convs(model: nn.Module, inputs: Inputs) -> list[TracedConv]:
    """Trace every convolution of a network; the network is neither run nor changed.

    torch.fx says which graph nodes call a convolution. Map sizes and dataflow come from one forward pass in evaluation
    mode of a twin without data, or, for a network whose control flow needs numbers, of a real copy.

    Args:
        model: The network.
        inputs: What to call it with.

    Returns:
        One entry for each ``nn.Conv2d`` module and for each convolution called as a function in a graph module, in
        the order of ``model.named_modules()``.

    Raises:
        ValueError: If the network does not run on these inputs.
    """
    cuda = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(cuda):
        graphs, calls = _trace(model, inputs)
    return [
        TracedConv(
            name=name,
            conv=conv,
            aliases=aliases,
            calls=tuple(calls.get(name, ())),
            network_size=inputs.image_size,
            nodes=tuple(node for alias in (name, *aliases) for node in _nodes(graphs, alias)),
            untraced=None if _nodes(graphs, name) else graphs.why_unseen(name),
            weight_reads=tuple(graphs.weight_reads.get(name, ())),
        )
        for name, aliases, conv in find_convs(model)
    ]


def find_convs(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], nn.Conv2d]]:
    """All convolutions of a network: modules by their first name, then function calls of a graph.

    Yields:
        Name, other names of the same module, and the module (a description on the meta device for a function call).
    """
    names: dict[nn.Conv2d, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            names[module].append(name)
    for conv, (name, *aliases) in names.items():
        yield name, tuple(aliases), conv
    if isinstance(model, fx.GraphModule):
        for name, node in function_convs(model):
            yield name, (), node_conv(node, _weight(model, node))


def _trace(model: nn.Module, inputs: Inputs) -> tuple[GraphMap, dict[str, list[Call]]]:
    twin = Twin(model)
    graphs = map_graphs(twin.model, _constants(twin.model, inputs))
    try:
        return graphs, _observe(twin, inputs)
    except _FORWARD_ERRORS:
        pass
    try:
        return graphs, _observe(Twin(model, fake=False), inputs)
    except _FORWARD_ERRORS as error:
        size = " × ".join(map(str, inputs.image_size or ()))
        raise ValueError(
            f"{type(model).__name__} does not run on {f'a {size} input' if size else 'these inputs'} "
            f"({type(error).__name__}: {error}): give input_size= or example_inputs= that suit it"
        ) from error


def _nodes(graphs: GraphMap, name: str) -> list[str]:
    return graphs.calls.get(name, [])


def _constants(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of ``forward`` that are no tensors, and its defaults: tracing takes them as they are."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = dict(zip((p.name for p in named), inputs.args, strict=False)) | dict(inputs.kwargs or {})
    values = {p.name: given.get(p.name, p.default) for p in named if p.name in given or p.default is not p.empty}
    return {
        name: value
        for name, value in values.items()
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    }


# -- One forward pass of a twin ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    name: str
    input_size: Pair
    output_size: Pair
    node: Any
    padded_by: str | None


def _observe(twin: Twin, inputs: Inputs) -> dict[str, list[Call]]:
    model = twin.model
    outputs: list[_Output] = []
    activations: list[Any] = []

    def record(name: str, input: torch.Tensor, output: torch.Tensor) -> None:
        size, output_size = (input.shape[-2], input.shape[-1]), (output.shape[-2], output.shape[-1])
        outputs.append(_Output(name, size, output_size, output.grad_fn, _padding_operation(input)))

    def watch(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(module, nn.Conv2d):
                record(name, args[0] if args else kwargs["input"], output)
            activations.extend(_grad_nodes(output))

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [
        watch(name, module)
        for name, module in model.named_modules()
        if module._parameters and not isinstance(module, ParametrizationList)
    ]
    call = _FunctionConvs(model, record) if isinstance(model, fx.GraphModule) else None
    ends, entered = twin.run(inputs.args, dict(inputs.kwargs or {}), call)
    for handle in handles:
        handle.remove()
    activations += _grad_nodes(entered)
    readers = find_readers(
        [output.node for output in outputs if output.node is not None], _grad_nodes(ends), activations
    )
    calls = defaultdict(list)
    for output in outputs:
        reader = Reader.LAYER if output.node is None else readers[output.node]
        calls[output.name].append(Call(output.input_size, output.output_size, reader, output.padded_by))
    return calls


class _FunctionConvs(fx.Interpreter):
    """Runs a graph module and reports its convolutions that are function calls."""

    def __init__(self, model: fx.GraphModule, record: Any) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.names = {node: name for name, node in function_convs(model)}
        self.record = record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        positions = [node.target for node in self.graph.nodes if node.op == "placeholder"]
        return self.run(*args, *(kwargs[name] for name in positions[len(args) :] if name in kwargs))

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if n in self.names:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.record(self.names[n], args[0] if args else kwargs["input"], output)
        return output


def _weight(model: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
    assert isinstance(weight, fx.Node)
    if weight.op == "get_attr":
        owner, _, attribute = str(weight.target).rpartition(".")
        value: torch.Tensor = getattr(model.get_submodule(owner), attribute)
        return value
    described: torch.Tensor = weight.meta["val"]
    return described


def _padding_operation(input: torch.Tensor) -> str | None:
    operation = input.grad_fn.name() if input.grad_fn is not None else ""
    return next((mode for mode in ("Reflection", "Replication") if operation.startswith(f"{mode}Pad")), None)


def _grad_nodes(tree: Any) -> list[Any]:
    return [leaf.grad_fn for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None]
