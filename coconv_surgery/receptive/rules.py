"""Which positions of its inputs each operation reads: one rule a kind of operation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.receptive.spots import FIRST, SAME, Lookup, Relation, Taps, every


@dataclass(frozen=True)
class Map:
    """A tensor that the image reaches.

    Attributes:
        node: Number of the operation that made it.
        grid: Height and width.
        dims: The dimensions that these are: the same one twice for rows behind each other, None for a side of 1 that
            has none, where everything is the same all over the map.
        shape: Of the tensor.
    """

    node: int
    grid: Pair
    dims: tuple[int | None, int | None]
    shape: tuple[int, ...]

    def axes_of(self, dim: int) -> list[int]:
        """Which of height and width a dimension holds."""
        return [axis for axis, held in enumerate(self.dims) if held == dim % len(self.shape)]


class UnknownRuleError(Exception):
    """An operation that no rule is known for."""


Step = tuple[int, Relation, Relation]  # the node that is read, and where


@dataclass(frozen=True)
class Reading:
    """What an operation reads.

    Attributes:
        steps: Where.
        grid: Of its output.
        dims: Of its output.
        note: What it is called, if it mixes all positions along a side.
    """

    steps: Sequence[Step]
    grid: Pair
    dims: tuple[int | None, int | None]
    note: str | None = None


@dataclass(frozen=True)
class Operation:
    """An operation that ran.

    Attributes:
        name: Its name.
        arguments: By name, as its schema has them.
        maps: The maps among them, by ``id`` of the tensor.
        output: Shape of the output that is asked about.
        number: Which of several outputs that is.
        pointwise: Whether torch says that it computes each number from those in the same place.
    """

    name: str
    arguments: Mapping[str, Any]
    maps: Mapping[int, Map]
    output: tuple[int, ...]
    number: int
    pointwise: bool

    def map(self, *names: str) -> Map:
        """The one map that it reads, which is to be one of these arguments."""
        found = [self.maps[id(self.arguments[name])] for name in names if id(self.arguments.get(name)) in self.maps]
        if len(found) != 1 or len(self.maps) != 1:
            raise UnknownRuleError
        return found[0]


def read(operation: Operation) -> Reading:
    """What an operation reads.

    Raises:
        UnknownRuleError: If no rule knows it.
    """
    if operation.pointwise or operation.name in _POINTWISE:
        return _pointwise(operation)
    rule = _RULES.get(operation.name)
    if rule is None:
        raise UnknownRuleError
    return rule(operation)


def read_everything(maps: Sequence[Map], note: str | None) -> Reading:
    """Each output reads all of some maps."""
    return Reading([(m.node, every(m.grid[0]), every(m.grid[1])) for m in maps], (1, 1), (None, None), note)


def _pointwise(operation: Operation) -> Reading:
    rank = len(operation.output)
    maps = list(operation.maps.values())
    dims: list[int | None] = [None, None]
    for axis in (0, 1):
        # Broadcasting counts dimensions from the last.
        held = {m.dims[axis] + rank - len(m.shape) for m in maps if m.dims[axis] is not None}  # type: ignore[operator]
        if len(held) > 1:
            raise UnknownRuleError
        dims[axis] = held.pop() if held else None
    grids = {m.grid for m in maps}
    grid = max(height for height, _ in grids), max(width for _, width in grids)
    flat = dims[0] is not None and dims[0] == dims[1]
    if (
        any(dim is not None and dim < 0 for dim in dims)
        or any(side not in (1, full) for sides in grids for side, full in zip(sides, grid, strict=True))
        or (flat and not grids <= {grid, (1, 1)})
    ):
        raise UnknownRuleError
    steps = [(m.node, *(SAME if m.grid[axis] == grid[axis] else FIRST for axis in (0, 1))) for m in maps]
    return Reading(steps, grid, (dims[0], dims[1]))  # type: ignore[arg-type]


def _batch_norm(operation: Operation) -> Reading:
    if not operation.arguments.get("training"):
        return _pointwise(operation)
    source = operation.map("input")  # normalised by its own statistics
    steps = [(source.node, every(source.grid[0]), every(source.grid[1]))]
    return Reading(steps, source.grid, source.dims, "a norm of the whole map")


def _reshape(operation: Operation) -> Reading:
    """A side stays one where as many numbers lie behind it as before."""
    source = operation.map("self", "input")
    (height, width), behind = source.grid, _behind(source.shape)
    flat = source.dims[0] == source.dims[1] and source.dims[0] is not None
    after = [0 if dim is None else behind[dim] for dim in source.dims]
    if flat:
        after[0] *= width
    new = list(zip(operation.output, _behind(operation.output), strict=True))
    dims = [
        None if side == 1 else next((i for i, found in enumerate(new) if found == (side, count)), -1)
        for side, count in zip(source.grid, after, strict=True)
    ]
    if -1 in dims:
        if (height * width, after[1]) not in new or after[0] != after[1] * width:
            raise UnknownRuleError
        dims = [new.index((height * width, after[1]))] * 2
    return Reading([(source.node, SAME, SAME)], source.grid, (dims[0], dims[1]))


def _behind(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _permute(operation: Operation) -> Reading:
    source, arguments = operation.map("self"), operation.arguments
    order = list(range(len(source.shape)))
    if operation.name == "permute":
        order = [dim % len(order) for dim in arguments["dims"]]
    else:
        first, second = arguments.get("dim0", 0), arguments.get("dim1", -1)
        order[first], order[second] = order[second], order[first]
    dims = tuple(None if dim is None else order.index(dim) for dim in source.dims)
    return Reading([(source.node, SAME, SAME)], source.grid, dims)  # type: ignore[arg-type]


def _take(operation: Operation) -> Reading:
    """A part of a map: slices and pieces."""
    source, arguments = operation.map("self"), operation.arguments
    dim = arguments.get("dim", 0) % len(source.shape)
    first, step = _start(operation, source.shape[dim])
    single = operation.name in ("select", "unbind")
    relations: list[Relation] = [SAME, SAME]
    grid, dims = list(source.grid), list(source.dims)
    axes = source.axes_of(dim)
    if len(axes) == 2:
        raise UnknownRuleError
    for axis in axes:
        relations[axis] = _picked(first, step, 1 if single else operation.output[dim], source.shape[dim])
        grid[axis] = 1 if single else operation.output[dim]
        dims[axis] = None if single else dims[axis]
    if single:
        dims = [held - 1 if held is not None and held > dim else held for held in dims]
    return Reading([(source.node, relations[0], relations[1])], (grid[0], grid[1]), (dims[0], dims[1]))


def _picked(first: int, step: int, count: int, side: int) -> Lookup:
    # Beyond what was cut off there is no more of the map, unless it ends there itself.
    low = -math.inf if first == 0 else 0
    high = math.inf if first + step * count >= side else count
    return Lookup(lambda y: [first + step * y] if low <= y < high else [])


def _start(operation: Operation, side: int) -> tuple[int, int]:
    arguments, number = operation.arguments, operation.number
    if operation.name == "slice":
        start = min(arguments.get("start") or 0, side)
        return start + side if start < 0 else start, arguments.get("step", 1)
    if operation.name == "select":
        return arguments["index"] % side, 1
    if operation.name == "unbind":
        return number, 1
    size = arguments.get("split_size", arguments.get("split_sizes"))
    return (number * size if isinstance(size, int) else sum(size[:number])), 1


def _join(operation: Operation) -> Reading:
    parts = operation.arguments["tensors"]
    stacked = operation.name == "stack"
    dim = operation.arguments.get("dim", 0) % len(operation.output)
    maps = [operation.maps[id(part)] for part in parts if id(part) in operation.maps]
    like = maps[0]
    axes = [] if stacked else like.axes_of(dim)
    sides = [[side for axis, side in enumerate(m.grid) if axis not in axes] for m in maps]
    if len(axes) == 2 or any(m.dims != like.dims for m in maps) or sides.count(sides[0]) != len(sides):
        raise UnknownRuleError
    steps, grid, start = [], list(like.grid), 0
    for part in parts:
        if (source := operation.maps.get(id(part))) is not None:
            relations: list[Relation] = [SAME, SAME]
            for axis in axes:
                relations[axis] = _piece(start, part.shape[dim], operation.output[dim])
            steps.append((source.node, relations[0], relations[1]))
        start += part.shape[dim]
    for axis in axes:
        grid[axis] = operation.output[dim]
    dims = [held + 1 if stacked and held is not None and held >= dim else held for held in like.dims]
    return Reading(steps, (grid[0], grid[1]), (dims[0], dims[1]))


def _piece(start: int, side: int, whole: int) -> Lookup:
    # What lies before the first piece and behind the last one is padding of theirs.
    low = -math.inf if start == 0 else start
    high = math.inf if start + side == whole else start + side
    return Lookup(lambda y: [y - start] if low <= y < high else [])


def _pad(operation: Operation) -> Reading:
    source, pads = operation.map("self"), list(operation.arguments.get("pad") or operation.arguments["padding"])
    relations: list[Relation] = [SAME, SAME]
    grid = list(source.grid)
    for place, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        for axis in source.axes_of(-1 - place):
            relations[axis] = _margin(operation.name, before, after, source.grid[axis])
            grid[axis] += before + after
    if source.dims[0] is not None and source.dims[0] == source.dims[1] and tuple(grid) != source.grid:
        raise UnknownRuleError
    return Reading([(source.node, relations[0], relations[1])], (grid[0], grid[1]), source.dims)


def _margin(name: str, before: int, after: int, side: int) -> Relation:
    if name == "constant_pad_nd":
        return Taps(1, [-before])
    mode: Any = "reflect" if name.startswith("reflection") else "edge"
    places = np.pad(np.arange(side), (before, after), mode).tolist()
    return Lookup(lambda y: [places[y] if 0 <= y < len(places) else y - before])


def _windows(operation: Operation) -> Reading:
    """Convolutions and pools."""
    arguments = operation.arguments
    source = operation.map("input", "self")
    if source.dims == (None, None):
        return Reading([(source.node, SAME, SAME)], source.grid, source.dims)
    kernel = arguments["weight"].shape[2:] if "weight" in arguments else arguments["kernel_size"]
    rank = len(operation.output)
    if source.dims != (rank - 2, rank - 1) or ("weight" in arguments and len(kernel) != 2):
        raise UnknownRuleError
    given = [kernel, *(arguments.get(name) for name in ("stride", "padding", "dilation"))]
    given = [given[0], given[1] or kernel, given[2] or [0], given[3] or [1]]
    relation = _transposed if arguments.get("transposed") else _window
    relations = [relation(*numbers) for numbers in zip(*(_both(values) for values in given), strict=True)]
    grid = operation.output[-2], operation.output[-1]
    return Reading([(source.node, relations[0], relations[1])], grid, source.dims)


def _window(kernel: int, stride: int, padding: int, dilation: int) -> Relation:
    return Taps(stride, [dilation * tap - padding for tap in range(kernel)])


def _transposed(kernel: int, stride: int, padding: int, dilation: int) -> Relation:
    def sources(y: int) -> list[int]:
        spread = [y + padding - dilation * tap for tap in range(kernel)]
        return [place // stride for place in spread if place % stride == 0]

    return Lookup(sources)


def _both(values: Any) -> tuple[int, int]:
    each = [values] if isinstance(values, int) else list(values)
    return each[0], each[-1]


def _resample(operation: Operation) -> Reading:
    """Maps that are brought to another size, by pools or by interpolation."""
    source = operation.map("self", "input")
    rank = len(operation.output)
    if source.dims == (None, None):
        return Reading([(source.node, SAME, SAME)], source.grid, source.dims)
    if source.dims != (rank - 2, rank - 1):
        raise UnknownRuleError
    grid = operation.output[-2], operation.output[-1]
    if "adaptive" in operation.name:
        relations = [_adaptive(*sides) for sides in zip(source.grid, grid, strict=True)]
        note = operation.name if any(new == 1 < old for old, new in zip(source.grid, grid, strict=True)) else None
        return Reading([(source.node, relations[0], relations[1])], grid, source.dims, note)
    aligned = bool(operation.arguments.get("align_corners"))
    relations = [_interpolated(operation.name, *sides, aligned) for sides in zip(source.grid, grid, strict=True)]
    return Reading([(source.node, relations[0], relations[1])], grid, source.dims)


def _adaptive(old: int, new: int) -> Relation:
    return Lookup(lambda y: range(y * old // new, -(-(y + 1) * old // new)))


def _interpolated(name: str, old: int, new: int, aligned: bool) -> Relation:
    # Rational numbers: what lies on a pixel reads no neighbour.
    scale = Fraction(old - 1, max(new - 1, 1)) if aligned else Fraction(old, new)
    shift = Fraction(0) if aligned else (scale - 1) / 2
    if "nearest" in name:
        shift = scale / 2 if "exact" in name else Fraction(0)
        return Lookup(lambda y: [math.floor(y * scale + shift)])
    reach = 2 if "bicubic" in name else 1

    def sources(y: int) -> list[int]:
        place = y * scale + shift
        low = math.floor(place)
        return [low] if place == low else list(range(low - reach + 1, low + reach + 1))

    return Lookup(sources)


def _shuffle(operation: Operation) -> Reading:
    source, rank = operation.map("self"), len(operation.output)
    if source.dims != (rank - 2, rank - 1):
        raise UnknownRuleError
    factor = operation.arguments.get("upscale_factor") or operation.arguments["downscale_factor"]
    up = operation.name == "pixel_shuffle"
    relation: Relation = Lookup(lambda y: [y // factor]) if up else Taps(factor, range(factor))
    grid = operation.output[-2], operation.output[-1]
    return Reading([(source.node, relation, relation)], grid, source.dims)


def _mix(operation: Operation) -> Reading:
    """What mixes all of some dimensions, and may take them away."""
    source, arguments = operation.map("self", "input"), operation.arguments
    rank = len(source.shape)
    if operation.name == "native_layer_norm":
        mixed = list(range(rank - len(arguments["normalized_shape"]), rank))
    elif operation.name == "native_group_norm":
        mixed = list(range(1, rank))
    else:
        given = arguments.get("dim")
        each = [given] if isinstance(given, int) else list(given or range(rank))
        mixed = [dim % rank for dim in each]
    axes = [axis for axis, held in enumerate(source.dims) if held in mixed]
    relations = [every(source.grid[axis]) if axis in axes else SAME for axis in (0, 1)]
    note = operation.name if any(source.grid[axis] > 1 for axis in axes) else None
    steps = [(source.node, relations[0], relations[1])]
    if len(operation.output) == rank and operation.output == source.shape:
        return Reading(steps, source.grid, source.dims, note)
    kept = operation.arguments.get("keepdim", False)
    grid = tuple(1 if axis in axes else side for axis, side in enumerate(source.grid))
    dims = tuple(
        (held if kept else None if axis in axes else held - sum(dim < held for dim in mixed))
        if held is not None
        else None
        for axis, held in enumerate(source.dims)
    )
    return Reading(steps, grid, dims, note)  # type: ignore[arg-type]


def _product(operation: Operation) -> Reading:
    """Products of matrices: by weights, position by position; of maps, all positions mixed."""
    maps = list(operation.maps.values())
    left = operation.maps.get(id(operation.arguments.get("mat1", operation.arguments.get("self"))))
    if len(maps) == 1 and left is maps[0] and not left.axes_of(-1):
        return Reading([(left.node, SAME, SAME)], left.grid, left.dims)
    everywhere = any(max(m.grid) > 1 for m in maps)
    return replace(read_everything(maps, "attention"), note="a product of maps" if everywhere else None)


_POINTWISE = {
    *("hardswish", "leaky_relu", "elu", "prelu", "_prelu_kernel", "clone", "detach", "alias", "_to_copy", "copy"),
    *("expand", "lift_fresh", "native_dropout", "contiguous", "rrelu_with_noise", "softplus", "log_sigmoid_forward"),
    *("fill", "zero", "hardtanh", "relu6", "celu", "selu"),
}
_RULES: dict[str, Callable[[Operation], Reading]] = {
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"), _batch_norm),
    **dict.fromkeys(("cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("slice", "select", "unbind", "split", "split_with_sizes"), _take),
    **dict.fromkeys(("cat", "stack"), _join),
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
    **dict.fromkeys(("convolution", "max_pool2d_with_indices", "max_pool2d", "avg_pool2d"), _windows),
    **dict.fromkeys(("_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d"), _resample),
    **dict.fromkeys(("_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d"), _resample),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _shuffle),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "std", "logsumexp"), _mix),
    **dict.fromkeys(("linalg_vector_norm", "_softmax", "_log_softmax", "cumsum"), _mix),
    **dict.fromkeys(("native_layer_norm", "native_group_norm"), _mix),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
}


def bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def name_of(func: Any) -> str:
    """The name of an operation, the same in place or not."""
    name: str = func._schema.name.partition("::")[2]
    return name[:-1] if func._schema.is_mutable and name.endswith("_") else name


def is_pointwise(func: Any) -> bool:
    """Whether torch says that an operation computes each number from those in the same place."""
    return torch.Tag.pointwise in func.tags
