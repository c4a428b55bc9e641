"""What operations make of the positions of tensors, each by its rule."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coconv_surgery.tracing.axes import Axis, Blank, Piece, joined, repeated, resized, rolled, spread, taken, window
from coconv_surgery.tracing.grids import Dim, Grid, Seen, fresh, new, pointwise, resized_dim, within
from coconv_surgery.tracing.writing import scattered, written_row, written_slice

Rule = Callable[..., Grid | list[Grid | None] | None]


def _view(seen: Seen, x: Any, *_: Any) -> Grid | None:
    """Dimensions are regrouped; those that are cut otherwise are new."""
    grid = seen.grid(x)
    if grid is None:
        return None
    factors = [axis for dim, size in zip(grid.dims, x.shape, strict=True) for axis in dim or new(size)]
    # A view as another type has another number of elements.
    if 0 in seen.shape or math.prod(axis.size for axis in factors) != math.prod(seen.shape):
        return None
    dims: list[Dim] = []
    while len(dims) < len(seen.shape):
        sizes, group = [seen.shape[len(dims)]], []
        if sizes[0] == 1 and factors and factors[0].size == 1:
            group.append(factors.pop(0))
        while (taken_up := math.prod(axis.size for axis in group)) != (wanted := math.prod(sizes)):
            if taken_up < wanted:
                group.append(factors.pop(0))
            else:
                sizes.append(seen.shape[len(dims) + len(sizes)])
        kept = tuple(axis for axis in group if axis.size > 1 or len(group) == 1)
        dims += [kept] if len(sizes) == 1 else map(new, sizes)
    return Grid(tuple(dims))


def _expand(seen: Seen, x: Any, *_: Any, **__: Any) -> Grid | None:
    grid = seen.grid(x)
    if grid is None:
        return None
    dims = [()] * (len(seen.shape) - len(grid)) + list(grid.dims)
    sized = zip(dims, seen.shape, strict=True)
    return Grid(tuple((spread(dim[0], size),) if len(dim) == 1 else dim for dim, size in sized))


def reordered(name: str, x: Any, *arguments: Any) -> list[int]:
    """In which order an operation leaves the dimensions of a tensor."""
    order = list(range(x.dim()))
    if name == "permute":
        return [order[dim] for dim in arguments[0]]
    if name in ("transpose", "t") and order:
        first, second = arguments or (0, -1)
        order[first], order[second] = order[second], order[first]
    return order


def _reorder(name: str) -> "Rule":
    def rule(seen: Seen, x: Any, *arguments: Any) -> Grid | None:
        grid = seen.grid(x)
        return grid and replace(grid, dims=tuple(grid.dims[index] for index in reordered(name, x, *arguments)))

    return rule


def _squeeze(seen: Seen, x: Any, dim: Any = None) -> Grid | None:
    grid = seen.grid(x)
    if grid is None:
        return None
    given = range(x.dim()) if dim is None else dim if isinstance(dim, list | tuple) else [dim]
    gone = {index % x.dim() for index in given if x.shape[index] == 1}
    lost = next((grid.dims[index] for index in gone if grid.dims[index]), grid.lost)
    return Grid(tuple(own for index, own in enumerate(grid.dims) if index not in gone), lost)


def _unsqueeze(seen: Seen, x: Any, dim: int) -> Grid | None:
    grid, dim = seen.grid(x), dim % (x.dim() + 1)
    return grid and Grid((*grid.dims[:dim], grid.lost, *grid.dims[dim:]))


def _along(seen: Seen, x: Any, dim: int, change: Callable[[Axis], Axis]) -> Grid | None:
    """A change along one dimension; where that is flattened, it is new."""
    grid, dim = seen.grid(x), dim % x.dim()
    if grid is None:
        return None
    axis = grid.at(dim)
    return grid.but({dim: (change(axis),) if axis else new(seen.shape[dim])})


def _crop(axis: Axis, start: int, size: int) -> Axis:
    return resized(axis, -start, start + size - axis.size)


def _slice(
    seen: Seen, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Grid | None:
    grid, size, dim = seen.grid(x), x.shape[dim], dim % x.dim()
    if grid is None:
        return None
    first, last = within(start, size, 0), within(end, size, size)
    cut = resized_dim(grid.dims[dim] or new(size), -first, max(last, first) - size)
    if step > 1:
        cut = (window(cut[0], 0, 0, step, seen.shape[dim]),) if len(cut) == 1 else new(seen.shape[dim])
    return grid.but({dim: cut})


def _narrow(seen: Seen, x: Any, dim: int, start: int, length: int) -> Grid | None:
    return _slice(seen, x, dim, start, start % x.shape[dim] + length)


def _select(seen: Seen, x: Any, dim: int, index: int) -> Grid | None:
    grid, dim = seen.grid(x), dim % x.dim()
    if grid is None:
        return None
    axis = grid.at(dim)
    lost = (_crop(axis, index % x.shape[dim], 1),) if axis else ()
    return Grid((*grid.dims[:dim], *grid.dims[dim + 1 :]), lost)


def _unbind(seen: Seen, x: Any, dim: int = 0) -> list[Grid | None]:
    return [_select(seen, x, dim, index) for index in range(x.shape[dim])]


def _split(seen: Seen, x: Any, sizes: int | Sequence[int], dim: int = 0) -> list[Grid | None]:
    whole = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)] or [0]
    starts = itertools.accumulate(sizes, initial=0)
    return [_slice(seen, x, dim, start, start + size) for start, size in zip(starts, sizes, strict=False)]


def _piece(seen: Seen, tensor: Any, dim: int) -> Piece | None:
    """What a tensor is along a dimension; None if that is flattened."""
    grid, size = seen.grid(tensor), tensor.shape[dim]
    if grid is None:
        return Blank(size, seen.is_zero(tensor))
    return grid.at(dim) or (None if grid.dims[dim] else Axis(size))


def _cat(seen: Seen, tensors: Sequence[Any], dim: int = 0) -> Grid:
    # An empty vector joins nothing, whatever else is joined.
    tensors = [tensor for tensor in tensors if tensor.dim() == len(seen.shape)]
    dim %= len(seen.shape)
    pieces = [_piece(seen, tensor, dim) for tensor in tensors]
    rest = pointwise(seen.shape, [grid for tensor in tensors if (grid := seen.grid(tensor))])
    axis = joined([part for part in pieces if part]) if all(pieces) else None
    return rest.but({dim: (axis,) if axis else new(seen.shape[dim])})


def _stack(seen: Seen, tensors: Sequence[Any], dim: int = 0) -> Grid:
    dim %= len(seen.shape)
    grids = [grid for tensor in tensors if (grid := seen.grid(tensor))]
    rest = pointwise((*seen.shape[:dim], *seen.shape[dim + 1 :]), grids)
    pieces: list[Piece] = []
    for tensor in tensors:
        grid = seen.grid(tensor)
        pieces += grid.lost if grid else [Blank(1, seen.is_zero(tensor))]
    axis = joined(pieces) if len(pieces) == len(tensors) else None
    return Grid((*rest.dims[:dim], (axis,) if axis else new(seen.shape[dim]), *rest.dims[dim:]))


def _pad(mode: str | None) -> Callable[..., Grid | None]:
    def rule(seen: Seen, x: Any, sides: Sequence[int], value: Any = 0) -> Grid | None:
        grid = seen.grid(x)
        if grid is None:
            return None
        changed: dict[int, Dim] = {}
        for index, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
            dim = x.dim() - 1 - index
            axes = grid.dims[dim] or (Axis(x.shape[dim]),)
            changed[dim] = resized_dim(axes, before, after, mode or ("constant" if value else None))
        return grid.but(changed)

    return rule


def _roll(seen: Seen, x: Any, shifts: Any, dims: Any = ()) -> Grid | None:
    grid = seen.grid(x)
    if grid is None or not dims:
        return None
    for shift, dim in zip(shifts, dims, strict=True):
        if axis := grid.at(dim):
            grid = grid.but({dim % x.dim(): (rolled(axis, shift),)})
    return grid


def _repeat(seen: Seen, x: Any, times: Sequence[int]) -> Grid | None:
    grid = seen.grid(x)
    if grid is None:
        return None
    more = len(seen.shape) - x.dim()
    dims = [new(size) for size in seen.shape[:more]]
    for dim, (often, size) in enumerate(zip(times[more:], seen.shape[more:], strict=True)):
        axis = grid.at(dim)
        dims.append((repeated(axis, often),) if axis else grid.dims[dim] if often == 1 else new(size))
    return Grid(tuple(dims))


def _index_select(seen: Seen, x: Any, dim: int, index: Any) -> Grid | None:
    return _along(seen, x, dim, lambda axis: taken(axis, seen.shape[dim]))


def _gather(seen: Seen, x: Any, dim: int, index: Any, **_: Any) -> Grid | None:
    return _index_select(seen, x, dim, index)


def _index(seen: Seen, x: Any, indices: Sequence[Any]) -> Grid | None:
    """Rows and columns taken by an index for each; any other index is not followed."""
    grid = seen.grid(x)
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    if grid is None or len(seen.shape) != x.dim() or dims != list(range(dims[0], dims[0] + len(dims))):
        return None
    for place, dim in enumerate(dims):
        shape = (*[1] * (len(dims) - indices[dim].dim()), *indices[dim].shape)
        if len(shape) != len(dims) or any(size > 1 for other, size in enumerate(shape) if other != place):
            return None
    axes = {dim: grid.at(dim) for dim in dims}
    return grid.but(
        {dim: (taken(axis, seen.shape[dim]),) if axis else new(seen.shape[dim]) for dim, axis in axes.items()}
    )


def _numbers(values: int | Sequence[int], count: int) -> list[int]:
    several = [values] if isinstance(values, int) else list(values)
    return several * count if len(several) == 1 else several


def _windows(
    seen: Seen, x: Any, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> dict[int, Dim] | None:
    grid, count = seen.grid(x), len(kernel)
    if grid is None:
        return None
    changed: dict[int, Dim] = {}
    sides = zip(kernel, _numbers(stride, count), _numbers(padding, count), _numbers(dilation, count), strict=True)
    for dim, (own, step, pad, wide) in enumerate(sides, x.dim() - count):
        axis = grid.at(dim) or Axis(x.shape[dim])
        changed[dim] = (window(axis, pad, wide * (own - 1), step, seen.shape[dim]),)
    return changed


def _convolution(
    seen: Seen, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *_: Any
) -> Grid | None:
    changed = None if transposed else _windows(seen, x, weight.shape[2:], stride, padding, dilation)
    grid = seen.grid(x)
    return grid.but({1: new(seen.shape[1])} | changed) if grid and changed else None


def _unfold(seen: Seen, x: Any, dim: int, size: int, step: int) -> Grid | None:
    """What windows see, and the places within one, which are new."""
    grid = _along(seen, x, dim, lambda axis: window(axis, 0, size - 1, step, seen.shape[dim]))
    return grid and replace(grid, dims=(*grid.dims, new(size)))


def _pool(seen: Seen, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, *_: Any) -> Any:
    # Averages have no dilation, but whether they round up there.
    dilation = 1 if isinstance(dilation, bool) else dilation
    count = 2
    kernel = _numbers(kernel, count)
    changed = _windows(seen, x, kernel, stride or kernel, padding, dilation)
    grid = seen.grid(x)
    return grid.but(changed) if grid and changed else None


def _product(seen: Seen, first: Any, second: Any) -> Grid:
    """Rows of one matrix with columns of another."""
    rows, columns = seen.grid(first), seen.grid(second)
    shape = seen.shape
    before = rows.dims[:-1] if rows else tuple(map(new, shape[:-1]))
    return Grid((*before, columns.dims[-1] if columns and len(columns.dims) > 1 else new(shape[-1])))


def _added_product(seen: Seen, bias: Any, first: Any, second: Any, **_: Any) -> Grid:
    return _product(seen, first, second)


def _reduced(seen: Seen, x: Any, *arguments: Any, **_: Any) -> Grid | None:
    """Some dimensions are summed up, by the first argument that can name them."""
    grid = seen.grid(x)
    if grid is None or len(seen.shape) == x.dim():
        return grid and pointwise(seen.shape, [grid])
    # A number before a list is an exponent.
    dims = [value for value in arguments if isinstance(value, list | tuple)] or [
        [value] for value in arguments if isinstance(value, int)
    ]
    gone = next(({dim % x.dim() for dim in some} for some in dims if len(some) == x.dim() - len(seen.shape)), None)
    return Grid(tuple(dim for index, dim in enumerate(grid.dims) if index not in gone)) if gone else None


def _linear(seen: Seen, x: Any, weight: Any, bias: Any = None) -> Grid | None:
    grid = seen.grid(x)
    return grid and grid.but({len(grid) - 1: new(seen.shape[-1])})


def mixed(seen: Seen, *_: Any, **__: Any) -> Grid:
    """Nothing is known of how positions are computed."""
    return fresh(seen.shape)


_SCATTERING = (
    *("index_put", "_unsafe_index_put", "index_copy", "index_add", "index_reduce"),
    *("scatter", "scatter_add", "scatter_reduce", "masked_scatter", "index_fill"),
)
# By name, without what comes behind a dot. Any other operation is pointwise as far as sizes allow.
RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    "expand": _expand,
    **{name: _reorder(name) for name in ("permute", "transpose", "t")},
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "slice": _slice,
    "narrow_copy": _narrow,
    "select": _select,
    "unbind": _unbind,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _split),
    "cat": _cat,
    "stack": _stack,
    "constant_pad_nd": _pad(None),
    **{f"reflection_pad{count}d": _pad("reflection") for count in (1, 2, 3)},
    **{f"replication_pad{count}d": _pad("replication") for count in (1, 2, 3)},
    "roll": _roll,
    "repeat": _repeat,
    "index_select": _index_select,
    "gather": _gather,
    **dict.fromkeys(("index", "_unsafe_index"), _index),
    **dict.fromkeys((name + place for name in _SCATTERING for place in ("", "_")), scattered),
    "slice_scatter": written_slice,
    "select_scatter": written_row,
    "convolution": _convolution,
    "unfold": _unfold,
    **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d"), _pool),
    **dict.fromkeys(("mm", "bmm"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    "linear": _linear,
    **dict.fromkeys(
        ("sum", "mean", "prod", "var", "std", "any", "all", "max", "min", "amax", "amin", "argmax", "argmin"), _reduced
    ),
    **dict.fromkeys(("var_mean", "logsumexp", "linalg_vector_norm", "norm", "topk", "median"), _reduced),
    **dict.fromkeys(("as_strided", "sort", "grid_sampler_2d"), mixed),
}
