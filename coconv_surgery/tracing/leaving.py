"""Numbers that leave torch without an operation, seen where they do."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# How numbers leave torch without an operation.
_LEAVES = {
    *(torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.data_ptr),
    *(torch.Tensor.untyped_storage, torch.Tensor.__dlpack__),
}


class Leaving(TorchFunctionMode):
    """Tells of the tensors whose numbers leave torch, of which no operation tells.

    Args:
        tell: Called with them.
    """

    def __init__(self, tell: Callable[[Iterable[Any]], object]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LEAVES:
            self._tell(args[:1])
        return func(*args, **(kwargs or {}))
