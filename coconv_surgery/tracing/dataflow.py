"""What reads what: autograd's record of a forward pass, and what autograd leaves out."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from coconv_surgery.tracing.unrecorded import Unrecorded

Node = Any  # torch.autograd.graph.Node, whose concrete classes torch generates, or an Unrecorded

# Every number by itself: parameters may scale, shift or bend a channel, but mix none.
_ELEMENTWISE = re.compile(
    r"(Add|Sub|Rsub|Mul|Div|Addcmul|Addcdiv|Lerp|Pow|Atan2|Maximum|Minimum|Where|Prelu|PreluKernel|Cat|Stack)Backward\d"
    r"|torch::autograd::Copy"
)
_REDUCTIONS = re.compile(
    r"(Sum|Mean|Logsumexp|Amax|Amin|Max|Min|Prod|Var|VarMean|Std|StdMean|AdaptiveAvgPool2D)Backward\d"
)
_MATRIX_PRODUCTS = re.compile(r"(Mm|Bmm|Addmm|Baddbmm)Backward\d")
_PATCHES = re.compile(r"(Im2Col|Unfold|AsStrided)Backward\d")
_PADDED = re.compile(r"(ConstantPad|ReflectionPad|ReplicationPad)")
# A map of which so many shifted copies are taken is taken apart into patches.
_SHIFTS = 4
# The number by which whoever reads positions reads them.
POSITIONS = -1


class Dataflow:
    """A forward pass as a graph of nodes.

    A layer is learned if it combines an activation with parameters of more than one number (a single learned factor,
    as behind many box branches, mixes nothing).

    Args:
        ends: Nodes of the network's outputs.
        activations: Nodes known to carry activations rather than parameters: the network's inputs and the layers'
            outputs.
        others: Nodes to know about as well, whether or not they lead to an end.
        inside: For outputs of operations that hide what they do, such as checkpoints, by node and number: the node
            inside that they come from.
        positions: For nodes that read or write at computed positions: the nodes that compute them.

    Attributes:
        ends: Nodes of the network's outputs.
        activations: All nodes that depend on an activation.
        consumers: What reads a node's output, and as which of its inputs, or as its :data:`POSITIONS`.
        learned: Nodes that combine activations with parameters.
        patches: Nodes that hold overlapping patches of a map, or what was taken from it at computed positions.
    """

    def __init__(
        self,
        ends: Iterable[Node],
        activations: Iterable[Node],
        others: Iterable[Node] = (),
        inside: Mapping[tuple[Node, int], Node] | None = None,
        positions: Mapping[Node, Iterable[Node]] | None = None,
    ) -> None:
        self._inside, self._positions = inside or {}, positions or {}
        self.ends, self._known = set(ends), set(activations)
        self.activations: set[Node] = set()
        self.consumers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        self.learned: set[Node] = set()
        self.patches: set[Node] = set()
        order = self._upstream([*self.ends, *self._known, *others])
        self._find_consumers(order)
        self._find_learned(order)
        self._find_patches(order)

    def sources(self, node: Node) -> list[tuple[int, Node]]:
        """Where an operation's inputs come from, by their number."""
        return [
            (index, self._inside.get((source, output), source))
            for index, (source, output) in enumerate(node.next_functions)
            if source is not None
        ]

    def mixes(self, node: Node) -> bool:
        """Whether a node is a layer that combines parameters with more than one number of an activation."""
        return node in self.learned and not is_elementwise(node)

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
                stack.extend((source, False) for source in self._positions.get(node, ()))
        return order

    def _find_consumers(self, order: Iterable[Node]) -> None:
        for node in order:
            for index, source in self.sources(node):
                self.consumers[source].append((node, index))
            for source in self._positions.get(node, ()):
                self.consumers[source].append((node, POSITIONS))

    def _find_learned(self, order: Iterable[Node]) -> None:
        self.activations = depends_on_input = set(self._known)
        parameter_size: dict[Node, int] = {}
        for node in order:
            sources = [source for _, source in self.sources(node)]
            size = max((parameter_size.get(source, 0) for source in sources), default=0)
            if node in depends_on_input or any(source in depends_on_input for source in sources):
                depends_on_input.add(node)
                if size > 1:
                    self.learned.add(node)
            elif isinstance(variable := getattr(node, "variable", None), torch.Tensor):
                parameter_size[node] = variable.numel()
            else:
                parameter_size[node] = size

    def _find_patches(self, order: Iterable[Node]) -> None:
        for node in order:
            name = node.name()
            begins = node in self._positions or (_PATCHES.match(name) and _overlapping(node)) or self._is_shift(node)
            goes_on = any(source in self.patches for _, source in self.sources(node))
            ends = self.mixes(node) or name.startswith("Col2Im") or is_reduction(node) or is_matrix_product(node)
            if begins or (goes_on and not ends):
                self.patches.add(node)

    def _is_shift(self, node: Node) -> bool:
        """Whether a node is one of several shifted copies of a map."""
        _, source = next(iter(self.sources(node)), (0, None))
        crops = node.name().startswith("Slice") and source is not None and _PADDED.match(source.name())
        if not crops and not node.name().startswith("Roll"):
            return False
        alike = [consumer for consumer, _ in self.consumers[source] if consumer.name() == node.name()]
        return len(alike) >= _SHIFTS


def is_elementwise(node: Node) -> bool:
    """Whether a node takes every number by itself."""
    return isinstance(node, Unrecorded) or bool(_ELEMENTWISE.match(node.name()))


def is_reduction(node: Node) -> bool:
    """Whether a node makes one number of many along an axis."""
    return bool(_REDUCTIONS.match(node.name()))


def is_total(node: Node) -> bool:
    """Whether a reduction makes one number of a whole tensor."""
    return node.name() in ("SumBackward0", "MeanBackward0", "ProdBackward0")


def is_matrix_product(node: Node) -> bool:
    """Whether a node multiplies matrices."""
    return bool(_MATRIX_PRODUCTS.match(node.name()))


def _overlapping(node: Node) -> bool:
    if hasattr(node, "_saved_kernel_size"):
        return any(size > step for size, step in zip(node._saved_kernel_size, node._saved_stride, strict=True))
    return not hasattr(node, "_saved_step") or bool(node._saved_size > node._saved_step)
