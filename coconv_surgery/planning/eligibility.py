"""May this convolution be split? If not, one reason, in words.

A reason in :data:`OBSTACLES` stands: the convolution cannot become a CoConv. One in :data:`CHOICES` is good practice,
which an override may overrule.
"""

import torch.nn as nn

from coconv_surgery.layers.switch import is_switchable
from coconv_surgery.tracing.dataflow import Reader
from coconv_surgery.tracing.trace import TracedConv


def other_operation(conv: TracedConv) -> str | None:
    """Deformable, transposed, conditional or quantised convolutions compute something else."""
    return None if isinstance(conv.conv, nn.Conv2d) else f"{_kind(conv)} is no nn.Conv2d"


def subclass(conv: TracedConv) -> str | None:
    """A subclass may do more than convolve, and a change of class would drop that."""
    if is_switchable(conv.conv):
        return None
    return f"{_kind(conv)} has a forward of its own that register_coconv() does not know"


def _kind(conv: TracedConv) -> str:
    cls = type(conv.conv)
    return cls.__name__ if cls.__name__ != nn.Conv2d.__name__ else f"{cls.__module__}.{cls.__name__}"


def replaced_forward(conv: TracedConv) -> str | None:
    """A forward set on the instance would go on being called instead of the class's."""
    return "its forward was replaced on the instance" if {"forward", "_conv_forward"} & set(vars(conv.conv)) else None


def weight_read_elsewhere(conv: TracedConv) -> str | None:
    """Code that takes the weight and convolves by itself would not see the levels."""
    return "its weight is also used outside its own forward" if conv.weight_read else None


def dilatable_kernel(conv: TracedConv) -> str | None:
    """A kernel of even size has no symmetric padding, and one of size 1 no dilation."""
    height, width = conv.conv.kernel_size
    return None if height % 2 and width % 2 and (height, width) != (1, 1) else f"kernel {height}×{width}"


def never_called(conv: TracedConv) -> str | None:
    """Without a call there is no map size to decide on."""
    return None if conv.calls else "did not run in evaluation mode"


def other_kernel(conv: TracedConv) -> str | None:
    """CoConv replaces 3×3 convolutions (Section 3)."""
    height, width = conv.conv.kernel_size
    return None if (height, width) == (3, 3) else f"kernel {height}×{width}"


def read_by_position(conv: TracedConv) -> str | None:
    """Levels suit a layer whose reader mixes its channels: where a channel has a meaning, all need the same context."""
    readers = {call.reader for call in conv.calls}
    return next((reader.value for reader in (Reader.NOBODY, Reader.POSITION) if reader in readers), None)


def padded_outside(conv: TracedConv) -> str | None:
    """Larger dilations would need more of the padding that another layer supplies."""
    modes = [call.padded_by for call in conv.calls if call.padded_by]
    return f"{modes[0].lower()} padding by another layer is too narrow for larger dilations" if modes else None


OBSTACLES = (other_operation, subclass, replaced_forward, dilatable_kernel, weight_read_elsewhere, never_called)
CHOICES = (other_kernel, read_by_position, padded_outside)


def obstacle(conv: TracedConv) -> str | None:
    """Why a convolution cannot be split, or None."""
    return next((reason for rule in OBSTACLES if (reason := rule(conv))), None)


def reason_to_leave(conv: TracedConv) -> str | None:
    """Why a convolution should not be split, or None."""
    return next((reason for rule in CHOICES if (reason := rule(conv))), None)
