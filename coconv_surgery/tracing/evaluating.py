"""Copies of networks in evaluation mode, as their own code has it."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor

from coconv_surgery.layers.rollback import deep_restorer


def evaluate(copied: nn.Module) -> None:
    """Put a copy of a network in evaluation mode: what ``eval()`` of its own leaves training stays in training.

    One that raises is done without, as for graphs that were exported, and one that changes modules or numbers besides,
    such as to merge weights, decides on the mode alone.

    Args:
        copied: The copy.
    """
    modules, modes = list(copied.modules()), dict[nn.Module, bool]()
    if any(map(_has_a_way_of_its_own, modules)):
        numbers = [(tensor, tensor.detach().clone()) for tensor in _tensors_of(copied)]
        put_back = deep_restorer(copied)
        try:
            copied.eval()
            modes = {module: bool(vars(module).get("training")) for module in modules}
            if list(copied.modules()) == modules and _hold(_tensors_of(copied), numbers):
                return
        except Exception:  # the network's own code
            pass
        put_back()
    for module in modules:
        vars(module)["training"] = modes.get(module, False)  # whatever its class does when an attribute is set


def _has_a_way_of_its_own(module: nn.Module) -> bool:
    cls = type(module)
    inherits = cls.train is nn.Module.train and cls.eval is nn.Module.eval
    return not inherits or not vars(module).keys().isdisjoint(("train", "eval"))


def _tensors_of(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _hold(tensors: Sequence[torch.Tensor], before: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether these are the tensors that there were before, with the numbers that they had, if they have any."""
    return len(tensors) == len(before) and all(
        now is tensor and (tensor.is_meta or isinstance(tensor, FakeTensor) or torch.equal(tensor, numbers))
        for now, (tensor, numbers) in zip(tensors, before, strict=True)
    )
