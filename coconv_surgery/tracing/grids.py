"""The positions along each dimension of a tensor."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coconv_surgery.tracing.axes import Axis, masked, resized, together

# The positions along one dimension: none where it is one that means nothing, several where it is flattened.
Dim = tuple[Axis, ...]


@dataclass(frozen=True)
class Grid:
    """The positions of a tensor.

    Attributes:
        dims: Along each dimension.
        lost: Along the dimension that a selection has taken away.
    """

    dims: tuple[Dim, ...]
    lost: Dim = ()

    def __len__(self) -> int:
        return len(self.dims)

    def at(self, dim: int) -> Axis | None:
        """The positions along a dimension, if it is not flattened."""
        factors = self.dims[dim]
        return factors[0] if len(factors) == 1 else None

    def axes(self) -> set[Axis]:
        """All positions."""
        return {axis for factors in (*self.dims, self.lost) for axis in factors}

    def but(self, changed: Mapping[int, Dim]) -> "Grid":
        """The same with other positions along some dimensions, counted from the first."""
        return replace(self, dims=tuple(changed.get(index, dim) for index, dim in enumerate(self.dims)))


@dataclass(frozen=True)
class Seen:
    """What a rule may ask for.

    Attributes:
        grid: The positions of a tensor, if it depends on an input of the network.
        is_zero: Whether a tensor is known to hold zeros.
        shape: Of the result.
    """

    grid: Callable[[Any], Grid | None]
    is_zero: Callable[[Any], bool]
    shape: tuple[int, ...]


def fresh(shape: Iterable[int]) -> Grid:
    """Positions that come from no others."""
    return Grid(tuple(new(size) for size in shape))


def new(size: int) -> Dim:
    """Positions along a dimension that come from no others."""
    return (Axis(size),) if size > 1 else ()


def pointwise(shape: Sequence[int], grids: Iterable[Grid], masks: Iterable[Sequence[int]] = ()) -> Grid:
    """Every position is computed from the same positions of several tensors, as far as these have as many.

    Args:
        shape: Of the result.
        grids: What is known of the tensors.
        masks: Shapes of others, which may hide some positions.
    """
    # With fewer dimensions than an input something has been summed up.
    grids = [grid for grid in grids if len(grid) <= len(shape)]
    dims = []
    for back, size in enumerate(reversed(shape), 1):
        dim = same([grid.dims[-back] for grid in grids if len(grid) >= back], size)
        hide = any(len(mask) >= back and mask[-back] == size for mask in masks)
        dims.append(tuple(map(masked, dim)) if hide else dim)
    return Grid(tuple(reversed(dims)), next((grid.lost for grid in grids), ()))


def same(dims: Sequence[Dim], size: int) -> Dim:
    """Positions that are computed from the same in several dimensions, as far as these have as many."""
    dims = [dim for dim in dims if dim and math.prod(axis.size for axis in dim) == size]
    if not dims or len(set(map(len, dims))) > 1:
        return new(size)
    factors = [together(axes) for axes in zip(*dims, strict=True)]
    return tuple(axis for axis in factors if axis) if all(factors) else new(size)


def resized_dim(dim: Dim, before: int, after: int, mode: str | None = None) -> Dim:
    """Positions added or cut off; where several are flattened, those of the outermost, as far as whole ones are."""
    inner = math.prod(axis.size for axis in dim[1:])
    if not dim or before % inner or after % inner:
        return new(math.prod(axis.size for axis in dim) + before + after) if before or after else dim
    return (resized(dim[0], before // inner, after // inner, mode), *dim[1:])


def within(position: int | None, size: int, default: int) -> int:
    """A position that may be counted from the end, or lie outside."""
    position = default if position is None else position
    return max(0, min(position + size if position < 0 else position, size))
