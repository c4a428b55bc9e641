"""Who reads a convolution's output: found in autograd's record of a forward pass."""

import enum
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

Node = Any  # torch.autograd.graph.Node, whose concrete classes torch generates


class Reader(enum.Enum):
    """What becomes of a convolution's output channels."""

    LAYER = "a learned layer mixes its output"
    NOBODY = "prediction layer: no learned layer makes features of its output"
    POSITION = "its output is read by position, as the offsets, mask or kernel of another operation"


# The input that these operations read as data; what enters elsewhere steers them, channel by channel.
_DATA_INPUT = {"ConvolutionBackward0": 0, "GridSampler2DBackward0": 0}


def find_readers(outputs: Iterable[Node], ends: Iterable[Node], activations: Iterable[Node]) -> dict[Node, Reader]:
    """Find out what reads each of some outputs.

    A layer is learned if it combines an activation with parameters of more than one number (a single learned factor,
    as behind many box branches, mixes nothing).

    Args:
        outputs: The autograd nodes of the outputs in question.
        ends: Nodes of the network's outputs.
        activations: Nodes known to carry activations rather than parameters: the network's inputs and the layers'
            outputs.
    """
    depends_on_input: set[Node] = set(activations)
    order = upstream_first([*ends, *depends_on_input, *outputs])
    parameter_size: dict[Node, int] = {}
    consumers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
    learned: set[Node] = set()
    for node in order:
        sources = [(index, source) for index, (source, _) in enumerate(node.next_functions) if source is not None]
        for index, source in sources:
            consumers[source].append((node, index))
        size = max((parameter_size.get(source, 0) for _, source in sources), default=0)
        if node in depends_on_input or any(source in depends_on_input for _, source in sources):
            depends_on_input.add(node)
            if size > 1:
                learned.add(node)
        elif isinstance(variable := getattr(node, "variable", None), torch.Tensor):
            parameter_size[node] = variable.numel()
        else:
            parameter_size[node] = size
    network = _Network(consumers, learned, set(ends))
    return {output: network.reader(output) for output in outputs}


@dataclass(frozen=True)
class _Network:
    consumers: Mapping[Node, list[tuple[Node, int]]]
    learned: set[Node]
    ends: set[Node]

    def reader(self, output: Node) -> Reader:
        layers, by_position, at_an_end = self._readers(output)
        # A prediction that also steers something, through layers that make offsets of it, is a prediction still.
        if layers and not (at_an_end and all(self._steers(layer) for layer in layers)):
            return Reader.LAYER
        return Reader.POSITION if by_position else Reader.NOBODY

    def _steers(self, layer: Node) -> bool:
        """Whether all that becomes of a layer's output is read by position in the end."""
        by_position = False
        seen, stack = {layer}, [layer]
        while stack:
            node = stack.pop()
            if node in self.ends or not self.consumers[node]:
                return False
            for consumer, index in self.consumers[node]:
                if index != _data_input(consumer, index):
                    by_position = True
                elif consumer not in seen:
                    seen.add(consumer)
                    stack.append(consumer)
        return by_position

    def _readers(self, output: Node) -> tuple[list[Node], bool, bool]:
        """The learned layers that read an output; whether an operation reads it by position; whether it comes out."""
        layers, by_position, at_an_end = [], False, False
        seen, stack = {output}, [output]
        while stack:
            node = stack.pop()
            at_an_end |= node in self.ends
            for consumer, index in self.consumers[node]:
                if index != _data_input(consumer, index):
                    by_position = True
                elif consumer in self.learned:
                    layers.append(consumer)
                elif consumer not in seen:
                    seen.add(consumer)
                    stack.append(consumer)
        return layers, by_position, at_an_end


def _data_input(node: Node, index: int) -> int:
    # Operations from outside torch (deformable convolution, CARAFE, RoI align, ...) read their first input as data.
    if isinstance(node, BackwardCFunction) or "DeformConv" in node.name():
        return 0
    return _DATA_INPUT.get(node.name(), index)


def upstream_first(roots: list[Node]) -> list[Node]:
    """All nodes that some nodes depend on, each after those that it depends on itself."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source, _ in node.next_functions if source is not None)
    return order
