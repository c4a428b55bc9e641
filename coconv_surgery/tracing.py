"""Which convolution of a network runs where, how often, on how large a map, and what reads its output."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
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
            It may be another kind of convolution, such as a deformable or transposed one, which has some of the
            attributes of an ``nn.Conv2d``.
        calls: Its calls in one forward pass, in order, and those of other modules that hold the same weight.
        network_size: Height and width of the network's input, if it has an image for one.
        nodes: Names of the graph nodes that call it, as far as torch.fx can trace.
        untraced: Why torch.fx could not trace to it, if so: the module, and the reason.
        weight_read: Whether its weight takes part in the forward pass outside its own forward.
    """

    name: str
    conv: nn.Conv2d
    aliases: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    network_size: Pair | None = None
    nodes: tuple[str, ...] = ()
    untraced: str | None = None
    weight_read: bool = False


@dataclass(frozen=True)
class Trace:
    """What a trace found.

    Attributes:
        convs: One entry for each module that is a 2D convolution of some kind, and for each convolution called as a
            function in a graph module, in the order of ``model.named_modules()``.
        how: How torch.fx went through the network, and where map sizes come from, for a reader.
    """

    convs: tuple[TracedConv, ...]
    how: str


def trace_network(model: nn.Module, inputs: Inputs) -> Trace:
    """Trace every convolution of a network; the network is neither run nor changed.

    torch.fx says which graph nodes call a convolution. Map sizes and dataflow come from one forward pass in evaluation
    mode of a twin without data, or, for a network whose control flow needs numbers, of a real copy.

    Args:
        model: The network.
        inputs: What to call it with.

    Raises:
        ValueError: If the network does not run on these inputs.
    """
    cuda = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(cuda):
        graphs, observed = _trace(model, inputs)
    convs = list(find_convs(model))
    tied: dict[int, list[str]] = defaultdict(list)
    for name, _, conv in convs:
        tied[_weight_id(conv)].append(name)
    traced = tuple(
        TracedConv(
            name=name,
            conv=conv,
            aliases=aliases,
            calls=tuple(call for other in tied[_weight_id(conv)] for call in observed.calls.get(other, ())),
            network_size=inputs.image_size,
            nodes=tuple(node for alias in (name, *aliases) for node in _nodes(graphs, alias)),
            untraced=None if _nodes(graphs, name) else graphs.why_unseen(name),
            weight_read=name in observed.weight_reads,
        )
        for name, aliases, conv in convs
    )
    apart = len(graphs.failures)
    whole = "torch.fx, whole" if not apart else f"torch.fx, around {apart} module{'s' if apart > 1 else ''}"
    return Trace(traced, f"{whole}; sizes from {'shapes alone' if observed.fake else 'a real forward pass'}")


def find_convs(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], nn.Conv2d]]:
    """All convolutions of a network: modules by their first name, then function calls of a graph.

    Yields:
        Name, other names of the same module, and the module (a description on the meta device for a function call).
    """
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_conv(module):
            names[module].append(name)
    for conv, (name, *aliases) in names.items():
        yield name, tuple(aliases), cast(nn.Conv2d, conv)
    if isinstance(model, fx.GraphModule):
        for name, node in function_convs(model):
            yield name, (), node_conv(node, _weight(model, node))


def _is_conv(module: nn.Module) -> bool:
    """Whether a module is a 2D convolution: torch's, or another kind that describes itself in the same words."""
    if isinstance(module, nn.Conv2d):
        return True
    kernel = getattr(module, "kernel_size", None)
    named = all(hasattr(module, name) for name in ("in_channels", "out_channels", "weight"))
    return named and isinstance(kernel, tuple | list) and len(kernel) == 2


def _weight_id(conv: nn.Conv2d) -> int:
    weight = conv._parameters.get("weight")
    return id(conv if weight is None else weight)


def _trace(model: nn.Module, inputs: Inputs) -> tuple[GraphMap, "_Observed"]:
    twin = Twin(model)
    graphs = map_graphs(twin.model, _constants(twin.model, inputs))
    if not inputs.needs_numbers:
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
    given = dict(zip((p.name for p in named), inputs.args, strict=False)) | dict(inputs.kwargs)
    values = {p.name: given.get(p.name, p.default) for p in named if p.name in given or p.default is not p.empty}
    return {
        name: value
        for name, value in values.items()
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
    }


# -- One forward pass of a twin ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Observed:
    calls: dict[str, list[Call]]
    weight_reads: set[str]
    fake: bool


@dataclass(frozen=True)
class _Output:
    name: str
    input_size: Pair
    output_size: Pair
    node: Any
    padded_by: str | None


def _observe(twin: Twin, inputs: Inputs) -> _Observed:
    model = twin.model
    call: Callable[..., Any] = partial(inputs.call, model) if inputs.call else model
    with _Observer(model) as observer:
        if isinstance(model, fx.GraphModule) and not inputs.call:
            call = _FunctionConvs(model, observer.record)
        ends, entered = twin.run(inputs.args, dict(inputs.kwargs), call)
    activations = [*observer.activations, *_grad_nodes(entered)]
    nodes = [output.node for output in observer.outputs if output.node is not None]
    readers = find_readers(nodes, _grad_nodes(ends), activations)
    calls = defaultdict(list)
    for output in observer.outputs:
        reader = Reader.LAYER if output.node is None else readers[output.node]
        calls[output.name].append(Call(output.input_size, output.output_size, reader, output.padded_by))
    return _Observed(calls, observer.weight_reads, twin.fake)


class _Observer(TorchFunctionMode):
    """Watches a forward pass: calls of convolutions, activations, and weights used outside their convolution."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.outputs: list[_Output] = []
        self.activations: list[Any] = []
        self.weight_reads: set[str] = set()
        self._owners: dict[int, list[str]] = defaultdict(list)
        self._running = 0
        self._handles: list[Any] = []
        # A function written in Python is part of the graph as long as its output is.
        self._alive: list[torch.Tensor] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                self._owners[_weight_id(module)].append(name)
                self._handles.append(module.register_forward_pre_hook(self._enter_conv))
            if module._parameters and not isinstance(module, ParametrizationList):
                self._watch(name, module)

    def record(self, name: str, input: torch.Tensor, output: torch.Tensor) -> None:
        """Take note of a convolution's call."""
        size, output_size = (input.shape[-2], input.shape[-1]), (output.shape[-2], output.shape[-1])
        self.outputs.append(_Output(name, size, output_size, output.grad_fn, _padding_operation(input)))

    def _watch(self, name: str, module: nn.Module) -> None:
        is_conv = _is_conv(module)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(module, nn.Conv2d):
                self._running -= 1
            if is_conv and isinstance(output, torch.Tensor):
                self.record(name, args[0] if args else next(iter(kwargs.values())), output)
            self._activate(output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _activate(self, output: Any) -> None:
        for tensor in _tensors_with_history(output):
            self.activations.append(tensor.grad_fn)
            if isinstance(tensor.grad_fn, BackwardCFunction):
                self._alive.append(tensor)

    def _enter_conv(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._running += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._running and isinstance(result, torch.Tensor) and result.grad_fn is not None:
            for argument in (*args, *(kwargs or {}).values()):
                self.weight_reads.update(self._owners.get(id(argument), ()))
        return result

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]


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
    return [tensor.grad_fn for tensor in _tensors_with_history(tree)]


def _tensors_with_history(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None)
