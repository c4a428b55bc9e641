"""CoResNet and CoResNeXt: the paper's backbones (Table 1) as backbones of MMDetection."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck

from coconv_surgery.layers.levels import complete_levels
from coconv_surgery.layers.switch import to_coconv_
from coconv_surgery.zoo.authors import merge_levels
from coconv_surgery.zoo.coresnet import TABLE_1


class NormAfterAddBottleneck(Bottleneck):  # type: ignore[misc]
    """A bottleneck block that adds first and normalises after, as the authors' code does at the end of every stage."""

    @classmethod
    def replace(cls, block: Bottleneck) -> None:
        """Make a block one of this kind, in place."""
        block.__class__ = cls
        # mmdet starts a block's last norm at zero, so that the block starts as the identity; here all would be zero.
        block.init_cfg = None
        # mmcv fuses a norm into the conv that is registered before it, which this one does not follow.
        for name in [name for name in block._modules if name != block.norm3_name]:
            block._modules[name] = block._modules.pop(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block: ``(N, inplanes, H, W)`` to ``(N, 4 · planes, H / stride, W / stride)``."""
        if self.with_cp and x.requires_grad:
            output: torch.Tensor = torch.utils.checkpoint.checkpoint(self._block, x, use_reentrant=False)
        else:
            output = self._block(x)
        return output

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        if self.with_plugins:
            out = self.forward_plugin(out, self.after_conv1_plugin_names)
        out = self.relu(self.norm2(self.conv2(out)))
        if self.with_plugins:
            out = self.forward_plugin(out, self.after_conv2_plugin_names)
        out = self.conv3(out)
        if self.with_plugins:
            out = self.forward_plugin(out, self.after_conv3_plugin_names)
        out = out + (x if self.downsample is None else self.downsample(x))
        result: torch.Tensor = self.relu(self.norm3(out))
        return result


class _Contextual:
    """What CoResNet and CoResNeXt add to mmdet's classes."""

    def __init__(self, *args: Any, levels: Sequence[int] | None = None, norm_after_add: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.levels = _stage_levels(levels, len(self.res_layers))  # type: ignore[attr-defined]
        self.norm_after_add = norm_after_add
        for stage, (name, count) in enumerate(zip(self.res_layers, self.levels, strict=True), start=1):  # type: ignore[attr-defined]
            blocks = getattr(self, name)
            if count > 1:
                for block in blocks:
                    _convert_block(block, count, stage)
            if norm_after_add:
                if not isinstance(blocks[-1], Bottleneck):
                    raise ValueError("norm_after_add is for bottleneck blocks: give a depth of 50, 101 or 152")
                NormAfterAddBottleneck.replace(blocks[-1])

    # mmengine's loader calls this method of every module, but no pre-hooks.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if merge_levels(state_dict, prefix) and not self.norm_after_add:
            warnings.warn(
                "the checkpoint has the layout of the CoConv authors' release, whose CoResNet normalises after the "
                "addition at the end of every stage: build this one with norm_after_add=True, or outputs will differ",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class CoResNet(_Contextual, ResNet):  # type: ignore[misc]
    """mmdet's ResNet with contextual 3×3 convolutions (Table 1).

    In every block of a stage the 3×3 convolution (both of them at depths 18 and 34) gets the stage's levels, at
    dilations 1, 2, …; the stem, the shortcuts and plugins stay as they are. Parameters, their names and FLOPs are
    ResNet's, so that ``torchvision://`` and mmdet checkpoints load unchanged. Those of the CoConv authors, which hold a
    weight for each level, load too.

    Args:
        *args: As of mmdet's ResNet.
        levels: Levels of each stage, one entry for each of ``num_stages``. Default: the first of (4, 3, 2, 1).
        norm_after_add: Whether the last block of every stage adds the shortcut first and normalises after, as in the
            authors' released networks and unlike the paper's Table 1. Their checkpoints need it.
        **kwargs: As of mmdet's ResNet.

    Raises:
        ValueError: If ``levels`` has the wrong length or an entry that a stage's convolutions cannot take.

    >>> backbone = CoResNet(depth=50)
    >>> backbone.layer1[0].conv2
    CoConv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, \
dilations=(1, 2, 3, 4), splits=(16, 16, 16, 16))
    """


class CoResNeXt(_Contextual, ResNeXt):  # type: ignore[misc]
    """mmdet's ResNeXt with contextual 3×3 convolutions; see :class:`CoResNet`. A level holds whole groups.

    Args:
        *args: As of mmdet's ResNeXt.
        levels: As in :class:`CoResNet`.
        norm_after_add: As in :class:`CoResNet`.
        **kwargs: As of mmdet's ResNeXt.

    Raises:
        ValueError: As in :class:`CoResNet`.

    >>> backbone = CoResNeXt(depth=50, groups=32, base_width=4)
    >>> backbone.layer1[0].conv2.splits
    (32, 32, 32, 32)
    """


def _stage_levels(levels: Sequence[int] | None, stages: int) -> tuple[int, ...]:
    if levels is None:
        return TABLE_1[:stages]
    valid = isinstance(levels, Sequence) and len(levels) == stages
    if not valid or not all(isinstance(count, int) and count >= 1 for count in levels):
        raise ValueError(
            f"levels={levels!r} must be {stages} numbers of at least 1, one for each stage (num_stages={stages})"
        )
    return tuple(levels)


def _convert_block(block: nn.Module, levels: int, stage: int) -> None:
    for name in ("conv1", "conv2") if isinstance(block, BasicBlock) else ("conv2",):
        conv = getattr(block, name)
        try:
            if type(conv) is not nn.Conv2d:
                raise ValueError(f"{name} is a {type(conv).__name__}; only plain convolutions can be split")
            to_coconv_(conv, *complete_levels(conv, levels))
        except ValueError as error:
            raise ValueError(
                f"stage {stage} cannot have {levels} levels ({error}): give it one level, or change the backbone"
            ) from error
