"""An entry of the state dict that keeps a converted network's weights out of a plain one."""

from contextlib import ExitStack

import torch.nn as nn

from coconv_surgery.layers.arguments import flag, instance
from coconv_surgery.planning.notes import set_guard
from coconv_surgery.surgery import get_plan


def guard(model: nn.Module, on: bool = True) -> nn.Module:
    """Give a converted network an entry that a plain one has no place for, so that none loads its weights strictly.

    A plain network cannot know that weights were trained for another. This adds a buffer, named
    ``converted_by_coconv_surgery_`` and eight digits that differ with the levels, which a strict ``load_state_dict``
    names as unexpected: timm's loaders, torch's and Lightning's are strict by default. It holds the plan, which
    :func:`plan_of` reads from whatever kept the tensors. Conversions of the network keep it up to date, and
    :func:`revert` takes it out; of a part alone they do not reach it: guard the network anew.

    What it costs: one buffer of some 1,600 bytes a convolution; and weights that have no such entry, those of a plain
    network to fine-tune from among them, do not load strictly any more: load them before, or with ``strict=False``.

    Args:
        model: A converted network.
        on: False takes the entry out.

    Returns:
        The same model object.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If it has no contextual convolution.

    >>> from coconv_surgery import CoConv2d
    >>> list(guard(CoConv2d(8, 8, 3, padding=1, levels=2)).state_dict())
    ['weight', 'bias', 'converted_by_coconv_surgery_96d57237']
    """
    instance(model, "model", nn.Module, "a torch.nn.Module")
    plan = get_plan(model) if flag(on, "on") else None
    if plan is not None and not plan.converted:
        raise ValueError(f"{type(model).__name__} has no contextual convolution: convert it first")
    with ExitStack() as undo:
        set_guard(model, plan, undo)
        undo.pop_all()
    return model
