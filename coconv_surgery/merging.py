"""Levels survive structural reparameterisation, or it is refused.

Blocks as RepVGG's, MobileOne's and RepViT's merge parallel branches, or a convolution and its norm, into one new
convolution for inference. The levels of contextual branches carry over to it where the branches agree: a 1×1
convolution, an identity and a norm act on the centre of the kernel, which all levels share. What the block returns
before and after is compared, and a merge that would not compute the same is refused, such as one of a contextual 3×3
branch and a 7×7 one.

A block that holds contextual convolutions and can merge is switched to a class that sees to this, on that instance, as
a convolution is; no class that others use is changed. What cannot be seen to is a merge that is not a method of a
block, such as a loop of a script that builds an ``nn.Conv2d`` from a contextual convolution's weight.
"""

import functools
import types
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from inspect import getattr_static
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn as nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._pytree import tree_leaves

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.rollback import deep_restorer, restorer
from coconv_surgery.layers.switch import switch_class, to_coconv_
from coconv_surgery.tracing.twin import copy_module

# What blocks call it: timm's, RepVGG's and ACNet's; ultralytics' and YOLOv7's; PP-YOLOE's and ECB's; RepLKNet's kin.
MERGING_METHODS = (
    *("fuse", "reparameterize", "switch_to_deploy"),
    *("fuse_bn", "fuse_conv_bn", "fuse_convs", "fuse_repvgg_block", "merge_bn"),
    *("convert_to_deploy", "rep_params"),
    *("deep_fuse_BN", "merge_dilated_branches", "merge_kernel", "structural_reparam"),
)
_PLAIN = "_coconv_plain_class"
_SIDE = 32
_TOLERANCE = 1e-3


def keep_levels_in_merges(model: nn.Module, undo: ExitStack) -> None:
    """Let the blocks of a network that hold contextual convolutions, and no others, carry levels over when they merge.

    Args:
        model: A network.
        undo: Takes what puts a block back.
    """
    for module in model.modules():
        plain = _plain_class(module)
        merges = _merges(module, plain) if _holds(module, CoConv2d) and not isinstance(module, nn.Conv2d) else ()
        cls = _keeping_class(plain, merges) if merges else plain
        if cls is not type_before_parametrizations(module):
            undo.callback(restorer(module))
            switch_class(module, cls)


_KEEPING: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _keeping_class(plain: type[nn.Module], merges: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a block's class, of the same name, whose merging methods carry levels over."""
    if (plain, merges) not in _KEEPING:
        members: dict[str, Any] = {name: _MergingMethod(name, plain) for name in merges}
        members |= {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
        members |= {_PLAIN: plain, "__reduce_ex__": functools.partialmethod(_reduce_ex, plain, merges)}
        cls = types.new_class(plain.__name__, (plain,), exec_body=lambda body: body.update(members))
        _KEEPING[plain, merges] = cast(type[nn.Module], cls)
    return _KEEPING[plain, merges]


def _plain_class(module: nn.Module) -> type[nn.Module]:
    cls = cast(type[nn.Module], type_before_parametrizations(module))
    return cast(type[nn.Module], vars(cls).get(_PLAIN, cls))


def _reduce_ex(block: Any, plain: type[nn.Module], merges: tuple[str, ...], protocol: Any) -> tuple[Any, ...]:
    # The class has no name that it could be unpickled by.
    state = block.__getstate__() if hasattr(block, "__getstate__") else block.__dict__
    return _new_instance, (plain, merges), state


def _new_instance(plain: type[nn.Module], merges: tuple[str, ...]) -> nn.Module:
    cls = _keeping_class(plain, merges)
    return cls.__new__(cls)


def _merges(module: nn.Module, plain: type[nn.Module]) -> tuple[str, ...]:
    """The merging methods of a block's class, and those set on the block itself."""
    return tuple(
        name
        for name in MERGING_METHODS
        if isinstance(getattr_static(plain, name, None), types.FunctionType) or callable(vars(module).get(name))
    )


def _holds(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(sub, kind) for sub in module.modules())


class _MergingMethod:
    """Stands for a merging method of a block: what it is called with and what it returns are that one's."""

    def __init__(self, name: str, plain: type[nn.Module]) -> None:
        self.name, self.plain = name, plain

    def __get__(self, block: Any, owner: Any) -> Any:
        if block is None:
            return getattr(self.plain, self.name)
        method = vars(block).get(self.name)
        if method is None:
            method = getattr(self.plain, self.name).__get__(block)
        return functools.partial(_merge, block, method) if callable(method) else method

    def __set__(self, block: Any, method: Any) -> None:
        vars(block)[self.name] = method

    def __delete__(self, block: Any) -> None:
        if self.name not in vars(block):
            raise AttributeError(self.name)
        del vars(block)[self.name]


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


_calls: ContextVar[tuple[_Call, ...]] = ContextVar("_calls", default=())


def _merge(block: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a merging method, see to the levels, and undo it all if the block would not compute the same.

    Raises:
        ValueError: If it would not.
    """
    merge = functools.partial(method, *args, **kwargs)
    # Something else that has the name of a merge, as the "reparameterize" of a variational autoencoder.
    given_data = any(isinstance(leaf, torch.Tensor | fx.Proxy) for leaf in tree_leaves((args, kwargs)))
    if given_data or not _holds(block, CoConv2d):
        return merge()
    if _calls.get():
        return _merge_with_levels(merge, block)[0]
    before = _in_double(block)
    with ExitStack() as undo:
        undo.callback(deep_restorer(block))
        result, call = _merge_with_levels(merge, block)
        after = _in_double(result if isinstance(result, nn.Module) else block)
        same = None if before is None or after is None else _compute_the_same(before, after, _tolerance(block))
        if same is False or (same is None and not call.certain):
            raise _refusal(block)
        undo.pop_all()
    return result


def _in_double(block: nn.Module) -> nn.Module | None:
    """A copy to compare with, or None where there can be none."""
    try:
        return copy_module(block).double().eval()
    except Exception:  # the block's own code, which may refuse to be copied
        return None


def _compute_the_same(before: nn.Module, after: nn.Module, tolerance: float) -> bool | None:
    """Whether all tensors that a merged block returns are among those that it returned before, on a random input.

    Returns:
        None where the two cannot be run on one, or do not return a tensor.
    """
    conv = next(module for module in before.modules() if isinstance(module, nn.Conv2d))
    device = next((tensor.device for tensor in before.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(2, conv.in_channels, _SIDE, _SIDE, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        try:
            expected, found = (_tensors(module(image.clone())) for module in (before, after))
        except Exception:  # the block's own code, which may want something else than an image
            return None
    if not found:
        return None
    return all(any(_close(tensor, other, tolerance) for other in expected) for tensor in found)


def _tolerance(block: nn.Module) -> float:
    # Merged weights are rounded to the block's own type.
    types = {parameter.dtype for parameter in block.parameters() if parameter.is_floating_point()}
    return max([_TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in types)])


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.to(torch.complex128), expected.to(torch.complex128)
    return not found.numel() or bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _merge_with_levels(merge: Callable[[], Any], block: nn.Module) -> tuple[Any, _Call]:
    call, outer = _Call(), _calls.get()
    before = _spatial_convs(block)
    token = _calls.set((*outer, call))
    try:
        result = merge()
    finally:
        _calls.reset(token)
    after = _spatial_convs(result if isinstance(result, nn.Module) else block)
    known = [*before, *call.produced]
    merged = [conv for conv in known if conv not in after and conv not in call.consumed and not _is_pointwise(conv)]
    made = [conv for conv in after if conv not in known]
    if any(isinstance(conv, CoConv2d) for conv in merged):
        call.certain &= bool(made) and _carry_over(block, merged, made)
    if outer:
        outer[-1].consumed += [*call.consumed, *merged]
        outer[-1].produced += [*call.produced, *made]
        outer[-1].certain &= call.certain
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
