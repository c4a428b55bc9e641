"""Adapters of peft: layers that hold a convolution, and add the product of small ones to its weight when they merge.

The small ones are plain, so the sum is right where the convolution is plain as well. One within an adapter is left
alone therefore, and a contextual one takes no adapter. Neither asks for the name of an attribute or of a method: what
derives from peft's base class of adapters is one, and torch tells of every module that another one takes in.
"""

import sys

import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.levels import is_plain


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is an adapter of peft, which is not imported for that."""
    base = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return base is not None and isinstance(module, base)


def _refuse_contextual(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    contextual = isinstance(module, CoConv2d) and not is_plain(module, module.dilations)
    if contextual and is_adapter(owner):
        raise TypeError(
            f"peft's {type(owner).__module__}.{type(owner).__name__} would adapt a contextual convolution as if it "
            "were a plain one, and compute something else once merged: revert() the network, adapt it, and convert() "
            "it then, which leaves alone what is adapted; or adapt other layers"
        )


register_module_module_registration_hook(_refuse_contextual)
