"""Which methods of a block merge its branches, by their names and by what they are called with."""

import functools
import inspect
from collections.abc import Callable
from inspect import getattr_static
from typing import Any

import torch
import torch.nn as nn

# What blocks call it: timm's, RepVGG's and ACNet's; ultralytics' and YOLOv7's; PP-YOLOE's and ECB's; RepLKNet's kin.
MERGING_METHODS = (
    *("fuse", "reparameterize", "switch_to_deploy"),
    *("fuse_bn", "fuse_conv_bn", "fuse_convs", "fuse_repvgg_block", "merge_bn"),
    *("convert_to_deploy", "rep_params"),
    *("deep_fuse_BN", "merge_dilated_branches", "merge_kernel", "structural_reparam"),
)


def is_merge(plain: type[nn.Module], name: str) -> bool:
    """Whether a class has a method of that name that can be called with one argument at most."""
    attribute = getattr_static(plain, name, None)
    if isinstance(attribute, functools.partialmethod):
        return True
    is_method = callable(attribute) and hasattr(attribute, "__get__") and not isinstance(attribute, staticmethod | type)
    return is_method and needs_at_most(attribute, 2)  # the block itself, and one more


def own_methods(block: nn.Module) -> dict[str, Any]:
    """What has the name of a merging method and is set on the block itself."""
    return {name: value for name, value in vars(block).items() if name in MERGING_METHODS}


def needs_at_most(function: Any, count: int) -> bool:
    """Whether a function can be called with so many arguments.

    What needs more has the name of a merge alone, as the ``reparameterize`` of a variational autoencoder, and so has
    what shows no signature, as ``torch.add``.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(map(is_needed, parameters)) <= count


def is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a call must give a parameter by its position."""
    by_position = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return by_position and parameter.default is parameter.empty


def works_on_parts(method: Callable[..., Any], given: list[Any]) -> bool:
    """Whether a method works on what it is given: it is a part of a forward pass or of a merge, and no merge."""
    if any(isinstance(leaf, torch.Tensor) and leaf.ndim > 2 for leaf in given):
        return True
    is_helper = bool(given) and all(isinstance(leaf, torch.Tensor | nn.Module) for leaf in given)
    return is_helper and not _takes_options(method)


def _takes_options(method: Callable[..., Any]) -> bool:
    """Whether all that a method takes may be left out."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
