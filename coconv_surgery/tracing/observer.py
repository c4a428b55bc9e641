"""One forward pass, watched: which convolution is called on how large a map, and what becomes of its output."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from coconv_surgery.layers.functional import Pair
from coconv_surgery.tracing.dataflow import Reader, find_readers, upstream_first
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.twin import Twin


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
class Observation:
    """What a forward pass showed.

    Attributes:
        calls: The calls of each convolution by name, in order.
        weight_reads: Convolutions whose weight took part in what came of the pass, outside their own forward.
        fake: Whether tensors had shapes but no data.
    """

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


def observe(twin: Twin, watched: Mapping[nn.Module, str], inputs: Inputs) -> Observation:
    """Run a twin, and see what its convolutions do.

    Args:
        twin: A copy of a network.
        watched: Names of its convolutions.
        inputs: What to call it with.
    """
    with _Observer(twin.model, watched) as observer:
        ends, entered = twin.run(inputs.args, dict(inputs.kwargs), inputs.call)
    activations = [*observer.activations, *_grad_nodes(entered)]
    nodes = [output.node for output in observer.outputs if output.node is not None]
    readers = find_readers(nodes, _grad_nodes(ends), activations)
    calls = defaultdict(list)
    for output in observer.outputs:
        reader = Reader.LAYER if output.node is None else readers[output.node]
        calls[output.name].append(Call(output.input_size, output.output_size, reader, output.padded_by))
    # What leaves a convolution's output as it is comes with the convolution's own node.
    reads = [(node, name) for node, name in observer.reads if node not in readers]
    used = set(upstream_first([*_grad_nodes(ends), *activations])) if reads else set()
    return Observation(calls, {name for node, name in reads if node in used}, twin.fake)


class _Observer(TorchFunctionMode):
    """Watches a forward pass: calls of convolutions, activations, and weights used outside their convolution.

    Its hooks stay in the twin, which nobody else runs.
    """

    def __init__(self, model: nn.Module, watched: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.outputs: list[_Output] = []
        self.activations: list[Any] = []
        # Where a weight enters an operation that is not its convolution's own.
        self.reads: list[tuple[Any, str]] = []
        self._names: dict[int, list[str]] = defaultdict(list)
        self._running = 0
        # A function written in Python is part of the graph as long as its output is.
        self._alive: list[torch.Tensor] = []
        for module in model.modules():
            if module in watched:
                self._watch_conv(watched[module], module)
                for weight in _weights(module):
                    self._names[id(weight)].append(watched[module])
            elif module._parameters and not isinstance(module, ParametrizationList):
                module.register_forward_hook(lambda module, args, output: self._activate(output))

    def record(self, name: str, input: Any, output: Any) -> None:
        """Take note of a convolution's call; other kinds may take and return something else than maps."""
        if all(isinstance(value, torch.Tensor) and value.dim() >= 3 for value in (input, output)):
            size, output_size = (input.shape[-2], input.shape[-1]), (output.shape[-2], output.shape[-1])
            self.outputs.append(_Output(name, size, output_size, output.grad_fn, _padding_operation(input)))

    def _watch_conv(self, name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._running += 1

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._running -= 1
            self.record(name, next(iter((*args, *kwargs.values())), None), output)
            self._activate(output)

        module.register_forward_pre_hook(enter)
        # A model may catch what its convolution raises.
        module.register_forward_hook(leave, with_kwargs=True, always_call=True)

    def _activate(self, output: Any) -> None:
        for tensor in _tensors_with_history(output):
            self.activations.append(tensor.grad_fn)
            if isinstance(tensor.grad_fn, BackwardCFunction):
                self._alive.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._running and isinstance(result, torch.Tensor) and result.grad_fn is not None:
            for source, _ in result.grad_fn.next_functions:
                for name in self._names.get(id(getattr(source, "variable", None)), ()):
                    self.reads.append((result.grad_fn, name))
        return result


def _weights(conv: nn.Module) -> list[torch.Tensor]:
    """The parameters that a convolution's weight is made of."""
    parametrization = getattr(conv, "parametrizations", {})
    held = [conv._parameters.get("weight")]
    if "weight" in parametrization:
        held += parametrization["weight"].parameters(recurse=False)
    return [weight for weight in held if weight is not None]


# Circular padding is written piece by piece.
_PADDINGS = {"ReflectionPad": "reflection", "ReplicationPad": "replication", "CopySlices": "circular"}


def _padding_operation(input: torch.Tensor) -> str | None:
    operation = input.grad_fn.name() if input.grad_fn is not None else ""
    return next((mode for name, mode in _PADDINGS.items() if name in operation), None)


def _grad_nodes(tree: Any) -> list[Any]:
    return [tensor.grad_fn for tensor in _tensors_with_history(tree)]


def _tensors_with_history(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None)
