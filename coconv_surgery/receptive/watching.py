"""What every operation of a forward pass reads, and from there which pixels a position can see."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch._ops import HigherOrderOperator

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.receptive.rules import (
    Map,
    Operation,
    Step,
    UnknownRuleError,
    bound,
    is_pointwise,
    name_of,
    read,
    read_everything,
)
from coconv_surgery.receptive.spots import Spots
from coconv_surgery.tracing.objects import memory_of, tensors_in
from coconv_surgery.tracing.operations import Operations

Place = tuple[Any, ...]


@dataclass
class _Node:
    grid: Pair
    steps: tuple[Step, ...] = ()
    note: str | None = None
    unknown: str | None = None


@dataclass
class _Storage:
    """Memory that tensors share, written to in place by one of them."""

    version: int
    place: Place
    last: Map


@dataclass(frozen=True)
class Seen:
    """What a position of a map can see.

    Attributes:
        spots: Pixels of the image; None where nothing of it.
        through: Operations on the way that mix all positions of a map.
        unknown: Operations on the way that no rule is known for.
    """

    spots: Spots | None
    through: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass
class Watch:
    """Watches a network run, operation by operation.

    Attributes:
        outputs (dict[str, list[Map | None]]): What convolutions gave, by name, call by call.
    """

    outputs: dict[str, list[Map | None]] = field(default_factory=dict)
    _nodes: list[_Node] = field(default_factory=list)
    _maps: dict[int, tuple[torch.Tensor, Map, int]] = field(default_factory=dict)  # keeps the tensors, whose id it is
    _storages: dict[int, _Storage] = field(default_factory=dict)

    def run(self, model: nn.Module, convs: Mapping[nn.Module, str], *args: Any, call: Any, **kwargs: Any) -> Any:
        """Run a network on inputs of which the first batch of images is watched."""
        for conv, name in convs.items():
            conv.register_forward_hook(self._note_output(name))
        image = next((tensor for tensor in tensors_in(args, kwargs) if tensor.dim() in (3, 4)), None)
        if image is None:
            raise ValueError("none of the inputs is a batch of images")
        shape = tuple(image.shape)
        grid = shape[-2], shape[-1]
        self._enter(image, (len(shape) - 2, len(shape) - 1), _Node(grid))
        with torch.no_grad(), Operations(self.note):
            return model(*args, **kwargs) if call is None else call(model, *args, **kwargs)

    def _note_output(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            found = self.map_of(output) if isinstance(output, torch.Tensor) else None
            self.outputs.setdefault(name, []).append(found)

        return note

    def map_of(self, tensor: torch.Tensor) -> Map | None:
        """What is known of a tensor; None where the image does not reach it."""
        held = self._maps.get(id(tensor))
        storage = self._storages.get(memory_of(tensor))
        if storage is None or (held is not None and held[2] == storage.version):
            return held[1] if held else None
        if _place(tensor) == storage.place:
            return storage.last
        # Some of its numbers were written by way of another tensor.
        sources = [storage.last, *([held[1]] if held else [])]
        reading = read_everything(sources, None)
        return self._enter(tensor, reading.dims, _Node(reading.grid, tuple(reading.steps), None, "a write in place"))

    def note(self, func: Any, args: Iterable[Any], kwargs: Mapping[str, Any], results: Any) -> None:
        """Note what an operation that has run read."""
        if isinstance(func, HigherOrderOperator):
            self._note_unknown(str(func), tensors_in(args, kwargs), tensors_in(results))
            return
        arguments = bound(func, tuple(args), kwargs)
        written = [
            arguments[each.name]
            for each in func._schema.arguments
            if each.alias_info is not None and each.alias_info.is_write and each.name in arguments
        ]
        maps = self._maps_of(tensors_in(arguments))
        name = name_of(func)
        if not maps or not isinstance(results, torch.Tensor | tuple | list):
            return
        if written and name in ("copy", "fill", "zero"):  # what was there is gone
            maps.pop(id(written[0]), None)
        outputs = [results] if isinstance(results, torch.Tensor) else list(results)
        for number, output in enumerate(outputs):
            if isinstance(output, torch.Tensor):
                self._note_result(
                    Operation(name, arguments, maps, tuple(output.shape), number, is_pointwise(func)), output
                )
        for tensor in written:
            self._note_write(tensor)

    def _maps_of(self, tensors: Iterable[torch.Tensor]) -> dict[int, Map]:
        return {id(tensor): found for tensor in tensors if (found := self.map_of(tensor)) is not None}

    def _note_unknown(self, name: str, inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> None:
        """Note an operator that takes functions, and has no schema."""
        if maps := list(self._maps_of(inputs).values()):
            reading = read_everything(maps, None)
            for output in outputs:
                self._enter(output, reading.dims, _Node(reading.grid, tuple(reading.steps), None, name))

    def _note_result(self, operation: Operation, output: torch.Tensor) -> None:
        unknown = None
        try:
            reading = read(operation)
        except (UnknownRuleError, IndexError, KeyError, TypeError, ValueError):
            unknown = operation.name
            reading = read_everything(list(operation.maps.values()), None)
        self._enter(output, reading.dims, _Node(reading.grid, tuple(reading.steps), reading.note, unknown))

    def _note_write(self, tensor: torch.Tensor) -> None:
        if (held := self._maps.get(id(tensor))) is not None:
            memory = memory_of(tensor)
            version = self._storages[memory].version + 1 if memory in self._storages else 1
            self._storages[memory] = _Storage(version, _place(tensor), held[1])
            self._maps[id(tensor)] = (tensor, held[1], version)

    def _enter(self, tensor: torch.Tensor, dims: Any, node: _Node) -> Map:
        self._nodes.append(node)
        found = Map(len(self._nodes) - 1, node.grid, dims, tuple(tensor.shape))
        storage = self._storages.get(memory_of(tensor))
        self._maps[id(tensor)] = (tensor, found, storage.version if storage else 0)
        return found

    def seen_from(self, place: Map, *, padded: bool) -> Seen:
        """What the position in the middle of a map can see.

        Args:
            place: The map.
            padded: Whether maps go on beyond their edges, as if all padding were more of the image.
        """
        height, width = place.grid
        waiting = {place.node: Spots.at(height // 2, width // 2)}
        through: dict[str, None] = {}
        unknown: dict[str, None] = {}
        for number in range(place.node, 0, -1):  # operations read earlier ones only
            if (spots := waiting.pop(number, None)) is None:
                continue
            node = self._nodes[number]
            through |= dict.fromkeys([node.note] if node.note else [])
            unknown |= dict.fromkeys([node.unknown] if node.unknown else [])
            for source, vertical, horizontal in node.steps:
                read_there = spots.read_by(vertical, horizontal)
                if not padded:
                    read_there = read_there.clipped(*self._nodes[source].grid)
                before = waiting.get(source)
                waiting[source] = read_there if before is None else before.union(read_there)
        return Seen(waiting.get(0), tuple(through), tuple(unknown))


def _place(tensor: torch.Tensor) -> Place:
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset()) if tensor.layout == torch.strided else ()
