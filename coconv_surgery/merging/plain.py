"""Blocks as they are without what sees to their levels."""

import functools
from typing import Any, cast

import torch.nn as nn
from torch.nn.utils.parametrize import type_before_parametrizations

from coconv_surgery.layers.switch import switch_class
from coconv_surgery.merging.methods import own_methods

PLAIN = "_coconv_plain_class"


class KeptMethod(functools.partial[Any]):
    """A merging method that is set on a block itself, called by way of a function that carries levels over."""


def plain_class(block: nn.Module) -> type[nn.Module]:
    """The class that a block has, or had before it was switched to one that sees to its levels."""
    cls = cast(type[nn.Module], type_before_parametrizations(block))
    return cast(type[nn.Module], vars(cls).get(PLAIN, cls))


def make_plain(block: nn.Module) -> None:
    """Give a block its own class and methods again, in place."""
    for name, method in own_methods(block).items():
        if isinstance(method, KeptMethod):
            vars(block)[name] = method.args[1]
    if plain_class(block) is not type_before_parametrizations(block):
        switch_class(block, plain_class(block))
