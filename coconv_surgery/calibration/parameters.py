"""Parameters that a calibration leaves as they are, and why."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.calibration.networks import tensors_of
from coconv_surgery.planning.reasons import Reason
from coconv_surgery.tracing.objects import is_expanded, memory_of, tensor_leaves
from coconv_surgery.tracing.operations import makes_anew

Span = tuple[int, int]  # the first byte, and the first behind the last one


def that_stay(model: nn.Module, *, frozen: bool) -> dict[str, str]:
    """What can be told from the network alone.

    Args:
        model: The network.
        frozen: Whether parameters that do not require gradients may change.

    Returns:
        Reasons by name.
    """
    stay = _sharing_memory(tensors_of(model))
    for name, parameter in model.named_parameters():
        if is_expanded(parameter):
            stay[name] = "its kernels are few numbers that are shown several times"
        if not (frozen or parameter.requires_grad):
            stay[name] = "its kernels are frozen"
    return stay


class OtherReads:
    """Sees in a run which parameters are used outside of the convolutions that convolve with them.

    Args:
        model: The network.
        convolves: Whether one of them convolves right now.

    Attributes:
        names (set[str]): The names of the parameters.
    """

    def __init__(self, model: nn.Module, convolves: Callable[[], bool]) -> None:
        self.names: set[str] = set()
        self._convolves = convolves
        self._parameters: dict[int, list[tuple[Span, str]]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            self._parameters[memory_of(parameter)].append((_span(parameter), name))

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Look at an operation that has run."""
        if self._convolves() or makes_anew(func):
            return
        given = [tensor for tensor in tensor_leaves((args, kwargs)) if memory_of(tensor) in self._parameters]
        made = tensor_leaves(result)
        self.leave(tensor for tensor in given if not made or {*map(memory_of, made)} != {memory_of(tensor)})

    def leave(self, tensors: Iterable[Any]) -> None:
        """Take in tensors that are read without an operation."""
        for tensor in tensors:
            known = self._parameters.get(memory_of(tensor), ()) if isinstance(tensor, torch.Tensor) else ()
            self.names |= {name for span, name in known if _overlap(span, _span(tensor))}

    def reasons(self, names: Iterable[str]) -> dict[str, str]:
        """Why some of them are to stay, by name."""
        return dict.fromkeys(self.names & {*names}, Reason.WEIGHT_READ.value)


def _sharing_memory(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Tensors that lie in the memory of other ones: what is written into one changes the others."""
    found: dict[str, list[str]] = defaultdict(list)
    open_spans: list[tuple[Span, str]] = []
    for span, name in sorted((_span(tensor), name) for name, tensor in tensors.items()):
        open_spans = [other for other in open_spans if _overlap(other[0], span)]
        for _, other in open_spans:
            found[name].append(other)
            found[other].append(name)
        open_spans.append((span, name))
    return {name: f"its kernels share memory with {', '.join(others)}" for name, others in found.items()}


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _span(tensor: torch.Tensor) -> Span:
    """The bytes that a tensor reaches over; none if it has no memory."""
    try:
        start = tensor.data_ptr()
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    except (NotImplementedError, RuntimeError):  # kinds of tensors that have none
        return (0, 0)
    return (start, start + (steps + 1) * tensor.element_size()) if start and tensor.numel() else (0, 0)
