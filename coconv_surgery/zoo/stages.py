"""What the CoResNets of timm and of MMDetection share: their stages' levels, and the authors' form and checkpoints."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch.nn as nn

from coconv_surgery.layers.arguments import whole_numbers
from coconv_surgery.layers.levels import is_plain, scale_dilations
from coconv_surgery.layers.switch import to_coconv_
from coconv_surgery.zoo.authors import check_groups, merge_levels, warn_of_norm_order

TABLE_1 = (4, 3, 2, 1)

BaseDilation = Literal["multiply", "ignore"]


def set_levels(
    stages: Sequence[Iterable[nn.Module]], levels: Sequence[int], base_dilation: BaseDilation = "multiply"
) -> tuple[int, ...]:
    """Split the 3×3 convolutions of the blocks, ``conv1`` and ``conv2``, in place.

    Args:
        stages: The blocks of each stage.
        levels: Levels of each stage.
        base_dilation: Whether a level multiplies a convolution's own dilation, or ignores it.

    Returns:
        The levels, in Python's own integers.

    Raises:
        ValueError: If there is not one number for each stage, or a stage cannot take its number.
    """
    form = f"must be {len(stages)} numbers of at least 1, one for each stage"
    counts = whole_numbers(levels, "levels", form, lengths=[len(stages)])
    for number, (stage, count) in enumerate(zip(stages, counts, strict=True), start=1):
        for block in stage:
            try:
                _split_block(block, range(1, count + 1), base_dilation)
            except ValueError as error:
                raise ValueError(f"levels={counts}: stage {number} cannot have {count} levels: {error}") from error
    return counts


def _split_block(block: nn.Module, factors: Sequence[int], base_dilation: BaseDilation) -> None:
    for name in ("conv1", "conv2"):
        conv: Any = getattr(block, name)
        dilations = scale_dilations(conv.dilation, factors) if base_dilation == "multiply" else tuple(factors)
        if conv.kernel_size != (3, 3) or is_plain(conv, dilations):
            continue
        if type(conv) is not nn.Conv2d:
            raise ValueError(f"{name} is a {type(conv).__name__}, which cannot be split here: give the stage one level")
        to_coconv_(conv, dilations)


class NormAfterAdd:
    """A bottleneck block that adds first and normalises after, as the authors' code does at the end of every stage.

    A subclass derives from this class and from the block that it replaces, in this order.
    """

    @classmethod
    def replace(cls, block: nn.Module) -> None:
        """Make a block one of this kind, in place.

        Raises:
            ValueError: If the block is of another kind.
        """
        if not isinstance(block, cls.__bases__):
            raise ValueError(
                f"norm_after_add is for bottleneck blocks, not a {type(block).__name__}: take a network of 50, 101 or "
                "152 layers"
            )
        block.__class__ = cls  # type: ignore[assignment]


class AuthorsCheckpoints(nn.Module):
    """Loads checkpoints of the CoConv authors as well as its own."""

    # All ways of loading call this method: load_state_dict(), timm's and mmengine's loaders. mmengine's calls no hooks.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if splits := merge_levels(state_dict, prefix):
            check_groups(self, splits, prefix)
            warn_of_norm_order(self)
        super()._load_from_state_dict(state_dict, prefix, *args)
