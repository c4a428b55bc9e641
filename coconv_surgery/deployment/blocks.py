"""Blocks that merge their branches for inference, as RepVGG's."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch.nn as nn

from coconv_surgery.layers.rollback import deep_restorer
from coconv_surgery.tracing.evaluating import evaluate
from coconv_surgery.tracing.objects import in_short


def merge_blocks(model: nn.Module) -> tuple[nn.Module, list[str], dict[str, str]]:
    """Let the blocks of a network that can merge their branches do so, in the way of timm's ``reparameterize_model``.

    Returns:
        The network, the names of those that did, and why others did not.
    """
    names: dict[str, None] = {}
    refused: dict[str, str] = {}
    became: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> nn.Module:
        if module in became:
            return became[module]
        became[module] = module
        if (merge := _merge_of(module)) is not None:
            with ExitStack() as undo:
                undo.callback(deep_restorer(module))
                try:
                    result = merge()
                except Exception as error:  # the block's own code, or levels that do not agree
                    refused[path] = in_short(error)
                else:
                    undo.pop_all()
                    names[path] = None
                    became[module] = result if isinstance(result, nn.Module) else module
                    evaluate(became[module])
                    return became[module]
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = visit(child, f"{path}.{name}".lstrip("."))
        return module

    return visit(model, ""), list(names), refused


def _merge_of(module: nn.Module) -> Callable[[], Any] | None:
    for name in ("fuse", "reparameterize", "switch_to_deploy"):
        found = inspect.getattr_static(module, name, None)  # not a module of that name, and not what a property gives
        if found is not None and not isinstance(found, property) and callable(method := getattr(module, name)):
            try:
                inspect.signature(method).bind()
            except (TypeError, ValueError):  # one that wants something is no merge
                continue
            return cast(Callable[[], Any], method)
    return None
