"""Which convolutions' weights a network uses outside of their own forward, whatever way it takes to them."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from coconv_surgery.tracing.objects import memory_of, tensor_leaves


class WeightReads:
    """Follows weights, and what is computed of them alone, to where they meet what the network computes of its inputs.

    Args:
        depends_on_input: Whether a tensor does.

    Attributes:
        names: Convolutions whose weight has met such a tensor, or left the network.
    """

    def __init__(self, depends_on_input: Callable[[torch.Tensor], bool]) -> None:
        self._depends_on_input = depends_on_input
        self._by_memory: dict[int, set[str]] = defaultdict(set)
        by_tensor: Any = WeakTensorKeyDictionary  # torch has no types for it
        self._computed = by_tensor()
        self.names: set[str] = set()

    def watch(self, name: str, weights: Iterable[torch.Tensor]) -> None:
        """Begin with the parameters that a convolution's weight is made of."""
        for weight in weights:
            self._by_memory[memory_of(weight)].add(name)

    def tell(self, arguments: Any, result: Any) -> None:
        """Follow an operation that is not part of a convolution's own forward."""
        tensors = tensor_leaves(arguments)
        if names := self._names_of(tensors):
            if any(map(self._depends_on_input, tensors)):
                self.names |= names
            else:
                for tensor in tensor_leaves(result):
                    self._computed[tensor] = names

    def leave(self, outputs: Iterable[torch.Tensor]) -> None:
        """End with what the network returns: others may convolve with it."""
        self.names |= self._names_of(outputs)

    def _names_of(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        found = [self._computed.get(tensor) or self._by_memory.get(memory_of(tensor), set()) for tensor in tensors]
        return set().union(*found)
