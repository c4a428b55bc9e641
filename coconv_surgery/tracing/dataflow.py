"""What reads what: autograd's record of a forward pass, and what autograd leaves out."""

import math
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
    as behind many box branches, mixes nothing). It mixes channels unless it takes each number by itself, or each
    channel, as depthwise convolutions do.

    Args:
        ends: Nodes of the network's outputs.
        activations: Nodes known to carry activations rather than parameters: the network's inputs and the layers'
            outputs.
        others: Nodes to know about as well, whether or not they lead to an end.
        inside: For outputs of operations that hide what they do, such as checkpoints, by node and number: the node
            inside that they come from.
        positions: For nodes that read or write at computed positions: the nodes that compute them.
        frozen: The numbers of parameters that are not trained, by the ``id`` of those of the pass.

    Attributes:
        ends: Nodes of the network's outputs.
        activations: All nodes that depend on an activation.
        consumers: What reads a node's output, and as which of its inputs, or as its :data:`POSITIONS`.
        learned: Nodes that combine activations with parameters.
        patches: Nodes that hold overlapping patches of a map, or what was taken from it at computed positions, and how
            many numbers of a patch are left that have not been summed up, as far as that is known.
    """

    def __init__(
        self,
        ends: Iterable[Node],
        activations: Iterable[Node],
        others: Iterable[Node] = (),
        inside: Mapping[tuple[Node, int], Node] | None = None,
        positions: Mapping[Node, Iterable[Node]] | None = None,
        frozen: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self._inside, self._positions, self._frozen = inside or {}, positions or {}, frozen or {}
        self.ends, self._known = set(ends), set(activations)
        self.activations: set[Node] = set()
        self.consumers: dict[Node, list[tuple[Node, int]]] = defaultdict(list)
        self.learned: set[Node] = set()
        self._by_channel: set[Node] = set()
        self.patches: dict[Node, float] = {}
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
        """Whether a node is a layer that combines several channels of an activation by parameters."""
        return self._is_layer(node) and node not in self._by_channel

    def _is_layer(self, node: Node) -> bool:
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
                    if self._takes_channels_alone(node):
                        self._by_channel.add(node)
            elif isinstance(variable := getattr(node, "variable", None), torch.Tensor):
                parameter_size[node] = variable.numel()
            else:
                parameter_size[node] = size

    def _takes_channels_alone(self, node: Node) -> bool:
        """Whether a convolution makes each channel of one: depthwise, or by frozen kernels that are zero for others."""
        if not node.name().startswith("ConvolutionBackward"):
            return False
        weight = getattr(dict(self.sources(node)).get(1), "variable", None)
        if (groups := node._saved_groups) > 1:
            if weight is None:
                return bool(groups == _channels_of_input(node))
            return bool(weight.shape[0] == groups if node._saved_transposed else weight.shape[1] == 1)
        numbers = self._frozen.get(id(weight))
        if numbers is None or numbers.is_meta:
            return False
        read = numbers.detach().flatten(2).ne(0).any(2).sum(0 if node._saved_transposed else 1)
        return bool((read == 1).all())

    def _find_patches(self, order: Iterable[Node]) -> None:
        for node in order:
            before = max((self.patches.get(source, 0) for _, source in self.sources(node)), default=0)
            if taken := self._taken(node):
                self.patches[node] = taken * max(before, 1)
            elif before and not (self._is_layer(node) or node.name().startswith("Col2Im")):
                summed_up = is_reduction(node) or is_matrix_product(node)
                left = before / max(self._summed_up(node), 1) if summed_up else before
                if left > 1 or not summed_up:
                    self.patches[node] = left

    def _taken(self, node: Node) -> int:
        """How many numbers a node takes for each position: 1 if that is not known, 0 if it takes no patches."""
        if _PATCHES.match(node.name()) and _overlapping(node):
            return _size_of_patch(node)
        return self._shifts(node) or int(node in self._positions)

    def _summed_up(self, node: Node) -> float:
        """Of how many numbers a reduction or a matrix product of patches makes one: 1 if that is not known."""
        index, source = max(self.sources(node), key=lambda each: self.patches.get(each[1], 0))
        whole, rest = _shape_of(source), _shape_of(node)
        if whole is None or rest is None:
            return 1
        if is_reduction(node):
            return math.prod(whole) / max(math.prod(rest), 1)
        return whole[-1 if index == _first_factor(node) else -2]

    def _shifts(self, node: Node) -> int:
        """Of how many shifted copies of a map a node is one; 0 if it is none, or one of a few."""
        _, source = next(iter(self.sources(node)), (0, None))
        crops = node.name().startswith("Slice") and source is not None and _PADDED.match(source.name())
        if not crops and not node.name().startswith("Roll") and not _PADDED.match(node.name()):
            return 0
        alike = [consumer for consumer, _ in self.consumers[source] if consumer.name() == node.name()]
        return len(alike) if len(alike) >= _SHIFTS else 0


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


def _first_factor(product: Node) -> int:
    """Which input of a matrix product is the first matrix."""
    return 1 if product.name().startswith(("Addmm", "Baddbmm")) else 0


def _size_of_patch(node: Node) -> int:
    """How many numbers a patch has along the axes that a node takes it along; 1 if that is not known."""
    if hasattr(node, "_saved_kernel_size"):
        return math.prod(node._saved_kernel_size)
    return int(node._saved_size) if hasattr(node, "_saved_step") else 1


def _shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of what a node has computed, where autograd has kept it."""
    kept = getattr(node, "_input_metadata", ())
    return tuple(kept[0].shape) if kept else None


def _channels_of_input(convolution: Node) -> int | None:
    """How many channels a convolution reads, where autograd has kept the shape of its input."""
    source, output = convolution.next_functions[0]
    kept = getattr(source, "_input_metadata", ())[output:]
    return kept[0].shape[1] if kept and len(kept[0].shape) > 1 else None


def channels_of(node: Node) -> int | None:
    """How many channels a node's map has, where autograd has kept its shape."""
    shape = _shape_of(node)
    return shape[-3] if shape is not None and len(shape) > 2 else None


def _overlapping(node: Node) -> bool:
    if hasattr(node, "_saved_kernel_size"):
        return any(size > step for size, step in zip(node._saved_kernel_size, node._saved_stride, strict=True))
    return not hasattr(node, "_saved_step") or bool(node._saved_size > node._saved_step)
