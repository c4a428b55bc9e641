"""What autograd does not record: positions and comparisons computed from maps, and numbers that leave torch."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from coconv_surgery.tracing.objects import tensor_leaves
from coconv_surgery.tracing.operations import LEAVES

# What these compute takes numbers from elsewhere at places that whole numbers give, or puts them there.
_BY_POSITION = ("Index", "UnsafeIndex", "Gather", "Take", "Scatter", "Embedding", "GridSampler")

_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class Unrecorded:
    """A node for an operation that autograd knows no gradient of.

    Args:
        operation: Its name.
        sources: The nodes that it reads, with the number of their output.

    Attributes:
        next_functions: Those sources, named as torch's own nodes do.
    """

    def __init__(self, operation: str, sources: Iterable[tuple[Any, int]]) -> None:
        self._operation = operation
        self.next_functions = tuple(sources)

    def name(self) -> str:
        """The operation's name."""
        return self._operation


class Unrecordeds:
    """The operations of a forward pass that autograd does not record.

    Attributes:
        positions: Nodes of autograd, with those that say at what positions they read or write.
        left: Tensors whose numbers have left torch.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[torch.Tensor, Unrecorded]] = {}
        self.positions: dict[Any, list[Unrecorded]] = defaultdict(list)
        self.left: list[torch.Tensor] = []

    def node_of(self, tensor: torch.Tensor) -> Unrecorded | None:
        """The operation that computed a tensor which autograd has no node of."""
        made, node = self._made.get(id(tensor), (None, None))
        return node if made is tensor else None

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take note of a call, if it is such an operation or reads what one has computed."""
        if func in LEAVES:
            self.left.append(args[0])
        elif func == _SET_DATA:
            self.left.append(args[1])
        name = getattr(func, "__name__", "").partition(".")[0]
        for tensor in _results(name, args, result):
            if tensor.grad_fn is None:
                if sources := list(self._sources(_data(name, args, kwargs))):
                    self._made[id(tensor)] = tensor, Unrecorded(name, sources)
            elif tensor.grad_fn.name().startswith(_BY_POSITION):
                self.positions[tensor.grad_fn] += self._positions((args, kwargs))

    def _sources(self, data: Any) -> Iterator[tuple[Any, int]]:
        for tensor in tensor_leaves(data):
            if tensor.grad_fn is not None:
                yield tensor.grad_fn, tensor.output_nr
            elif (node := self.node_of(tensor)) is not None:
                yield node, 0

    def _positions(self, data: Any) -> list[Unrecorded]:
        # A mask of truth values says which to take, not where to take it from.
        positions = (self.node_of(tensor) for tensor in tensor_leaves(data) if tensor.dtype is not torch.bool)
        return [node for node in positions if node is not None]


def _results(name: str, args: tuple[Any, ...], result: Any) -> list[torch.Tensor]:
    """The tensors that a call has computed."""
    if isinstance(result, torch.Tensor):
        return [result]
    if name == "__setitem__":
        return [args[0]]
    return tensor_leaves(result) if isinstance(result, tuple | list) else []


def _data(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments whose numbers a call reads, not just their shape or type."""
    if name.endswith("_like") or (name.startswith("new_") and name != "new_tensor"):
        return ()
    return args[:1] if name == "to" or name.endswith("_as") else (args, kwargs)
