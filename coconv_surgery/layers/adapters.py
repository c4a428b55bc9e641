"""Adapters of peft: layers that hold a convolution, and add the product of small ones to its weight when they merge.

The small ones are plain, so the sum is right where the convolution is plain as well. One within an adapter is left
alone therefore, and a contextual one takes no adapter. Other adapters train a copy of a module beside the original:
one that holds contextual convolutions is copied with them, but of two plain ones the original does not run, and would
stay plain when the copy is converted. What is an adapter, its base class tells, and torch tells of every module that
another one takes in.
"""

import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from coconv_surgery.layers.arguments import is_instance_of
from coconv_surgery.layers.conv import CoConv2d

_MERGES = ("peft.tuners.tuners_utils", "BaseTunerLayer")
_COPIES = ("peft.utils.other", "AuxiliaryTrainingWrapper")


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is an adapter of peft, which is not imported for that."""
    return is_instance_of(module, *_MERGES) or is_instance_of(module, *_COPIES)


def _refuse_contextual(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    contextual = isinstance(module, CoConv2d) and module.contextual_levels is not None
    if contextual and is_instance_of(owner, *_MERGES):
        raise TypeError(
            f"peft's {type(owner).__module__}.{type(owner).__name__} would adapt a contextual convolution as if it "
            "were a plain one, and compute something else once merged: revert() the network, adapt it, and convert() "
            "it then, which leaves alone what is adapted; or adapt other layers"
        )


register_module_module_registration_hook(_refuse_contextual)
