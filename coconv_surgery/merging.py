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
import inspect
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
from coconv_surgery.layers.switch import make_subclass, switch_class, to_coconv_
from coconv_surgery.tracing.differences import difference
from coconv_surgery.tracing.sites import pass_mark_on
from coconv_surgery.tracing.twin import Twin

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
        cls = plain = _plain_class(module)
        if _is_contextual(module) and not isinstance(module, nn.Conv2d):
            own = tuple(name for name in MERGING_METHODS if callable(vars(module).get(name)))
            others = (name for name in MERGING_METHODS if name not in own)
            methods = tuple(name for name in others if _is_merge(getattr_static(plain, name, None)))
            cls = _keeping_class(plain, methods, own) if methods or own else plain
        if cls is not type_before_parametrizations(module):
            undo.callback(restorer(module))
            switch_class(module, cls)


_KEEPING: dict[Any, type[nn.Module]] = {}


def _keeping_class(plain: type[nn.Module], methods: tuple[str, ...], own: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a block's class, of the same name, whose merging methods carry levels over.

    Args:
        plain: The block's class.
        methods: Its merging methods.
        own: Those that are set on the block itself.
    """
    key = (plain, methods, own)
    if key not in _KEEPING:
        members: dict[str, Any] = {name: _keeping_method(getattr_static(plain, name), plain) for name in methods}
        members |= {name: _OwnMethod(name) for name in own}
        members |= {"__qualname__": plain.__qualname__, "__doc__": plain.__doc__, _PLAIN: plain}
        _KEEPING[key] = make_subclass(plain.__name__, (plain,), _keeping_class, *key, members=members)
    return _KEEPING[key]


def _plain_class(module: nn.Module) -> type[nn.Module]:
    cls = cast(type[nn.Module], type_before_parametrizations(module))
    return cast(type[nn.Module], vars(cls).get(_PLAIN, cls))


def _is_merge(attribute: Any) -> bool:
    """Whether it is a method that can be called with one argument at most.

    One that needs more is a merge by its name alone, as the ``reparameterize`` of a variational autoencoder.
    """
    if isinstance(attribute, staticmethod | classmethod | property | type) or not hasattr(attribute, "__get__"):
        return False
    try:
        parameters = inspect.signature(attribute).parameters.values()
    except (TypeError, ValueError):
        return True
    return sum(map(_is_needed, parameters)) <= 2  # the block itself, and one more


def _is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a call must give a parameter by its position."""
    by_position = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return by_position and parameter.default is parameter.empty


def _keeping_method(method: Any, plain: type[nn.Module]) -> Callable[..., Any]:
    """A merging method that carries levels over: what it is called with and what it returns are the method's own."""

    @functools.wraps(method)
    def call(block: Any, *args: Any, **kwargs: Any) -> Any:
        return _merge(block, method.__get__(block, plain), *args, **kwargs)

    return call


class _OwnMethod:
    """The same for a method that is set on the block itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, block: Any, owner: Any) -> Any:
        if block is None or self.name not in vars(block):
            raise AttributeError(f"{owner.__name__} has no attribute {self.name!r}")
        method = vars(block)[self.name]
        return functools.partial(_merge, block, method) if callable(method) else method

    def __set__(self, block: Any, method: Any) -> None:
        vars(block)[self.name] = method

    def __delete__(self, block: Any) -> None:
        del vars(block)[self.name]


def _is_contextual(module: nn.Module) -> bool:
    return any(isinstance(sub, CoConv2d) for sub in module.modules())


class _Call:
    """One call of a merging method, with the calls within it.

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
    given = tree_leaves((args, kwargs))
    # A method that works on what it is given has the name of a merge alone, or is a part of one.
    is_helper = bool(given) and all(isinstance(leaf, torch.Tensor | fx.Proxy | nn.Module) for leaf in given)
    if (is_helper and not _takes_options(method)) or not _is_contextual(block):
        return merge()
    before, tolerance = _in_double(block), _tolerance(block)
    with ExitStack() as undo:
        undo.callback(deep_restorer(block))
        result, call = _merge_with_levels(merge, block)
        after = _in_double(_merged(result, block))
        same = None if before is None or after is None else _compute_the_same(before, after, tolerance)
        if same is False or (same is None and not call.certain):
            raise _refusal(block)
        call.certain = True  # to the merge around it
        undo.pop_all()
    if outer := _calls.get():
        outer[-1].consumed += call.consumed
        outer[-1].produced += call.produced
    return result


def _takes_options(method: Callable[..., Any]) -> bool:
    """Whether all that a method takes may be left out."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _merged(result: Any, block: nn.Module) -> nn.Module:
    """What a merge leaves: the one module that it returns, or else the block."""
    modules = [leaf for leaf in tree_leaves(result) if isinstance(leaf, nn.Module)]
    return modules[0] if len(modules) == 1 else block


def _in_double(block: nn.Module) -> nn.Module | None:
    """A copy to compare with, without other people's hooks, or None where there can be none."""
    try:
        return Twin(block, fake=False).model.double()
    except Exception:  # the block's own code, which may refuse to be copied
        return None


def _compute_the_same(before: nn.Module, after: nn.Module, tolerance: float) -> bool | None:
    """Whether all tensors that a merged block returns are among those that it returned before, on random images.

    Returns:
        None where the two cannot be run on images, or do not return a tensor.
    """
    conv = next(module for module in before.modules() if isinstance(module, nn.Conv2d))
    device = next((tensor.device for tensor in before.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(2, conv.in_channels, _SIDE, _SIDE, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        try:
            images = [image] * max(1, sum(map(_is_needed, inspect.signature(before.forward).parameters.values())))
            expected, found = (_tensors(module(*map(torch.clone, images))) for module in (before, after))
        except Exception:  # the block's own code, which may want something else than images
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
    # Where there is no number to compare, nothing is apart.
    return found.shape == expected.shape and not difference(found, expected) > tolerance


def _merge_with_levels(merge: Callable[[], Any], block: nn.Module) -> tuple[Any, _Call]:
    call = _Call()
    before = _spatial_convs(block)
    token = _calls.set((*_calls.get(), call))
    try:
        result = merge()
    finally:
        _calls.reset(token)
    after = _spatial_convs(_merged(result, block))
    known = [*before, *call.produced]
    merged = [conv for conv in known if conv not in after and conv not in call.consumed and not _is_pointwise(conv)]
    made = [conv for conv in after if conv not in known]
    if any(isinstance(conv, CoConv2d) for conv in merged):
        call.certain = bool(made) and _carry_over(block, merged, made)
    call.consumed += merged
    call.produced += made
    return result, call


def _carry_over(block: nn.Module, merged: list[nn.Conv2d], made: list[nn.Conv2d]) -> bool:
    """Give what was made the levels of what was merged; say whether there was no choice."""
    certain = len({_kind(conv) for conv in merged}) == 1
    shapes = {conv.weight.shape for conv in made}
    # What has another shape was dropped, as an auxiliary branch is.
    sources = merged[:1] * len(made) if certain else [conv for conv in merged if conv.weight.shape in shapes]
    if [conv.weight.shape for conv in sources] != [conv.weight.shape for conv in made]:
        raise _refusal(block)
    for conv, source in zip(made, sources, strict=True):
        if isinstance(source, CoConv2d):
            to_coconv_(conv, source.dilations, source.splits)
            pass_mark_on(source, conv)
    return certain


def _refusal(block: nn.Module) -> ValueError:
    return ValueError(
        f"merged, this {type(block).__name__} would not compute the same, or there is no telling: what it merges does "
        "not all have the same levels. Reparameterize before converting, or exclude it from the conversion"
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
