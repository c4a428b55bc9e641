"""Why a convolution is left alone: a key for code to ask for, and a text for a reader."""

import enum
from typing import NamedTuple


class Reason(enum.Enum):
    """Why a convolution is left alone. The value is the text, with braces around what differs."""

    NOT_CONV2D = "{kind} is not an nn.Conv2d"
    UNKNOWN_FORWARD = "{kind} has a forward of its own that register_coconv() does not know"
    REPLACED_FORWARD = "its forward was replaced on the instance"
    HIDDEN_ATTRIBUTES = "a contextual convolution would hide its own {names}"
    UNKNOWN_WEIGHT = "its weight is computed, and its shape is not known"
    PART_OF_WEIGHT = "its weight is not one whole parameter"
    ADAPTED = "it is within an adapter, whose other parts are plain"
    KERNEL = "kernel {height}×{width}"
    WEIGHT_READ = "its weight is also used outside its own forward"
    FIXED_LEVELS = "{why}"
    NOT_CALLED = "did not run in evaluation mode"
    WEIGHT_FROM_INPUT = "its weight is an input of its graph, or computed from one"
    WEIGHT_NOT_LEARNED = "its weight is not a parameter"
    PREDICTION = "prediction layer: no learned layer makes features of its output"
    READ_BY_POSITION = "its output is read by position, as the offsets, mask or kernel of another operation"
    SIDE_OUTPUT = "prediction layer: the network gives out what it computes, besides reading it"
    LEVEL = "it is a level already: convolutions of the same input with other dilations are concatenated with it"
    DATAFLOW_UNKNOWN = "what reads its output is not known: the network hides it, in inference mode or another thread"
    CAUSAL = "all its padding is on one side: it does not see what comes later, and larger dilations would"
    PADDED_OUTSIDE = "{mode} padding by another layer is too narrow for larger dilations"
    ONE_LEVEL = "one level: the conv itself"
    EXCLUDED = "excluded"
    NOT_INCLUDED = "not included"
    PLAIN = "a plain conv"

    def because(self, **details: object) -> "Why":
        """The reason for one convolution.

        Args:
            **details: What the text has in braces.

        >>> Reason.KERNEL.because(height=1, width=1).text
        'kernel 1×1'
        """
        return Why(self, self.value.format(**details))


class Why(NamedTuple):
    """Why one convolution is left alone.

    Attributes:
        reason: The key.
        text: The same in words.
    """

    reason: Reason
    text: str
