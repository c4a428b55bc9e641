"""May this convolution be split? If not, one reason.

A reason in :data:`OBSTACLES` stands: the convolution cannot become a CoConv. One in :data:`CHOICES` is good practice,
which an override may overrule.
"""

import torch.nn as nn

from coconv_surgery.layers.switch import hidden_attributes, is_switchable
from coconv_surgery.planning.reasons import Reason, Why
from coconv_surgery.tracing.graph_weights import WeightSource
from coconv_surgery.tracing.readers import Reader
from coconv_surgery.tracing.sites import Site
from coconv_surgery.tracing.trace import TracedConv


def other_operation(site: Site) -> Why | None:
    """Deformable, transposed, conditional or quantised convolutions compute something else."""
    return None if isinstance(site.conv, nn.Conv2d) else Reason.NOT_CONV2D.because(kind=_kind(site))


def subclass(site: Site) -> Why | None:
    """A subclass may do more than convolve, and a change of class would drop that."""
    return None if is_switchable(site.conv) else Reason.UNKNOWN_FORWARD.because(kind=_kind(site))


def _kind(site: Site) -> str:
    cls = type(site.conv)
    return cls.__name__ if cls.__name__ != nn.Conv2d.__name__ else f"{cls.__module__}.{cls.__name__}"


def replaced_forward(site: Site) -> Why | None:
    """A forward set on the instance would go on being called instead of the class's."""
    replaced = {"forward", "_conv_forward"} & set(vars(site.conv))
    return Reason.REPLACED_FORWARD.because() if replaced else None


def own_attributes(site: Site) -> Why | None:
    """Attributes that a contextual convolution has as well would be hidden from those who read them."""
    names = hidden_attributes(site.conv)
    return Reason.HIDDEN_ATTRIBUTES.because(names=", ".join(names)) if names else None


def adapted(site: Site) -> Why | None:
    """An adapter adds a product of plain convolutions to a weight, or keeps the original of a copy that runs."""
    return Reason.ADAPTED.because() if site.adapted else None


def computed_weight(site: Site) -> Why | None:
    """A weight that cannot be told channel by channel cannot be split by channels."""
    if site.weight_source is WeightSource.PART:
        return Reason.PART_OF_WEIGHT.because()
    unknown = site.weight_source is WeightSource.UNKNOWN or site.conv.kernel_size == (0, 0)
    return Reason.UNKNOWN_WEIGHT.because() if unknown else None


def dilatable_kernel(site: Site) -> Why | None:
    """A kernel of even size has no symmetric padding, and one of size 1 no dilation."""
    height, width = site.conv.kernel_size
    dilatable = height % 2 and width % 2 and (height, width) != (1, 1)
    return None if dilatable else Reason.KERNEL.because(height=height, width=width)


def fixed_levels(site: Site) -> Why | None:
    """What an export has written out cannot always be written in another way."""
    return Reason.FIXED_LEVELS.because(why=site.fixed) if site.fixed else None


def weight_read_elsewhere(conv: TracedConv) -> Why | None:
    """Code that takes the weight and convolves by itself would not see the levels."""
    return Reason.WEIGHT_READ.because() if conv.weight_read else None


def never_called(conv: TracedConv) -> Why | None:
    """Without a call there is no map size to decide on."""
    return None if conv.calls else Reason.NOT_CALLED.because()


def other_kernel(conv: TracedConv) -> Why | None:
    """CoConv replaces 3×3 convolutions (Section 3)."""
    height, width = conv.conv.kernel_size
    return None if (height, width) == (3, 3) else Reason.KERNEL.because(height=height, width=width)


def not_learned(conv: TracedConv) -> Why | None:
    """A filter that is not a parameter, or is made for each input, has a purpose of its own."""
    if conv.site.weight_source is WeightSource.INPUT:
        return Reason.WEIGHT_FROM_INPUT.because()
    return Reason.WEIGHT_NOT_LEARNED.because() if conv.site.weight_source is WeightSource.FIXED else None


def read_by_position(conv: TracedConv) -> Why | None:
    """Levels suit a layer whose reader mixes its channels: where a channel has a meaning, all need the same context."""
    readers = {call.reader for call in conv.calls}
    return next((reason.because() for reader, reason in _MEANINGS.items() if reader in readers), None)


_MEANINGS = {
    Reader.NOBODY: Reason.PREDICTION,
    Reader.SIDE_OUTPUT: Reason.SIDE_OUTPUT,
    Reader.POSITION: Reason.READ_BY_POSITION,
    Reader.LEVELS: Reason.LEVEL,
    Reader.UNKNOWN: Reason.DATAFLOW_UNKNOWN,
}


def padded_outside(conv: TracedConv) -> Why | None:
    """Larger dilations would need more of the padding that another layer supplies."""
    mode = next((call.padded_by for call in conv.calls if call.padded_by), None)
    return Reason.PADDED_OUTSIDE.because(mode=mode) if mode else None


def causal(conv: TracedConv) -> Why | None:
    """All of an axis's padding on one side keeps what comes later out; the padding of levels would let it in."""
    return Reason.CAUSAL.because() if any(call.one_sided for call in conv.calls) else None


# What a site itself tells, with or without a trace.
SITE_OBSTACLES = (
    other_operation,
    subclass,
    replaced_forward,
    own_attributes,
    adapted,
    computed_weight,
    dilatable_kernel,
    fixed_levels,
)
OBSTACLES = (weight_read_elsewhere, never_called)
CHOICES = (other_kernel, not_learned, read_by_position, causal, padded_outside)


def site_obstacle(site: Site) -> Why | None:
    """Why a site cannot be split, as far as it tells itself, or None."""
    return next((why for rule in SITE_OBSTACLES if (why := rule(site))), None)


def obstacle(conv: TracedConv) -> Why | None:
    """Why a convolution cannot be split, or None."""
    return site_obstacle(conv.site) or next((why for rule in OBSTACLES if (why := rule(conv))), None)


def reason_to_leave(conv: TracedConv) -> Why | None:
    """Why a convolution should not be split, or None."""
    return next((why for rule in CHOICES if (why := rule(conv))), None)
