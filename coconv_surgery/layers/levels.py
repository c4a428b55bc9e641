"""The levels of a contextual convolution: their dilations, their channels, and whether a convolution can take them."""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch.nn as nn

from coconv_surgery.layers.functional import Dilation, level_padding, pair

SplitRule = Literal["pow2", "even"]


def split_channels(channels: int, levels: int, rule: SplitRule = "pow2") -> tuple[int, ...]:
    """Share output channels out over levels.

    Args:
        channels: Number of output channels.
        levels: Number of levels, at most ``channels``.
        rule: ``"pow2"`` (Table 1, and the authors' code) works in units of ``channels / P``, with P the next power of
            two ≥ ``levels``; the units left over go one each to the first levels. ``"even"`` (Table 2) shares evenly.

    Returns:
        One count a level, each at least 1. They always sum up to ``channels``: what does not divide goes to the
        first level.

    Raises:
        ValueError: If the rule is unknown or there are more levels than channels.

    >>> split_channels(128, 3)
    (64, 32, 32)
    >>> split_channels(512, 3, "even")
    (172, 170, 170)
    """
    if rule not in get_args(SplitRule):
        raise ValueError(f"unknown split rule {rule!r}: choose one of {', '.join(map(repr, get_args(SplitRule)))}")
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


def check_levels(conv: nn.Conv2d, dilations: Sequence[Dilation], splits: Sequence[int]) -> None:
    """Check that a convolution can be split into these levels.

    Raises:
        ValueError: With the reason, if it cannot.
    """
    kernel, base = pair(conv.kernel_size), pair(conv.dilation)
    if not dilations or len(dilations) != len(splits):
        raise ValueError(f"dilations {tuple(dilations)} and splits {tuple(splits)} must have one entry for each level")
    if any(channels < 1 for channels in splits) or sum(splits) != conv.out_channels:
        raise ValueError(f"splits {tuple(splits)} must be positive and sum up to the {conv.out_channels} out_channels")
    _, unit = level_units(conv)
    if any(channels % unit for channels in splits):
        raise ValueError(
            f"splits {tuple(splits)} cut through a group: with groups={conv.groups} every level must be a multiple of "
            f"{unit} channels, so that each weight row keeps its input channels"
        )
    if any(min(pair(dilation)) < 1 for dilation in dilations):
        raise ValueError(f"dilations {tuple(dilations)} must be at least 1")
    if is_plain(conv, dilations):
        return
    if kernel == (1, 1):
        raise ValueError("a 1×1 kernel has no dilation: it cannot take several levels")
    if any(side % 2 == 0 for side in kernel):
        raise ValueError(f"kernel_size {kernel} is even: no symmetric padding keeps the output size at other dilations")
    for dilation in dilations:
        if min(level_padding(kernel, conv.padding, base, pair(dilation))) < 0:
            raise ValueError(
                f"dilation {dilation} with padding {conv.padding} would need negative padding to keep the output size: "
                f"use dilations of at least the conv's own, {conv.dilation}"
            )


def is_plain(conv: nn.Conv2d, dilations: Sequence[Dilation]) -> bool:
    """Whether these levels are the convolution itself: one level, at its own dilation."""
    return [pair(dilation) for dilation in dilations] == [pair(conv.dilation)]


def level_units(conv: nn.Conv2d) -> tuple[int, int]:
    """How finely a convolution's outputs can be split: the number of units, and the channels in each.

    A unit is one output channel, or one whole group where the convolution is grouped.
    """
    return (conv.out_channels, 1) if conv.groups == 1 else (conv.groups, conv.out_channels // conv.groups)


def complete_levels(
    conv: nn.Conv2d,
    levels: int | None = None,
    dilations: Sequence[Dilation] | None = None,
    splits: Sequence[int] | SplitRule = "pow2",
) -> tuple[tuple[Dilation, ...], tuple[int, ...]]:
    """Fill in what the caller left out: the dilations and splits of every level.

    Args:
        conv: The convolution to be split.
        levels: Number of levels; level k then has k times the convolution's own dilation.
        dilations: Dilation of each level, instead of ``levels``.
        splits: Output channels of each level, or the name of a split rule.

    Raises:
        ValueError: If the convolution cannot be split this way.
    """
    if (levels is None) == (dilations is None):
        raise ValueError("give either levels= (a number) or dilations= (one for each level)")
    if dilations is None:
        assert levels is not None
        if levels < 1:
            raise ValueError(f"levels={levels} must be at least 1")
        dilations = scale_dilations(conv.dilation, range(1, levels + 1))
    chosen = tuple(_squeeze(dilation) for dilation in dilations)
    if isinstance(splits, str):
        units, size = level_units(conv)
        if len(chosen) > units:
            kind = "groups" if conv.groups > 1 else "out_channels"
            raise ValueError(f"{len(chosen)} levels need at least as many {kind}, and this conv has {units}")
        splits = [share * size for share in split_channels(units, max(1, len(chosen)), splits)]
    check_levels(conv, chosen, splits)
    return chosen, tuple(splits)


def scale_dilations(dilation: int | Sequence[int], factors: Iterable[int]) -> tuple[Dilation, ...]:
    """Multiples of a convolution's own dilation.

    >>> scale_dilations((2, 2), (1, 2, 3))
    (2, 4, 6)
    """
    height, width = pair(dilation)
    return tuple(_squeeze((factor * height, factor * width)) for factor in factors)


def _squeeze(dilation: Dilation) -> Dilation:
    height, width = pair(dilation)
    return height if height == width else (height, width)
