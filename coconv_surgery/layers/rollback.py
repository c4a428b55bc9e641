"""All or nothing: what a module was, remembered, so that a change that fails half way can be put back.

The stack of what to put back is :class:`contextlib.ExitStack`: what is remembered goes in before the change, and
``pop_all()`` at the end of it all says that the change stands::

    with ExitStack() as undo:
        undo.callback(restorer(module))
        ...
        undo.pop_all()
"""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn


def restorer(module: nn.Module) -> Callable[[], None]:
    """Remember a module's class and attributes.

    Returns:
        A function that gives them back: the same class, and the same objects under the same names.
    """
    cls, attributes = type(module), dict(vars(module))

    def restore() -> None:
        if type(module) is not cls:
            object.__setattr__(module, "__class__", cls)
        vars(module).update(attributes)
        for name in vars(module).keys() - attributes.keys():
            del vars(module)[name]

    return restore


def deep_restorer(model: nn.Module) -> Callable[[], None]:
    """Remember everything that a module and those in it are: classes, attributes, and the numbers of tensors.

    It takes as much memory as the module's tensors.

    Returns:
        A function that puts it all back, into the same objects.
    """
    modules = [restorer(module) for module in model.modules()]
    containers = [
        (value, copy.copy(value))
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, dict | list | set)
    ]
    refills = [functools.partial(refill, *pair) for pair in containers]
    restorers: list[Callable[[], None]] = [*modules, *refills, tensor_restorer((*model.parameters(), *model.buffers()))]

    def restore() -> None:
        for put_back in restorers:
            put_back()

    return restore


def tensor_restorer(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Remember parameters and buffers: the objects, their numbers, and whether they require gradients.

    Returns:
        A function that puts the numbers back, into the same objects.
    """
    each = {id(tensor): tensor for tensor in tensors}.values()
    kept = [(tensor, tensor.data, tensor.detach().clone(), tensor.requires_grad) for tensor in each]

    def restore() -> None:
        for tensor, storage, numbers, requires_grad in kept:
            tensor.data = storage
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
            storage.copy_(numbers)

    return restore


def refill(container: Any, content: Any) -> None:
    """Let a dict, list or set hold what another does, and nothing else."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)
