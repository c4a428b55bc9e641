"""Levels survive structural reparameterisation, or it is refused.

Blocks as RepVGG's, MobileOne's and RepViT's merge parallel branches, or a convolution and its norm, into one new
convolution for inference. The levels of contextual branches carry over to it where the branches agree: a 1×1
convolution, an identity and a norm act on the centre of the kernel, which all levels share. A rehearsal on a copy
compares the block before and after, and what would not compute the same is refused, such as a contextual 3×3 branch
beside a 7×7 one.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.switch import to_coconv_
from coconv_surgery.tracing.twin import FORWARD_ERRORS

# What timm's reparameterize_model() calls.
_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
_MARK = "_keeps_coconv_levels"
_SIDE = 32
_TOLERANCE = 1e-3

Merge = Callable[[nn.Module], Any]


def keep_levels_in_merges(model: nn.Module) -> None:
    """Let the blocks of a converted network carry their levels over when they merge their branches.

    The merging methods of its classes are wrapped, once a process; on a block without contextual convolutions they do
    what they did. A network that was unpickled whole, in another process than the one that converted it, needs its
    plan applied again before it is reparameterised.

    Args:
        model: A network.
    """
    if not _holds(model, CoConv2d):
        return
    for cls in {type(module) for module in model.modules() if _holds(module, nn.Conv2d)}:
        for name in _METHODS:
            owner = next((base for base in cls.__mro__ if name in vars(base)), None)
            if owner is not None and _is_merge(vars(owner)[name]):
                setattr(owner, name, _keeping_levels(vars(owner)[name]))


def _holds(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(sub, kind) for sub in module.modules())


def _is_merge(attribute: Any) -> bool:
    """Whether it is a method that needs no arguments, and is not wrapped yet."""
    if not isinstance(attribute, FunctionType) or hasattr(attribute, _MARK):
        return False
    _, *others = inspect.signature(attribute).parameters.values()
    return all(other.default is not other.empty or other.kind is other.VAR_KEYWORD for other in others)


class _Call:
    """One call of a merging method, and the calls within it.

    Attributes:
        consumed: Convolutions that this call or one within it has merged away.
        produced: Convolutions that it or one within it has made.
        certain: Whether the levels of all that it made follow from what it merged, without a comparison.
    """

    def __init__(self) -> None:
        self.consumed: list[nn.Conv2d] = []
        self.produced: list[nn.Conv2d] = []
        self.certain = True


_calls: list[_Call] = []


def _keeping_levels(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(block: nn.Module, **kwargs: Any) -> Any:
        def merge(module: nn.Module) -> Any:
            return method(module, **kwargs)

        if not _calls:
            if not _holds(block, CoConv2d):
                return merge(block)
            _rehearse(merge, block)
        return _merge_with_levels(merge, block)[0]

    setattr(wrapper, _MARK, True)
    return wrapper


def _rehearse(merge: Merge, block: nn.Module) -> None:
    """Merge a copy, so that what cannot be merged is found before anything changes.

    Raises:
        ValueError: If the block would not compute the same.
    """
    reference, rehearsal = (copy.deepcopy(block).double().eval() for _ in range(2))
    result, call = _merge_with_levels(merge, rehearsal)
    merged = result if isinstance(result, nn.Module) else rehearsal
    same = _compute_the_same(reference, merged.double().eval())
    if same is False or (same is None and not call.certain):
        raise _refusal(block)


def _compute_the_same(first: nn.Module, second: nn.Module) -> bool | None:
    """Whether two modules agree on a random input; None where they cannot be run on one."""
    conv = next(module for module in first.modules() if isinstance(module, nn.Conv2d))
    if conv.weight.is_meta:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(2, conv.in_channels, _SIDE, _SIDE, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        try:
            expected, found = (tree_leaves(module(image.to(conv.weight.device))) for module in (first, second))
        except FORWARD_ERRORS:
            return None
    pairs = zip(expected, found, strict=True)
    return all(bool((a - b).abs().max() <= _TOLERANCE * a.abs().max()) for a, b in pairs)


def _merge_with_levels(merge: Merge, block: nn.Module) -> tuple[Any, _Call]:
    call = _Call()
    before = _spatial_convs(block)
    _calls.append(call)
    try:
        result = merge(block)
    finally:
        _calls.pop()
    after = _spatial_convs(result if isinstance(result, nn.Module) else block)
    known = [*before, *call.produced]
    merged = [conv for conv in known if conv not in after and conv not in call.consumed and not _is_pointwise(conv)]
    made = [conv for conv in after if conv not in known]
    if made and any(isinstance(conv, CoConv2d) for conv in merged):
        call.certain &= _carry_over(block, merged, made)
    if _calls:
        _calls[-1].consumed += [*call.consumed, *merged]
        _calls[-1].produced += [*call.produced, *made]
        _calls[-1].certain &= call.certain
    return result, call


def _carry_over(block: nn.Module, merged: list[nn.Conv2d], made: list[nn.Conv2d]) -> bool:
    """Give what was made the levels of what was merged; say whether there was no choice."""
    certain = len({_kind(conv) for conv in merged}) == 1
    sources = merged[:1] * len(made) if certain else merged
    if [conv.weight.shape for conv in sources] != [conv.weight.shape for conv in made]:
        raise _refusal(block)
    for conv, source in zip(made, sources, strict=True):
        if isinstance(source, CoConv2d):
            to_coconv_(conv, source.dilations, source.splits)
    return certain


def _refusal(block: nn.Module) -> ValueError:
    return ValueError(
        f"merged, this {type(block).__name__} would not compute the same: its branches do not all have the same "
        "dilations. Reparameterize before converting, or exclude it from the conversion"
    )


def _kind(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.kernel_size, getattr(conv, "dilations", None), getattr(conv, "splits", None)


def _spatial_convs(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether only the centre of the kernel counts, as in an identity or a 1×1 convolution padded with zeros."""
    if isinstance(conv, CoConv2d) or conv.weight.is_meta:
        return False
    height, width = conv.kernel_size
    centre = conv.weight[..., height // 2, width // 2]
    return bool(conv.weight.count_nonzero() == centre.count_nonzero())
