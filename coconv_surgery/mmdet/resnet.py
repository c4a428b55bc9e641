"""CoResNet and CoResNeXt: the paper's backbones (Table 1) as backbones of MMDetection."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.models.backbones.resnet import Bottleneck

from coconv_surgery.layers.arguments import flag
from coconv_surgery.zoo.stages import TABLE_1, AuthorsCheckpoints, NormAfterAdd, set_levels


class NormAfterAddBottleneck(NormAfterAdd, Bottleneck):  # type: ignore[misc]
    """mmdet's form of :class:`~coconv_surgery.zoo.stages.NormAfterAdd`."""

    @classmethod
    def replace(cls, block: Any) -> None:
        """Make a block one of this kind, in place.

        Raises:
            ValueError: If the block is of another kind.
        """
        super().replace(block)
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


class _Contextual(AuthorsCheckpoints):
    """What CoResNet and CoResNeXt add to mmdet's classes."""

    res_layers: list[str]

    def __init__(self, *args: Any, levels: Sequence[int] | None = None, norm_after_add: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        stages: list[nn.Sequential] = [getattr(self, name) for name in self.res_layers]
        self.levels = set_levels(stages, TABLE_1[: len(stages)] if levels is None else levels)
        self.norm_after_add = flag(norm_after_add, "norm_after_add")
        if norm_after_add:
            for stage in stages:
                NormAfterAddBottleneck.replace(stage[-1])


class CoResNet(_Contextual, ResNet):  # type: ignore[misc]
    """mmdet's ResNet with contextual 3×3 convolutions (Table 1).

    In every block of a stage the 3×3 convolution (both of them at depths 18 and 34) gets the stage's levels, at
    dilations 1, 2, …; the stem, the shortcuts and plugins stay as they are. Parameters, their names and FLOPs are
    ResNet's, so that ``torchvision://`` and mmdet checkpoints load unchanged. Those of the CoConv authors, which hold a
    weight for each level, load too.

    Args:
        *args: As in mmdet's ResNet.
        levels: Levels of each stage, one entry for each of ``num_stages``. Default: the first of (4, 3, 2, 1).
        norm_after_add: Whether the last block of every stage adds the shortcut first and normalises after, as in the
            authors' released networks and unlike the paper's Table 1. Their checkpoints need it.
        **kwargs: As in mmdet's ResNet.

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
        *args: As in mmdet's ResNeXt.
        levels: As in :class:`CoResNet`.
        norm_after_add: As in :class:`CoResNet`.
        **kwargs: As in mmdet's ResNeXt.

    Raises:
        ValueError: As in :class:`CoResNet`.

    >>> backbone = CoResNeXt(depth=50, groups=32, base_width=4)
    >>> backbone.layer1[0].conv2.splits
    (32, 32, 32, 32)
    """
