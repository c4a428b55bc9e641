"""Do levels suit the size of a map?"""

from collections.abc import Collection

from coconv_surgery.layers.arguments import Pair
from coconv_surgery.layers.functional import level_padding, pair
from coconv_surgery.layers.levels import Levels
from coconv_surgery.tracing.signature import Signature


def check_maps(signature: Signature, levels: Levels, input_sizes: Collection[Pair]) -> None:
    """Check that every level sees something of the maps that a convolution runs on, and can be padded there.

    A level whose dilation is as large as the map sees the centre of its kernel alone, and padding around it. Of a
    convolution that runs on several maps, the largest counts; padding by reflection or wrapping must fit all of them.

    Args:
        signature: The plain convolution.
        levels: Its levels.
        input_sizes: Heights and widths of its inputs.

    Raises:
        ValueError: If one does not.
    """
    if not input_sizes:
        return
    for dilation in levels.dilations:
        for axis in (0, 1):
            sides = [size[axis] for size in input_sizes]
            largest = max(1, signature.dilation[axis], max(sides) - 1)
            if pair(dilation)[axis] > largest and signature.kernel_size[axis] > 1:
                raise ValueError(f"dilation {dilation} is too large for a side of {max(sides)}: it sees padding alone")
            widest = {"reflect": min(sides) - 1, "circular": min(sides)}.get(signature.padding_mode)
            padding = level_padding(signature.kernel_size, signature.padding, signature.dilation, pair(dilation))[axis]
            if widest is not None and padding > widest:
                raise ValueError(
                    f"{signature.padding_mode} padding of {padding} at dilation {dilation} needs more than a side of "
                    f"{min(sides)}"
                )


def largest_input(signature: Signature, output_size: Pair) -> Pair:
    """The largest input that gives an output of some size, padding left aside: an upper bound to check by."""
    height, width = (
        side * stride + dilation * (kernel - 1)
        for side, stride, dilation, kernel in zip(
            output_size, signature.stride, signature.dilation, signature.kernel_size, strict=True
        )
    )
    return height, width
