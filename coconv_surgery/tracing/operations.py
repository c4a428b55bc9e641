"""What torch computes, operation by operation, and where numbers leave it without one."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# How numbers leave torch without an operation.
LEAVES = {
    *(torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.data_ptr),
    *(torch.Tensor.untyped_storage, torch.Tensor.__dlpack__),
}

_MAKE = ("new_", "rand", "full", "zeros", "ones", "empty", "arange", "scalar_tensor")


@functools.cache
def name_of(operation: Any) -> str:
    """The name of an operation of torch's."""
    name: str = operation.name().removeprefix("aten::").partition(".")[0]
    return name


def makes_anew(operation: Any) -> bool:
    """Whether an operation takes no numbers from a tensor that it is given, but at most its size and type."""
    name = name_of(operation)
    return name.startswith(_MAKE) or name.endswith("_like")


class Operations(TorchDispatchMode):
    """Tells of every operation that has run.

    Args:
        tell: Called with the operation, its arguments, those by name, and what it returned.
    """

    supports_higher_order_operators = True

    def __init__(self, tell: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        result = func(*args, **named)
        # Questions of torch's own, where a fault of whoever is told would end the process.
        if getattr(func, "namespace", None) != "prim":
            self._tell(func, args, named, result)
        return result


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
        if func in LEAVES:
            self._tell(args[:1])
        return func(*args, **(kwargs or {}))
