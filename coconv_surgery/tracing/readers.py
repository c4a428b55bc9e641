"""Who reads a convolution's output, and as what."""

import enum
from collections.abc import Set
from dataclasses import dataclass, field

from torch.autograd.function import BackwardCFunction

from coconv_surgery.tracing.dataflow import (
    POSITIONS,
    Dataflow,
    Node,
    channels_of,
    is_matrix_product,
    is_reduction,
    is_total,
)


class Reader(enum.Enum):
    """What becomes of a convolution's output channels."""

    LAYER = "a learned layer mixes its output"
    NOBODY = "prediction layer: no learned layer makes features of its output"
    SIDE_OUTPUT = "a learned layer reads its output, and it leaves the network as it is"
    POSITION = "its output is read by position, as the offsets, mask or kernel of another operation"
    LEVELS = "it is one of several dilations of an input that are concatenated"
    UNKNOWN = "the network hides what reads its output"


class _State(enum.Enum):
    """What has become of an output on its way."""

    RAW = "nothing but squashing, shifting and reordering"
    SCALED = "the same, with a learned number for each channel"
    NORMALISED = "divided by a statistic of itself"
    BENT = "activated, with signs and sizes that can still be told"
    FEATURES = "activated, normalised, mixed with another map, or made one number"


_AFTER_A_NORM = (_State.NORMALISED, _State.BENT, _State.FEATURES)
_ACTIVATED = (_State.BENT, _State.FEATURES)
# The input that these operations read as data; what enters elsewhere steers them, channel by channel.
_DATA_INPUT = {"ConvolutionBackward0": 0, "GridSampler2DBackward0": 0, "GridSampler3DBackward0": 0}
# What comes out of these is features. Squashing functions, as behind predictions, are none of them.
_LEAKY = ("leakyrelu", "rrelu")
_FIELD = 2  # channels of a field of vectors
_FEATURES = ("elu", "silu", "mish", "glu", "hardswish", "norm", "maxpool")


@dataclass
class _Readers:
    """What reads an output.

    Attributes:
        layers: Learned layers.
        by_position: Whether something reads it by position.
        directly: Whether something does before it has become features.
        at_an_end: Whether it comes out.
        as_it_is: Whether it comes out, or leaves otherwise, before it has become features.
    """

    layers: list[Node] = field(default_factory=list)
    by_position: bool = False
    directly: bool = False
    at_an_end: bool = False
    as_it_is: bool = False


def reader_of(dataflow: Dataflow, output: Node | None, returned: Set[Node], left: Set[Node]) -> Reader:
    """What reads an output.

    Args:
        dataflow: The forward pass.
        output: Its node.
        returned: Nodes of what the network returns and has channels.
        left: Nodes of what leaves it otherwise: what it keeps, or hands to others than torch. Statistics that it keeps
            are none of its outputs.
    """
    if output is None:
        return Reader.UNKNOWN
    found = _Search(dataflow, output).readers(returned, left)
    # A prediction that also steers something, through layers that make offsets of it, is a prediction still.
    if found.layers and not (found.at_an_end and all(_steers(dataflow, layer) for layer in found.layers)):
        if found.directly:
            return Reader.POSITION
        if found.as_it_is:
            return Reader.SIDE_OUTPUT
        return Reader.LEVELS if _is_a_level(dataflow, output) else Reader.LAYER
    return Reader.POSITION if found.by_position else Reader.NOBODY


class _Search:
    """What becomes of one output, up to the learned layers that read it."""

    def __init__(self, dataflow: Dataflow, output: Node) -> None:
        self._dataflow, self._output = dataflow, output
        self._is_field = channels_of(output) == _FIELD
        self._reached = self._follow(output)
        pools = {node for node in self._reached if is_reduction(node) and not is_total(node)}
        self._pooled = self._follow(*pools) - self._follow(output, past_reductions=False)

    def readers(self, returned: Set[Node], left: Set[Node]) -> _Readers:
        """Follow the output."""
        found = _Readers()
        seen, stack = {(self._output, _State.RAW)}, [(self._output, _State.RAW)]
        while stack:
            node, state = stack.pop()
            raw = state not in _ACTIVATED
            found.at_an_end |= node in self._dataflow.ends
            found.as_it_is |= raw and (node in returned or (node in left and node not in self._pooled))
            for consumer, index in self._dataflow.consumers[node]:
                if index == POSITIONS:
                    found.directly |= raw
                elif _is_position(consumer, index):
                    found.by_position = True
                    found.directly |= raw or (state is _State.BENT and not _is_convolution(consumer))
                elif raw and self._is_kernel(node, consumer, index):
                    found.by_position = found.directly = True
                elif self._is_layer(consumer, state):
                    found.layers.append(consumer)
                    found.directly |= raw and self._is_field and _resamples(self._dataflow, consumer)
                elif (following := (consumer, self._after(consumer, state))) not in seen:
                    seen.add(following)
                    stack.append(following)
        return found

    def _follow(self, *roots: Node, past_reductions: bool = True) -> set[Node]:
        """Some nodes, and all that read them as data before a layer does."""
        seen, stack = set(roots), list(roots)
        while stack:
            for consumer, index in self._dataflow.consumers[stack.pop()]:
                ends = self._dataflow.mixes(consumer) or _is_position(consumer, index)
                if not (consumer in seen or ends or (is_reduction(consumer) and not past_reductions)):
                    seen.add(consumer)
                    stack.append(consumer)
        return seen

    def _is_layer(self, node: Node, state: _State) -> bool:
        """Whether a node mixes channels, is the affine part of a norm, or adds a scaled branch to another map."""
        if self._dataflow.mixes(node) or (node in self._dataflow.learned and state in _AFTER_A_NORM):
            return True
        return state is _State.SCALED and (is_reduction(node) or self._is_residual(node))

    def _is_residual(self, node: Node) -> bool:
        others = (source for _, source in self._dataflow.sources(node) if source not in self._reached)
        return node.name().startswith("AddBackward") and any(other in self._dataflow.activations for other in others)

    def _after(self, node: Node, state: _State) -> _State:
        """What an output has become, once a node has read it."""
        name = node.name().lower()
        by_itself = sum(source in self._reached for _, source in self._dataflow.sources(node)) > 1
        activated = any(kind in name for kind in _FEATURES) or (by_itself and name.startswith("mul"))
        activated |= name.startswith("hardtanh") and node._saved_min_val >= 0  # as ReLU6; others squash
        if name.startswith(_LEAKY) and state is not _State.FEATURES:
            return _State.BENT
        if activated or is_total(node) or _is_from_elsewhere(node) or self._attends(node):
            return _State.FEATURES
        if by_itself and name.startswith("div") and state not in _ACTIVATED:
            return _State.NORMALISED
        return _State.SCALED if node in self._dataflow.learned and state is not _State.BENT else state

    def _attends(self, product: Node) -> bool:
        """Whether a product mixes a map's channels with the help of another."""
        activations = [source for _, source in self._dataflow.sources(product) if source in self._dataflow.activations]
        patches = product.name().startswith("Mul") and any(source in self._dataflow.patches for source in activations)
        return len(activations) > 1 and (patches or is_matrix_product(product))

    def _is_kernel(self, node: Node, product: Node, index: int) -> bool:
        """Whether a product applies a map as a kernel: to patches of another, or as a matrix that was pooled."""
        if not self._attends(product):
            return False
        others = [source for other, source in self._dataflow.sources(product) if other != index]
        patches = node not in self._dataflow.patches and any(other in self._dataflow.patches for other in others)
        pooled = node in self._pooled and is_matrix_product(product) and _is_matrix(product, index)
        # A query is multiplied with keys, for weights of attention.
        return (patches or pooled) and not any("Softmax" in after.name() for after in self._follow(product))


def _is_a_level(dataflow: Dataflow, output: Node) -> bool:
    """Whether an output is concatenated, as it is, with those of convolutions of the same input and other dilations."""
    (consumer, _), *others = dataflow.consumers[output] or [(None, 0)]
    if others or consumer is None or not consumer.name().startswith("Cat"):
        return False
    levels = [_alone(dataflow, source) for _, source in dataflow.sources(consumer)]
    if not all(map(_is_convolution, levels)):
        return False
    dilations, inputs = {tuple(level._saved_dilation) for level in levels}, {_input_of(level) for level in levels}
    return 1 < len(dilations) == len(levels) and len(inputs) == 1


def _is_convolution(node: Node) -> bool:
    return bool(node.name().startswith("ConvolutionBackward"))


def _alone(dataflow: Dataflow, node: Node) -> Node:
    """What a concatenation of a single map holds, as in a graph's convolution of one level."""
    sources = dataflow.sources(node)
    return sources[0][1] if node.name().startswith("Cat") and len(sources) == 1 else node


def _input_of(convolution: Node) -> Node:
    """What a convolution reads, or what that is a piece of."""
    source, _ = convolution.next_functions[0]
    is_piece = source is not None and source.name().startswith("Split")
    return source.next_functions[0][0] if is_piece else source


def _is_matrix(product: Node, index: int) -> bool:
    """Whether a factor of a matrix product has several rows and columns."""
    names = ("self", "mat2") if product.name().startswith(("Mm", "Bmm")) else ("", "mat1", "mat2")
    factor = getattr(product, f"_saved_{names[index]}", None)
    return factor is not None and min(factor.shape[-2:]) > 1


def _steers(dataflow: Dataflow, layer: Node) -> bool:
    """Whether all that becomes of a layer's output is read by position in the end."""
    by_position = False
    seen, stack = {layer}, [layer]
    while stack:
        node = stack.pop()
        if node in dataflow.ends or not dataflow.consumers[node]:
            return False
        for consumer, index in dataflow.consumers[node]:
            if _is_position(consumer, index):
                by_position = True
            elif consumer not in seen:
                seen.add(consumer)
                stack.append(consumer)
    return by_position


def _resamples(dataflow: Dataflow, layer: Node) -> bool:
    """Whether what a layer makes says, as it is, where another map is sampled: the layer makes a field larger."""
    seen, stack = {layer}, [layer]
    while stack:
        for consumer, index in dataflow.consumers[stack.pop()]:
            name = consumer.name()
            if name.startswith("GridSampler") and index != _DATA_INPUT.get(name):
                return True
            if consumer not in seen and not dataflow.mixes(consumer):
                seen.add(consumer)
                stack.append(consumer)
    return False


def _is_position(node: Node, index: int) -> bool:
    """Whether a node's input steers it."""
    data = 0 if _is_from_elsewhere(node) else _DATA_INPUT.get(node.name(), index)
    return index == POSITIONS or index != data


def _is_from_elsewhere(node: Node) -> bool:
    """Whether an operation is not torch's own; those (deformable convolution, RoI align, ...) read data first."""
    return isinstance(node, BackwardCFunction) or "CppNode<" in node.name()
