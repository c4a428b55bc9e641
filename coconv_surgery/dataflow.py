"""Who reads a convolution's output: found in autograd's record of a forward pass."""

import enum
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

Node = Any  # torch.autograd.graph.Node, whose concrete classes torch generates


class Reader(enum.Enum):
    """What becomes of a convolution's output channels."""

    LAYER = "a learned layer mixes its output"
    NOBODY = "prediction layer: no learned layer reads its output"
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
    order = _upstream_first([*ends, *depends_on_input, *outputs])
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
    return {output: _reader(output, consumers, learned) for output in outputs}


def _reader(output: Node, consumers: dict[Node, list[tuple[Node, int]]], learned: set[Node]) -> Reader:
    reader = Reader.NOBODY
    seen, stack = {output}, [output]
    while stack:
        for consumer, index in consumers[stack.pop()]:
            if index != _data_input(consumer, index):
                reader = Reader.POSITION
            elif consumer in learned:
                return Reader.LAYER
            elif consumer not in seen:
                seen.add(consumer)
                stack.append(consumer)
    return reader


def _data_input(node: Node, index: int) -> int:
    # Operations from outside torch (deformable convolution, CARAFE, RoI align, ...) read their first input as data.
    if isinstance(node, BackwardCFunction) or "DeformConv" in node.name():
        return 0
    return _DATA_INPUT.get(node.name(), index)


def _upstream_first(roots: list[Node]) -> list[Node]:
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
