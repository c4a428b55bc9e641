"""Levels survive structural reparameterisation, or it is refused.

Blocks as RepVGG's, MobileOne's and FastViT's merge parallel branches, or a convolution and its norm, into one new
convolution for inference. The levels of contextual branches carry over to it where the branches agree: a 1×1
convolution, an identity and a norm act on the centre of the kernel, which all levels share. Other branches cannot be
merged.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch.nn as nn

from coconv_surgery.conv import CoConv2d, to_coconv_

# What timm's reparameterize_model() calls.
_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
_MARK = "_keeps_coconv_levels"


def keep_levels_in_merges(model: nn.Module) -> None:
    """Let the merging methods of a network's blocks carry levels over; without contextual branches, nothing changes.

    The methods are wrapped, once, in the classes that define them.

    Args:
        model: A converted network.
    """
    for cls in {type(module) for module in model.modules()}:
        for name in _METHODS:
            owner = next((base for base in cls.__mro__ if name in vars(base)), None)
            if owner is not None and not hasattr(vars(owner)[name], _MARK):
                setattr(owner, name, _keeping_levels(vars(owner)[name]))


class _Merge:
    """One call of a merging method, and the calls within it.

    Attributes:
        consumed: Convolutions that this call or one within it has merged away.
        produced: Convolutions that it or one within it has made.
    """

    def __init__(self) -> None:
        self.consumed: set[nn.Conv2d] = set()
        self.produced: set[nn.Conv2d] = set()


_calls: list[_Merge] = []


def _keeping_levels(merge: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(merge)
    def wrapper(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _calls:
            if not any(isinstance(module, CoConv2d) for module in block.modules()):
                return merge(block, *args, **kwargs)
            # A rehearsal, so that what cannot be merged is found before anything changes.
            _merge_with_levels(merge, copy.deepcopy(block), args, kwargs)
        return _merge_with_levels(merge, block, args, kwargs)

    setattr(wrapper, _MARK, True)
    return wrapper


def _merge_with_levels(
    merge: Callable[..., Any], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    inner = _Merge()
    before = _spatial_convs(block)
    _calls.append(inner)
    try:
        result = merge(block, *args, **kwargs)
    finally:
        _calls.pop()
    after = _spatial_convs(result if isinstance(result, nn.Module) else block)
    merged = {conv for conv in (before | inner.produced) - after - inner.consumed if not _is_pointwise(conv)}
    made = after - before - inner.produced
    if any(isinstance(conv, CoConv2d) for conv in merged):
        _carry_over(block, merged, made)
    if _calls:
        _calls[-1].consumed |= inner.consumed | merged
        _calls[-1].produced |= inner.produced | made
    return result


def _carry_over(block: nn.Module, merged: set[nn.Conv2d], made: set[nn.Conv2d]) -> None:
    kinds = {(conv.kernel_size, getattr(conv, "dilations", None), getattr(conv, "splits", None)) for conv in merged}
    (kernel_size, dilations, splits), *others = kinds
    if others or {conv.kernel_size for conv in made} != {kernel_size}:
        raise ValueError(
            f"a {type(block).__name__} cannot be merged into one convolution: its {len(merged)} branches do not all "
            "have the same dilations. Reparameterize before converting, or exclude it from the conversion"
        )
    assert dilations is not None
    assert splits is not None
    for conv in made:
        to_coconv_(conv, dilations, splits)


def _spatial_convs(block: nn.Module) -> set[nn.Conv2d]:
    return {module for module in block.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1}


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether only the centre of the kernel counts, as in an identity or a 1×1 convolution padded with zeros."""
    height, width = conv.kernel_size
    centre = conv.weight[..., height // 2, width // 2]
    return bool(conv.weight.count_nonzero() == centre.count_nonzero())
