"""Who reads a convolution's output: found in autograd's record of a forward pass."""

import enum
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

Node = Any  # torch.autograd.graph.Node, whose concrete classes torch generates


class Reader(enum.Enum):
    """What becomes of a convolution's output channels."""

    LAYER = "a learned layer mixes its output"
    NOBODY = "prediction layer: no learned layer makes features of its output"
    SIDE_OUTPUT = "a learned layer reads its output, and the network returns it as it is"
    POSITION = "its output is read by position, as the offsets, mask or kernel of another operation"
    UNKNOWN = "the network hides what reads its output"


# The input that these operations read as data; what enters elsewhere steers them, channel by channel.
_DATA_INPUT = {"ConvolutionBackward0": 0, "GridSampler2DBackward0": 0}
# What comes out of these is features. Squashing functions, as behind predictions, are none of them.
_FEATURES = ("Relu", "Elu", "Gelu", "Silu", "Mish", "Hardswish", "Hardtanh", "Softplus", "Norm", "MaxPool")


class Dataflow:
    """Autograd's record of a forward pass.

    A layer is learned if it combines an activation with parameters of more than one number (a single learned factor,
    as behind many box branches, mixes nothing).

    Args:
        ends: Nodes of the network's outputs.
        activations: Nodes known to carry activations rather than parameters: the network's inputs and the layers'
            outputs.
        others: Nodes to know about as well, whether or not they lead to an end.
        inside: For outputs of operations that hide what they do, such as checkpoints, by node and number: the node
            inside that they come from.
        maps: Those of the ends whose channels have a meaning, unlike that of a lone number. Default: all.

    Attributes:
        activations: All nodes that depend on an activation.
        consumers: What reads a node's output, and as which of its inputs.
    """

    def __init__(
        self,
        ends: Iterable[Node],
        activations: Iterable[Node],
        others: Iterable[Node] = (),
        inside: Mapping[tuple[Node, int], Node] | None = None,
        maps: Iterable[Node] | None = None,
    ) -> None:
        self._inside = inside or {}
        self._ends, self._activations = set(ends), set(activations)
        self._maps = self._ends if maps is None else set(maps)
        self.activations: set[Node] = set()
        self.consumers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        self._learned: set[Node] = set()
        self._find_learned(self._upstream([*self._ends, *self._activations, *others]))

    def reader(self, output: Node | None) -> Reader:
        """What reads an output, given by its node."""
        if output is None:
            return Reader.UNKNOWN
        layers, by_position, at_an_end, raw = self._readers(output)
        # A prediction that also steers something, through layers that make offsets of it, is a prediction still.
        if layers and not (at_an_end and all(self._steers(layer) for layer in layers)):
            return Reader.SIDE_OUTPUT if raw else Reader.LAYER
        return Reader.POSITION if by_position else Reader.NOBODY

    def of_use(self) -> set[Node]:
        """All nodes that something depends on that the network or a layer of it gives."""
        return set(self._upstream([*self._ends, *self._activations]))

    def sources(self, node: Node) -> Iterator[tuple[int, Node]]:
        """Where an operation's inputs come from, by their number."""
        for index, (source, output) in enumerate(node.next_functions):
            if source is not None:
                yield index, self._inside.get((source, output), source)

    def _upstream(self, roots: Iterable[Node]) -> list[Node]:
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
                stack.extend((source, False) for _, source in self.sources(node))
        return order

    def _find_learned(self, order: Iterable[Node]) -> None:
        self.activations = depends_on_input = set(self._activations)
        parameter_size: dict[Node, int] = {}
        for node in order:
            sources = list(self.sources(node))
            for index, source in sources:
                self.consumers[source].append((node, index))
            size = max((parameter_size.get(source, 0) for _, source in sources), default=0)
            if node in depends_on_input or any(source in depends_on_input for _, source in sources):
                depends_on_input.add(node)
                if size > 1:
                    self._learned.add(node)
            elif isinstance(variable := getattr(node, "variable", None), torch.Tensor):
                parameter_size[node] = variable.numel()
            else:
                parameter_size[node] = size

    def _readers(self, output: Node) -> tuple[list[Node], bool, bool, bool]:
        """The learned layers that read an output; whether it is read by position, comes out, and comes out as it is."""
        layers, by_position, at_an_end, raw = [], False, False, False
        seen, stack = {(output, True)}, [(output, True)]
        while stack:
            node, as_it_is = stack.pop()
            at_an_end |= node in self._ends
            raw |= as_it_is and node in self._maps
            for consumer, index in self.consumers[node]:
                if index != _data_input(consumer, index):
                    by_position = True
                elif consumer in self._learned:
                    layers.append(consumer)
                else:
                    following = (consumer, as_it_is and not any(name in consumer.name() for name in _FEATURES))
                    if following not in seen:
                        seen.add(following)
                        stack.append(following)
        return layers, by_position, at_an_end, raw

    def _steers(self, layer: Node) -> bool:
        """Whether all that becomes of a layer's output is read by position in the end."""
        by_position = False
        seen, stack = {layer}, [layer]
        while stack:
            node = stack.pop()
            if node in self._ends or not self.consumers[node]:
                return False
            for consumer, index in self.consumers[node]:
                if index != _data_input(consumer, index):
                    by_position = True
                elif consumer not in seen:
                    seen.add(consumer)
                    stack.append(consumer)
        return by_position


def _data_input(node: Node, index: int) -> int:
    # Operations from outside torch (deformable convolution, CARAFE, RoI align, ...) read their first input as data.
    if isinstance(node, BackwardCFunction) or "DeformConv" in node.name():
        return 0
    return _DATA_INPUT.get(node.name(), index)
