"""Follows the positions of tensors through a forward pass, operation by operation."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils.weak import WeakTensorKeyDictionary

from coconv_surgery.tracing.axes import Axis
from coconv_surgery.tracing.grid_rules import RULES, Rule, mixed, reordered
from coconv_surgery.tracing.grids import Grid, Seen, fresh, pointwise, within
from coconv_surgery.tracing.objects import tensors_in
from coconv_surgery.tracing.operations import makes_anew, name_of
from coconv_surgery.tracing.writing import written

_MAKE_ZEROS = ("zeros", "zeros_like", "new_zeros", "zero_")
_FILL = ("full", "full_like", "new_full", "fill_")
# What leaves zeros zeros.
_KEEP_ZEROS = (
    *("view", "expand", "permute", "transpose", "slice", "select", "squeeze", "unsqueeze", "alias", "detach"),
    *("clone", "_to_copy", "repeat", "split", "mul", "neg", "lift_fresh"),
)

# What shares the memory of a part, or of all.
_PARTS = ("slice", "select", "permute", "transpose", "t", "detach", "alias")
_OVERWRITE = ("copy_", "fill_", "zero_")


@dataclass(frozen=True)
class _Part:
    """A part of a tensor that shares its memory: from where to where, by dimension, and which dimensions are left."""

    whole: torch.Tensor
    ranges: tuple[tuple[int, int], ...]
    left: tuple[int, ...]

    def narrowed(self, dim: int, start: int, end: int, *, drop: bool) -> "_Part":
        own = self.left[dim]
        first = self.ranges[own][0]
        ranges = (*self.ranges[:own], (first + start, first + end), *self.ranges[own + 1 :])
        return _Part(self.whole, ranges, tuple(index for index in self.left if not (drop and index == own)))

    def turned(self, order: Iterable[int]) -> "_Part":
        return replace(self, left=tuple(self.left[dim] for dim in order))


class Positions:
    """Knows the positions of every tensor of a forward pass, once it is told of every operation."""

    def __init__(self) -> None:
        by_tensor: Any = WeakTensorKeyDictionary  # torch has no types for it
        self._grids, self._zeros, self._parts = by_tensor(), by_tensor(), by_tensor()

    def enter(self, inputs: Any) -> None:
        """Begin with what the network is called with."""
        for tensor in tensors_in(inputs):
            self._grids[tensor] = fresh(tensor.shape)

    def leave(self, outputs: Any) -> None:
        """End with what the network returns."""
        for tensor in tensors_in(outputs):
            _end(self._axes_of([tensor]))

    def of_map(self, tensor: torch.Tensor) -> tuple[Axis, Axis]:
        """The positions of a map along its height and its width."""
        grid = self._grid(tensor) or fresh(tensor.shape)
        last = {index: (grid.at(index) or Axis(tensor.shape[index]),) for index in (tensor.dim() - 2, tensor.dim() - 1)}
        self._grids[tensor] = grid.but(last)
        (height,), (width,) = last.values()
        return height, width

    def tell(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Follow one operation."""
        results = list(_tensors(result if isinstance(result, list | tuple) else (result,)))
        if not results:
            return
        name = name_of(operation)
        tensors = list(_tensors((*args, *kwargs.values())))
        if any(tensor.is_nested for tensor in (*tensors, *results)):  # which has no positions
            self._lose(tensors, results)
            return
        part = self._parts.get(args[0]) if name.endswith("_") and isinstance(args[0], torch.Tensor) else None
        if part and name in _OVERWRITE:
            value = args[1] if len(args) > 1 else 0
            self._write(part, value, zeros=isinstance(value, int | float) and value == 0)
            return
        self._note_zeros(name, args, kwargs, results)
        self._note_part(name, args, kwargs, results)
        if not makes_anew(operation) and any(map(self._grid, tensors)):
            rule = RULES.get(name) or RULES.get(name.removesuffix("_copy"))  # many a view has a form that copies
            rule = mixed if isinstance(operation, HigherOrderOperator) else rule
            self._follow(rule, tensors, results, args, kwargs)
        if part:
            self._write(part, args[0], zeros=False)

    def depends_on_input(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed of what the network is called with."""
        return self._grid(tensor) is not None

    def _grid(self, tensor: Any) -> Grid | None:
        found: Grid | None = self._grids.get(tensor) if isinstance(tensor, torch.Tensor) else None
        return found

    def _axes_of(self, tensors: Iterable[Any]) -> set[Axis]:
        return {axis for tensor in tensors if (grid := self._grid(tensor)) for axis in grid.axes()}

    def _seen(self, shape: Iterable[int]) -> Seen:
        return Seen(self._grid, lambda tensor: isinstance(tensor, torch.Tensor) and tensor in self._zeros, tuple(shape))

    def _follow(
        self, rule: Rule | None, tensors: list[Any], results: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        read = self._axes_of(tensors)
        if rule:
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
            try:
                found = rule(self._seen(results[0].shape), *args, **kwargs)
            except (IndexError, KeyError, TypeError, ValueError):  # a form of the operation that the rule does not know
                found = None
            grids = found if isinstance(found, list) else [found] * len(results)
        else:
            known = [grid for tensor in tensors if (grid := self._grid(tensor))]
            masks = [tensor.shape for tensor in tensors if self._grid(tensor) is None]
            grids = [pointwise(result.shape, known, masks) for result in results]
        for result, grid in zip(results, grids, strict=False):
            self._grids[result] = grid if grid and len(grid.dims) == result.dim() else fresh(result.shape)
        kept = self._axes_of(results)
        _end(read - kept - {source for axis in kept for source in axis.sources})

    def _lose(self, tensors: list[Any], results: list[Any]) -> None:
        """Nothing is known of how results come from the positions of tensors."""
        _end(self._axes_of(tensors))
        self._grids.update((result, fresh(result.shape)) for result in results if not result.is_nested)

    def _note_zeros(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Any]) -> None:
        value = kwargs.get("fill_value", args[-1] if args else None)
        zeros = (
            name in _MAKE_ZEROS
            or (name in _FILL and isinstance(value, int | float) and value == 0)
            or (name in _KEEP_ZEROS and args[0] in self._zeros)
        )
        for result in results:
            if zeros:
                self._zeros[result] = True
            else:
                self._zeros.pop(result, None)

    def _note_part(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Any]) -> None:
        if name not in _PARTS:
            return
        x = args[0]
        part = self._parts.get(x) or _Part(x, tuple((0, side) for side in x.shape), tuple(range(x.dim())))
        if name not in ("slice", "select"):
            self._parts[results[0]] = part.turned(reordered(name, x, *args[1:]))
            return
        dim = (args[1] if len(args) > 1 else 0) % x.dim()
        size = x.shape[dim]
        start, end, step = itertools.islice(itertools.chain(args[2:], itertools.repeat(None)), 3)
        if name == "select":
            self._parts[results[0]] = part.narrowed(dim, start % size, start % size + 1, drop=True)
        elif step in (None, 1):
            first, last = within(start, size, 0), within(end, size, size)
            self._parts[results[0]] = part.narrowed(dim, first, max(first, last), drop=False)

    def _write(self, part: _Part, source: Any, *, zeros: bool) -> None:
        """A part of a tensor is written: with another tensor or a number."""
        whole, seen = part.whole, self._seen(part.whole.shape)
        if self._grid(whole) or self._grid(source):
            read = self._axes_of([source])
            self._grids[whole] = written(seen, whole, part.ranges, part.left, source, zeros=zeros)
            kept = self._axes_of([whole])
            _end(read - kept - {used for axis in kept for used in axis.sources})
        elif not (zeros or seen.is_zero(source)):
            self._zeros.pop(whole, None)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operation takes or returns: by themselves, or in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _end(axes: Iterable[Axis]) -> None:
    for axis in axes:
        axis.ends = True
