"""What the positions of a tensor are when a part of it is overwritten."""

from collections.abc import Sequence
from typing import Any

import torch

from coconv_surgery.tracing.axes import (
    BY_HAND,
    Added,
    Axis,
    Blank,
    Piece,
    joined,
    masked,
    overwritten,
    put,
    resized,
    together,
)
from coconv_surgery.tracing.grids import Dim, Grid, Seen, new, same, within


def written(
    seen: Seen, whole: Any, ranges: Sequence[tuple[int, int]], left: Sequence[int], source: Any, *, zeros: bool
) -> Grid:
    """What a tensor is when a part of it is overwritten.

    Args:
        seen: What is known.
        whole: The tensor, as it was.
        ranges: Which part, by dimension.
        left: Which of its dimensions the source has.
        source: What is written; None for a number.
        zeros: Whether that number is zero.
    """
    base, theirs = seen.grid(whole), seen.grid(source)
    around = Blank(0, base is None and seen.is_zero(whole))
    zeros = zeros or seen.is_zero(source)
    partial = [dim for dim, (start, end) in enumerate(ranges) if end - start < whole.shape[dim]]
    base = None if theirs and not partial else base  # nothing of it is left
    dims = []
    for dim, (start, end) in enumerate(ranges):
        own, put_in, size = base.dims[dim] if base else (), _dim_of(theirs, left, dim), whole.shape[dim]
        if dim not in partial:
            dims.append(same([own, put_in], size))
            continue
        axis = own[0] if len(own) == 1 else None
        piece: Piece = put_in[0] if len(put_in) == 1 and put_in[0].size == end - start else Blank(end - start, zeros)
        change = _in_a_row if len(partial) == 1 else _in_a_corner
        changed = change(axis, start, piece, around._replace(size=size))
        dims.append((changed,) if changed else new(size))
    return Grid(tuple(dims))


def _in_a_row(axis: Axis | None, start: int, piece: Piece, around: Blank) -> Axis | None:
    """Everything from some positions to others is written over."""
    if axis:
        return overwritten(axis, start, piece)
    pieces = around._replace(size=start), piece, around._replace(size=around.size - start - piece.size)
    return joined([part for part in pieces if part.size])


def _in_a_corner(axis: Axis | None, start: int, piece: Piece, around: Blank) -> Axis | None:
    """Something from some positions to others is written over, such as some of the channels."""
    if isinstance(piece, Blank):
        return axis
    moved = resized(piece, start, around.size - start - piece.size, None if around.zeros else BY_HAND)
    if axis is None or (axis.low, axis.high) == (moved.low, moved.high):
        return axis or moved
    both = together([axis, moved])
    if both:
        both.added = Added(BY_HAND, piece.size)
    return both


def _dim_of(grid: Grid | None, left: Sequence[int], dim: int) -> Dim:
    """Positions of what is written along a dimension of that which it is written into."""
    if grid is None:
        return ()
    if dim not in left:
        return grid.lost
    back = len(left) - left.index(dim)
    return grid.dims[-back] if back <= len(grid) else ()


def scattered(seen: Seen, x: Any, *arguments: Any, **_: Any) -> Grid | None:
    """Something is written to places that are not known."""
    base = seen.grid(x)
    source = next((value for value in reversed(arguments) if isinstance(value, torch.Tensor)), None)
    grid = seen.grid(source)
    if base is not None:
        return Grid(tuple(tuple(map(masked, dim)) for dim in base.dims))
    if grid is None or source is None or source.dim() > x.dim():
        return None
    dims: list[Dim] = [new(size) for size in x.shape[: x.dim() - source.dim()]]
    for dim, size in enumerate(x.shape[len(dims) :]):
        axis, smaller = grid.at(dim), source.shape[dim] < size
        dims.append((put(axis, size, zeros=seen.is_zero(x)),) if axis and smaller else grid.dims[dim])
    return Grid(tuple(dims))


def written_row(seen: Seen, x: Any, source: Any, dim: int, index: int) -> Grid:
    """One row or column is something else."""
    dim, ranges = dim % x.dim(), [(0, side) for side in x.shape]
    ranges[dim] = index % x.shape[dim], index % x.shape[dim] + 1
    return written(seen, x, ranges, [other for other in range(x.dim()) if other != dim], source, zeros=False)


def written_slice(
    seen: Seen, x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Grid | None:
    """Some rows or columns are something else."""
    size = x.shape[dim]
    ranges = [(0, side) for side in x.shape]
    ranges[dim] = within(start, size, 0), within(end, size, size)
    return written(seen, x, ranges, range(x.dim()), source, zeros=False) if step == 1 else None
