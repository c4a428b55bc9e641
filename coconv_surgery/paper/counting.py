"""What a network costs: its parameters and multiply-adds, counted."""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from coconv_surgery.planning.plan import count_parameters
from coconv_surgery.zoo.progan import PixelNorm

# What the paper counts for them, by its figures: see Cost.wide.
_PER_ELEMENT: dict[type[nn.Module], int] = {_BatchNorm: 4, PixelNorm: 2, nn.ReLU: 1, nn.LeakyReLU: 1}


class Cost(NamedTuple):
    """What a network costs on one input.

    Attributes:
        parameters: Number of parameters.
        multiply_adds: Of convolutions, linear layers and matrix products, by torch's own FLOP counter.
        wide: The same, with 4 for each element of a batch norm's output, 2 for each of a pixel norm's and 1 for each of
            an activation's. The paper's figures for ResNet and ProGAN are those of this count, to the last digit.
    """

    parameters: int
    multiply_adds: int
    wide: int


def count(model: nn.Module, *args: Any, **kwargs: Any) -> Cost:
    """Count a network's parameters and multiply-adds. On the meta device this computes nothing.

    Args:
        model: The network, in evaluation mode.
        *args: Positional arguments to call it with.
        **kwargs: Keyword arguments to call it with.

    >>> count(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU()), torch.zeros(1, 3, 4, 4))
    Cost(parameters=216, multiply_adds=3456, wide=3584)
    """
    elements = 0

    def add(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel() * next(cost for kind, cost in _PER_ELEMENT.items() if isinstance(module, kind))

    counted = [module for module in model.modules() if isinstance(module, tuple(_PER_ELEMENT))]
    handles = [module.register_forward_hook(add) for module in counted]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    multiply_adds = counter.get_total_flops() // 2
    return Cost(count_parameters(model), multiply_adds, multiply_adds + elements)
