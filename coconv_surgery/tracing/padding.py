"""How the operations around a convolution pad its input and crop its output."""

from collections.abc import Iterator, Mapping
from typing import Any

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.tracing.dataflow import Dataflow, Node

# Added before and after the map, along the height and along the width, in pixels of the input.
Margins = tuple[Pair, Pair]

# Whatever writes into a map piece by piece may wrap it around.
_MODES = {"ReflectionPad": "reflection", "ReplicationPad": "replication", "CopySlices": "piecewise"}
# What may stand between a convolution and what pads its input or crops its output: every pixel by itself.
_POINTWISE = (
    *("Relu", "LeakyRelu", "Prelu", "Elu", "Gelu", "Silu", "Mish", "Hardswish", "Hardtanh", "Softplus", "Sigmoid"),
    *("Tanh", "Mul", "Div", "Add", "Sub", "Neg", "Abs", "Pow", "Exp", "Clamp", "NativeBatchNorm", "CudnnBatchNorm"),
    *("Clone", "Alias", "ToCopy"),
)


def padding_mode(dataflow: Dataflow, source: Node | None, known: Mapping[Node, str]) -> str | None:
    """The way in which a convolution's input is padded before, if not with zeros.

    Args:
        dataflow: The forward pass.
        source: The node that makes the input.
        known: Ways of padding that were seen, by node.
    """
    for node in _before(dataflow, source):
        modes = (mode for operation, mode in _MODES.items() if operation in node.name())
        if mode := known.get(node) or next(modes, None):
            return mode
    return None


def margins(dataflow: Dataflow, source: Node | None, output: Node | None, stride: Pair) -> Margins:
    """What the operations around a convolution add to its input, or take away.

    Args:
        dataflow: The forward pass.
        source: The node that makes the convolution's input.
        output: The convolution's own node.
        stride: Its stride.
    """
    sides = [[0, 0], [0, 0]]
    for node in _before(dataflow, source):
        for axis, added in _change(node).items():
            sides[axis] = [side + more for side, more in zip(sides[axis], added, strict=True)]
    while output is not None and len(dataflow.consumers[output]) == 1:
        output, _ = dataflow.consumers[output][0]
        if not _is_around(output):
            break
        for axis, added in _change(output).items():
            # What is added there is padding for the next layer.
            sides[axis] = [side + stride[axis] * min(0, more) for side, more in zip(sides[axis], added, strict=True)]
    (top, bottom), (left, right) = sides
    return (top, bottom), (left, right)


def _before(dataflow: Dataflow, source: Node | None) -> Iterator[Node]:
    """The operations through which a convolution's input comes, as far as they pad, crop, or work pixel by pixel."""
    while source is not None and (_is_around(source) or "CopySlices" in source.name()):
        yield source
        sources = [node for _, node in dataflow.sources(source) if node in dataflow.activations]
        source = sources[0] if len(sources) == 1 else None


def _is_around(node: Any) -> bool:
    name = node.name()
    return bool(_change(node)) or name.startswith(("SliceBackward", *_POINTWISE))


def _change(node: Any) -> dict[int, Pair]:
    """What an operation that pads or crops adds by axis."""
    name = node.name()
    if "Pad" in name and "Backward" in name:
        pad = [_signed(side) for side in getattr(node, "_saved_pad", getattr(node, "_saved_padding", ()))]
        # From the last axis on, before and after.
        return {1 - axis: (pad[2 * axis], pad[2 * axis + 1]) for axis in range(min(2, len(pad) // 2))}
    if name.startswith("SliceBackward"):
        sizes = [int(size) for size in node._saved_self_sym_sizes]
        axis = _signed(node._saved_dim) % len(sizes) - (len(sizes) - 2)
        if axis < 0 or int(node._saved_step) != 1:
            return {}
        start, end = (_within(position, sizes[axis - 2]) for position in (node._saved_start, node._saved_end))
        return {axis: (-start, end - sizes[axis - 2])}
    return _joined(node) if name.startswith("CatBackward") else {}


def _joined(node: Any) -> dict[int, Pair]:
    """What a map is joined with that comes from nowhere, such as zeros."""
    inputs = node.next_functions
    maps = [index for index, (source, _) in enumerate(inputs) if source is not None]
    # torch 2.4 does not tell how large they are.
    if len(maps) != 1 or len(inputs) < 2 or not hasattr(node, "_input_metadata"):
        return {}
    (index,) = maps
    source, number = inputs[index]
    shape, own = node._input_metadata[0].shape, source._input_metadata[number].shape
    axis = _signed(node._saved_dim) % len(shape) - (len(shape) - 2)
    added = int(shape[axis - 2]) - int(own[axis - 2])
    if axis < 0 or 0 < index < len(inputs) - 1:
        return {}
    return {axis: (0, added) if index == 0 else (added, 0)}


def _signed(number: Any) -> int:
    return int(number) - (1 << 64) if int(number) >= 1 << 63 else int(number)


def _within(position: Any, size: int) -> int:
    index = _signed(position)
    return max(0, min(index + size if index < 0 else index, size))
