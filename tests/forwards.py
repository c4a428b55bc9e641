"""Networks of a forward function, the two ways in which planning runs one, and an operator that takes functions."""

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def fails_on_torch_2_4(reason):
    """Marks a test that shows what docs/versions.md says is not to be had there."""
    return pytest.mark.xfail(torch.__version__ < (2, 5), reason=f"torch 2.4 {reason}", strict=True)


READ_TWICE = fails_on_torch_2_4("exports no parameter that is read twice")
NO_FLEX_ATTENTION = pytest.mark.xfail(
    torch.__version__ >= (2, 14), reason="torch 2.14 attends on a CPU where no gradient is recorded alone", strict=True
)
needs_modes_for_functions = pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"),
    reason="this torch hands no operator that takes functions to a mode",
)


def attend(x):
    """Attention between all pixels."""
    from torch.nn.attention.flex_attention import flex_attention  # since torch 2.5

    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    return flex_attention(tokens, tokens, tokens).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
