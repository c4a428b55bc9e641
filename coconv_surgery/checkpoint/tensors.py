"""Tensors on their way to a file and back."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save

from coconv_surgery.layers.arguments import shown
from coconv_surgery.tracing.objects import is_expanded


def check_loadable(model: nn.Module, weights: Mapping[str, Any], path: str | Path) -> None:
    """Check that tensors can be copied into those that a network has under the same names.

    Args:
        model: The network.
        weights: Tensors by name, and what else a state dict may hold, which is not looked at.
        path: Where they come from, for the message.

    Raises:
        ValueError: If the network has no memory for them, or one is not an ordinary tensor of numbers.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where weights have no place: build it on another"
        )
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        kind = _not_ordinary(tensor)
        if tensor.is_complex() and not (name in own and own[name].is_complex()):
            kind = f"is of type {tensor.dtype}, which would lose its imaginary part"
        if kind is not None:
            raise ValueError(f"{path}: {name} {kind}; it must be an ordinary tensor")


def check_fit(model: nn.Module, own: Mapping[str, Any], weights: Mapping[str, Any], path: str | Path) -> None:
    """Check that a network holds all of some weights and nothing else.

    Args:
        model: The network, for the message.
        own: What it holds, by name.
        weights: What it would be given, by name.
        path: Where that comes from, for the message.

    Raises:
        ValueError: If names or shapes differ, or it holds one tensor for several that differ; one of each kind is
            named.
    """
    shared = [name for name in own if name in weights and isinstance(own[name], torch.Tensor)]
    both = [name for name in shared if isinstance(weights[name], torch.Tensor)]
    fitting = [name for name in both if own[name].shape == weights[name].shape]
    first: dict[Any, str] = {}
    tied = {name: first.setdefault(_place(own[name]), name) for name in fitting if own[name].numel()}
    problems = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "no tensor": [name for name in shared if name not in both],
        "of another shape": [
            f"{name} ({_shape(weights[name])}, and {_shape(own[name])} in the network)"
            for name in both
            if name not in fitting
        ],
        "of which the network holds one for several that differ": [
            name
            for name in fitting
            if not can_hold(own[name], weights[name])
            or (name in tied and not _same(weights[name], weights[tied[name]]))
        ],
    }
    if any(problems.values()):
        words = "; ".join(f"{len(names)} {kind}, as {names[0]}" for kind, names in problems.items() if names)
        advice = _advice(own, weights) if problems["missing"] else ""
        raise ValueError(f"the weights in {path} do not fit {type(model).__name__}: {words}{advice}")


def _advice(own: Mapping[str, Any], weights: Mapping[str, Any]) -> str:
    """What to do with weights of a larger network of which a part would fit."""
    first = next(iter(own))
    parts = (name.removesuffix(f".{first}") for name in weights if name.endswith(f".{first}"))
    part = next((part for part in parts if all(f"{part}.{name}" in weights for name in own)), None)
    where = f"under {shown(part)}, beside others"
    return "" if part is None else f". All that it has are there {where}: save the state_dict() of that part"


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def cannot_write(tensor: torch.Tensor) -> str | None:
    """Why a safetensors file has no place for a tensor, or None."""
    return _not_ordinary(tensor) or (None if _has_place_for(tensor.dtype) else f"is of type {tensor.dtype}")


@functools.cache
def _has_place_for(dtype: torch.dtype) -> bool:
    try:
        save({"x": torch.empty(1, dtype=dtype)})
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    return True


def each_once(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors as safetensors takes them, contiguous and each in memory of its own.

    Returns:
        Them, and for each that is held under a second name the first one.
    """
    first: dict[Any, str] = {}
    once, shared, taken = {}, {}, set()
    for name, tensor in tensors.items():
        if tensor.numel() and first.setdefault(_place(tensor), name) != name:
            shared[name] = first[_place(tensor)]
        else:
            copied = tensor.contiguous().resolve_conj().resolve_neg()
            storage = copied.untyped_storage()
            if storage.nbytes() != copied.nbytes or storage.data_ptr() in taken:
                copied = copied.clone()
            taken.add(copied.untyped_storage().data_ptr())
            once[name] = copied
    return once, shared


def _place(tensor: torch.Tensor) -> Any:
    """Equal of tensors that are one; on the meta device each is its own."""
    memory = id(tensor) if tensor.is_meta else tensor.data_ptr()
    return (tensor.device, memory, tensor.dtype, tensor.shape, tensor.stride())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and bool(((one == other) | (one.isnan() & other.isnan())).all()))


def held_once(expanded: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of values in the shape of an expanded tensor, those that it holds: a view."""
    return values[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in expanded.stride())]


def can_hold(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a tensor has a place for each of some values, or those that share one are equal."""
    return not is_expanded(tensor) or torch.equal(held_once(tensor, values).expand_as(values), values)


def _not_ordinary(tensor: torch.Tensor) -> str | None:
    """Why a tensor is not an ordinary one."""
    if tensor.is_meta:
        return "has a shape but no numbers"
    if tensor.is_nested:
        return "is nested"
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return "is quantised" if tensor.is_quantized else f"has the layout {tensor.layout}"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}"
    return None
