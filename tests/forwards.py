"""Networks of a forward function, and the two ways in which planning runs one."""

import torch
import torch.nn as nn

import coconv_surgery as cs

IMAGE = torch.ones(1, 3, 32, 32)
WAYS = {
    "shapes": {"input_size": 32},
    "numbers": {"example_inputs": cs.Inputs((IMAGE,), needs_numbers=True)},
}


class Model(nn.Module):
    """A network of some parts and a forward function."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)
