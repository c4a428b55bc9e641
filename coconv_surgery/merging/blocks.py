"""Blocks that merge get a class that carries their levels over, or refuses to lose them."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from inspect import getattr_static
from typing import Any

import torch.fx as fx
import torch.nn as nn
from torch.nn.utils.parametrize import type_before_parametrizations

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.rollback import restorer
from coconv_surgery.layers.switch import make_subclass, switch_class
from coconv_surgery.merging.calls import is_merging
from coconv_surgery.merging.carrying import merge
from coconv_surgery.merging.convs import is_contextual, plain_convs, spatial_convs
from coconv_surgery.merging.methods import MERGING_METHODS, is_merge, needs_at_most, own_methods
from coconv_surgery.merging.plain import PLAIN, KeptMethod, make_plain, plain_class

_OTHERS = (nn.Conv2d, fx.GraphModule)  # switched elsewhere, and of a class that it writes to


def keep_levels_in_merges(model: nn.Module, undo: ExitStack) -> None:
    """Let the blocks of a network that hold contextual convolutions, and no others, carry levels over when they merge.

    Args:
        model: A network.
        undo: Takes what puts a block back.
    """
    modules = list(model.modules())
    holders = {module for module in modules if is_contextual(module) and not isinstance(module, _OTHERS)}
    watched = {part for block in holders if _can_merge(block) for part in block.modules() if part in holders}
    for module in modules:
        if module in watched or plain_class(module) is not type_before_parametrizations(module):
            undo.callback(restorer(module))
            make_plain(module)
            if module in watched:
                _make_keeping(module)


def _can_merge(block: nn.Module) -> bool:
    return any(map(callable, own_methods(block).values())) or any(
        callable(attribute) or hasattr(attribute, "__get__")
        for attribute in (getattr_static(plain_class(block), name, None) for name in MERGING_METHODS)
    )


def _make_keeping(block: nn.Module) -> None:
    for name, method in own_methods(block).items():
        if callable(method) and needs_at_most(method, 1):
            vars(block)[name] = KeptMethod(merge, block, method)
    plain = plain_class(block)
    switch_class(block, _keeping_class(plain, tuple(name for name in MERGING_METHODS if is_merge(plain, name))))


_KEEPING: dict[Any, type[nn.Module]] = {}


def _keeping_class(plain: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of the class of a block, or of a part of one, of the same name, that drops no levels in silence.

    Args:
        plain: The class.
        methods: Its merging methods, which carry levels over.
    """
    key = (plain, methods)
    if key not in _KEEPING:
        members: dict[str, Any] = {name: _keeping_method(getattr_static(plain, name), plain) for name in methods}
        members |= {name: _watching_method(plain, name) for name in ("__setattr__", "add_module")}
        members |= {"__qualname__": plain.__qualname__, "__doc__": plain.__doc__, PLAIN: plain}
        _KEEPING[key] = make_subclass(plain.__name__, (plain,), _keeping_class, *key, members=members)
    return _KEEPING[key]


def _keeping_method(method: Any, plain: type[nn.Module]) -> Callable[..., Any]:
    """A merging method that carries levels over: what it is called with and what it returns are the method's own."""

    @functools.wraps(method)
    def call(block: Any, *args: Any, **kwargs: Any) -> Any:
        return merge(block, method.__get__(block, plain), *args, **kwargs)

    return call


def _watching_method(plain: type[nn.Module], name: str) -> Callable[..., None]:
    """A method that puts an attribute or a module into a block, unless levels would be lost."""
    put: Callable[..., None] = getattr(plain, name)

    @functools.wraps(put)
    def put_unless_levels_are_lost(holder: nn.Module, name: str, module: Any) -> None:
        if isinstance(module, nn.Module):
            _check_arrival(holder, name, module)
        put(holder, name, module)

    return put_unless_levels_are_lost


def _check_arrival(holder: nn.Module, name: str, module: nn.Module) -> None:
    """Check that no plain convolution comes in for a contextual one outside a call that sees to the levels.

    Raises:
        ValueError: If one does.
    """
    if is_merging() or not isinstance(module, nn.Conv2d | nn.Sequential):
        return
    present, replaced = spatial_convs(holder), holder._modules.get(name)
    channels = {conv.weight.shape[:2] for conv in present if isinstance(conv, CoConv2d)}
    came = [conv for conv in plain_convs(module) if conv not in present and conv.weight.shape[:2] in channels]
    if came and not (replaced is not None and plain_convs(replaced)):
        raise ValueError(
            f"{type(holder).__name__}.{name} would become a plain convolution where contextual ones are, and merge "
            "them without their levels. Reparameterize before converting, or by calling a method of the block that "
            "has merged when it returns, as block.fuse(), or give the new convolution the levels first: "
            "to_coconv_(new, old.dilations, old.splits). If a plain one is meant, call to_conv_(old) first"
        )
