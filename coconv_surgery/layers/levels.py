"""The levels of a contextual convolution: their dilations, their channels, and whether a convolution can take them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch.nn as nn

from coconv_surgery.layers.arguments import choice, height_and_width, whole_number
from coconv_surgery.layers.functional import Dilation, check_padding, one_per_level, pair

SplitRule = Literal["pow2", "even"]
# cuDNN takes a dilation as a 32-bit integer.
_LARGEST_DILATION = 2**31 - 1


class Levels(NamedTuple):
    """The levels of one convolution.

    Attributes:
        dilations: Dilation of each level, as it is computed (the convolution's own dilation included).
        splits: Output channels of each level, or the rule that shares them out.
    """

    dilations: tuple[Dilation, ...]
    splits: tuple[int, ...] | SplitRule = "pow2"


def split_channels(channels: int, levels: int, rule: SplitRule = "pow2") -> tuple[int, ...]:
    """Share output channels out over levels.

    Args:
        channels: Number of output channels.
        levels: Number of levels, at most ``channels``.
        rule: ``"pow2"`` (Table 1, and the authors' code) works in units of ``channels / P``, with P the next power of
            two ≥ ``levels``; the units left over go one each to the first levels. ``"even"`` (Table 2) shares evenly.

    Returns:
        One count for each level, at least 1. They always sum up to ``channels``: what does not divide goes to the
        first level.

    Raises:
        ValueError: If the rule is unknown or there are more levels than channels.

    >>> split_channels(128, 3)
    (64, 32, 32)
    >>> split_channels(512, 3, "even")
    (172, 170, 170)
    """
    choice(rule, "rule", get_args(SplitRule))
    channels, levels = whole_number(channels, "channels"), whole_number(levels, "levels")
    if not 1 <= levels <= channels:
        raise ValueError(f"cannot split {channels} channels over {levels} levels: every level needs at least one")
    if rule == "even":
        shares = [channels // levels] * levels
    else:
        units = 1 << (levels - 1).bit_length()
        spare = units - levels
        shares = [max(1, channels * (2 if level < spare else 1) // units) for level in range(levels)]
    shares[0] += channels - sum(shares)
    return tuple(shares)


def complete_levels(
    conv: nn.Conv2d,
    levels: int | None = None,
    dilations: Sequence[Dilation] | None = None,
    splits: Sequence[int] | SplitRule = "pow2",
) -> Levels:
    """Fill in what the caller left out, and check that a convolution can take the result.

    Args:
        conv: The convolution to be split.
        levels: Number of levels; level k then has k times the convolution's own dilation.
        dilations: Dilation of each level, instead of ``levels``.
        splits: Output channels of each level, or the name of a split rule.

    Returns:
        Dilations and channels in numbers, one each for every level.

    Raises:
        ValueError: If the convolution cannot be split this way, or a value is not a number of the kind it should be.
    """
    if (levels is None) == (dilations is None):
        raise ValueError("give either levels= (a number) or dilations= (one for each level)")
    units, size = level_units(conv)
    if dilations is None:
        count = whole_number(levels, "levels", at_least=1)
        _check_count(conv, count)
        dilations = scale_dilations(conv.dilation, range(1, count + 1))
    chosen = one_per_level(dilations, "dilations")
    if isinstance(splits, str):
        choice(splits, "splits", get_args(SplitRule))
        _check_count(conv, len(chosen))
        splits = [share * size for share in split_channels(units, max(1, len(chosen)), splits)]
    return check_levels(conv, chosen, splits)


def check_levels(conv: nn.Conv2d, dilations: Sequence[Dilation], splits: Sequence[int]) -> Levels:
    """Check that a convolution can be split into these levels.

    Args:
        conv: The convolution.
        dilations: Dilation of each level: a whole number, or one for each axis.
        splits: Output channels of each level.

    Returns:
        The same levels in Python's own integers; a dilation that is the same along both axes is one number.

    Raises:
        ValueError: With the reason, if it cannot.
    """
    chosen = level_dilations(dilations)
    shares = tuple(whole_number(value, "splits") for value in one_per_level(splits, "splits"))
    kernel, base = pair(conv.kernel_size), pair(conv.dilation)
    if not chosen or len(chosen) != len(shares):
        raise ValueError(f"dilations {chosen} and splits {shares} must have one entry for each level")
    if any(channels < 1 for channels in shares) or sum(shares) != conv.out_channels:
        raise ValueError(f"splits {shares} must be positive and sum up to the {conv.out_channels} out_channels")
    _, unit = level_units(conv)
    if any(channels % unit for channels in shares):
        raise ValueError(
            f"splits {shares} cut through a group: with groups={conv.groups} every level must be a multiple of "
            f"{unit} channels, so that each weight row keeps its input channels"
        )
    sides = [side for dilation in chosen for side in pair(dilation)]
    if min(sides) < 1 or max(sides) > _LARGEST_DILATION:
        raise ValueError(f"dilations {chosen} must be at least 1 and below 2³¹")
    if not is_plain(conv, chosen):
        _check_kernel(kernel)
        for dilation in chosen:
            check_padding(kernel, conv.padding, base, pair(dilation))
    return Levels(chosen, shares)


def level_dilations(values: Any) -> tuple[Dilation, ...]:
    """Dilations in Python's own integers, one for each level, a pair where the axes differ.

    Raises:
        ValueError: If it is not a sequence of whole numbers or pairs of them.
    """
    return tuple(squeeze(height_and_width(value, "dilations")) for value in one_per_level(values, "dilations"))


def is_plain(conv: nn.Conv2d, dilations: Sequence[Dilation]) -> bool:
    """Whether these levels are the convolution itself: one level, at its own dilation."""
    return [pair(dilation) for dilation in dilations] == [pair(conv.dilation)]


def level_units(conv: nn.Conv2d) -> tuple[int, int]:
    """How finely a convolution's outputs can be split: the number of units, and the channels in each.

    A unit is one output channel, or one whole group where the convolution is grouped.
    """
    return (conv.out_channels, 1) if conv.groups == 1 else (conv.groups, conv.out_channels // conv.groups)


def scale_dilations(dilation: int | Sequence[int], factors: Iterable[int]) -> tuple[Dilation, ...]:
    """Multiples of a convolution's own dilation.

    >>> scale_dilations((2, 2), (1, 2, 3))
    (2, 4, 6)
    """
    height, width = pair(dilation)
    return tuple(squeeze((factor * height, factor * width)) for factor in factors)


def _check_count(conv: nn.Conv2d, count: int) -> None:
    units, _ = level_units(conv)
    if count > units:
        kind = "groups" if conv.groups > 1 else "out_channels"
        raise ValueError(f"{count} levels need at least as many {kind}, and this conv has {units}")


def _check_kernel(kernel: tuple[int, int]) -> None:
    if kernel == (1, 1):
        raise ValueError("a 1×1 kernel has no dilation: it cannot take several levels")
    if any(side % 2 == 0 for side in kernel):
        raise ValueError(f"kernel_size {kernel} is even: no symmetric padding keeps the output size at other dilations")


def squeeze(dilation: tuple[int, int]) -> Dilation:
    """A dilation that is the same along both axes as one number.

    >>> squeeze((2, 2)), squeeze((2, 1))
    (2, (2, 1))
    """
    height, width = dilation
    return height if height == width else (height, width)
