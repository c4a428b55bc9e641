"""CoResNet, CoResNeXt and their SE variants: the paper's classifiers (Table 1) as timm networks.

They are timm's ResNets, converted as they are built::

    timm.create_model("coresnet50", pretrained=True, num_classes=10)
    timm.create_model("coresnet50", features_only=True, output_stride=8)
    timm.create_model("coresnet50", levels=(2, 2, 2, 1))
    timm.create_model("coresnet50.iduta")

Nobody has published CoResNet weights for timm. ``pretrained=True`` starts from timm's weights of the plain network,
which have the same names and shapes, to be fine-tuned; the tags are timm's, such as ``coresnet50.tv_in1k``. The tag
``iduta`` is the form that the authors trained and released, see ``norm_after_add``.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, get_args

import timm.models.resnet
import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from coconv_surgery.layers.arguments import choice, flag, whole_number
from coconv_surgery.planning.notes import note_plan
from coconv_surgery.planning.policies import Policy
from coconv_surgery.surgery import apply_plan, get_plan, plan_conversion
from coconv_surgery.zoo.stages import TABLE_1, AuthorsCheckpoints, BaseDilation, NormAfterAdd, set_levels

__all__ = ["CoResNet", "NormAfterAddBottleneck"]  # timm adds the names of the networks

# The blocks of each depth, and how many there are in each stage.
_DEPTHS: dict[int, dict[str, Any]] = {
    18: {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    26: {"block": Bottleneck, "layers": (2, 2, 2, 2)},
    34: {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    50: {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    101: {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    152: {"block": Bottleneck, "layers": (3, 8, 36, 3)},
}
_32X4D: dict[str, Any] = {"cardinality": 32, "base_width": 4}
_32X8D: dict[str, Any] = {"cardinality": 32, "base_width": 8}
_SE: dict[str, Any] = {"block_args": {"attn_layer": "se"}}


class NormAfterAddBottleneck(NormAfterAdd, Bottleneck):  # type: ignore[misc]
    """timm's form of :class:`~coconv_surgery.zoo.stages.NormAfterAdd`."""

    @classmethod
    def replace(cls, block: Any) -> None:
        """Make a block one of this kind, in place.

        Raises:
            ValueError: If the block is of another kind.
        """
        super().replace(block)
        nn.init.ones_(block.bn3.weight)  # which timm starts at zero

    def zero_init_last(self) -> None:
        """Leave the last norm as it is: it normalises the shortcut too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block: ``(N, inplanes, H, W)`` to ``(N, 4 · planes, H / stride, W / stride)``."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(out)))))
        out = self.conv3(out)
        if self.se is not None:
            out = self.se(out)
        if self.drop_path is not None:
            out = self.drop_path(out)
        out = out + (x if self.downsample is None else self.downsample(x))
        result: torch.Tensor = self.act3(self.bn3(out))
        return result


class CoResNet(AuthorsCheckpoints, ResNet):  # type: ignore[misc]
    """timm's ResNet with contextual 3×3 convolutions in its blocks (Table 1); stem and shortcuts stay as they are.

    Parameters, their names and FLOPs are ResNet's, so that timm's and torchvision's checkpoints load unchanged. Those
    of the CoConv authors, which hold a weight for each level, load too.

    Args:
        *args: As in timm's ResNet.
        levels: Levels of each stage, at dilations 1, 2 and so on. Default: Table 1's (4, 3, 2, 1); (1, 1, 1, 1) is
            ResNet itself.
        policy: A policy or its name, instead of ``levels``; it decides on the stages' 3×3 convolutions.
        img_size: Side of the images that ``policy`` plans for.
        base_dilation: What happens to the dilation that timm gives the last stages at ``output_stride`` 16 and 8 to
            make up for the missing strides (2 and 4 in stages 3 and 4 at output stride 8). ``"multiply"``, the rule
            of all conversions here: level k has k times that dilation, so that it sees what it sees at stride 32.
            ``"ignore"``: level k has dilation k, as Table 1 writes it. The paper does not say which its CoResNet-50 at
            stride 8 (Table 4) is.
        norm_after_add: Whether the last block of every stage adds the shortcut first and normalises after, as in the
            authors' released networks and unlike the paper's Table 1. Default: only with the tag ``iduta``.
        **kwargs: As in timm's ResNet.

    Raises:
        ValueError: If ``levels`` has the wrong length or an entry that a stage cannot take, if it is given together
            with ``policy``, or if ``norm_after_add`` is given for blocks other than bottlenecks.

    >>> import timm
    >>> timm.create_model("coresnet50").layer2[0].conv2
    CoConv2d(128, 128, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False, \
dilations=(1, 2, 3), splits=(64, 32, 32))
    """

    def __init__(
        self,
        *args: Any,
        levels: Sequence[int] | None = None,
        policy: str | Policy | None = None,
        img_size: int = 224,
        base_dilation: BaseDilation = "multiply",
        norm_after_add: bool = False,
        **kwargs: Any,
    ) -> None:
        choice(base_dilation, "base_dilation", get_args(BaseDilation))
        if policy is not None and (levels is not None or base_dilation != "multiply"):
            raise ValueError("policy= decides on the dilations: leave out levels= and base_dilation=")
        super().__init__(*args, **kwargs)
        self.norm_after_add = flag(norm_after_add, "norm_after_add")
        stages: list[nn.Sequential] = [getattr(self, f"layer{number}") for number in range(1, 5)]
        if policy is None:
            set_levels(stages, TABLE_1 if levels is None else levels, base_dilation)
            with ExitStack() as undo:
                note_plan(self, get_plan(self), undo)
                undo.pop_all()
        else:
            side = whole_number(img_size, "img_size", at_least=1)
            stem = next(self.parameters())
            size = (stem.shape[1], side, side)
            plan = plan_conversion(self, policy, input_size=size, include=["layer?.*"])
            if plan.converted:
                apply_plan(self, plan)
        if norm_after_add:
            for stage in stages:
                NormAfterAddBottleneck.replace(stage[-1])


def _default_cfgs() -> dict[str, Any]:
    """The configurations of timm's plain networks, with their weights, and those of the authors' three."""
    cfgs = {}
    for name in (
        *("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d"),
        *("seresnet18", "seresnet34", "seresnet50", "seresnet101", "seresnet152"),
        *("seresnext50_32x4d", "seresnext101_32x8d"),
    ):
        plain = timm.models.resnet.default_cfgs[name]
        for tag in plain.tags:
            cfg = plain.cfgs[tag]
            # timm would complete its hub's name with the name of the network here.
            cfgs[f"co{name}.{tag}"] = replace(cfg, hf_hub_id=f"timm/{name}.{tag}") if cfg.hf_hub_id == "timm/" else cfg
        if name in ("resnet50", "resnet101", "resnet152"):
            origin = {"origin_url": "https://github.com/iduta/coconv", "license": None}
            cfgs[f"co{name}.iduta"] = replace(plain.cfgs["tv_in1k"], url=None, hf_hub_id=None, **origin)
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], *parts: dict[str, Any]) -> nn.Module:
    arguments = {name: value for part in (*parts, kwargs) for name, value in part.items()}
    arguments.setdefault("norm_after_add", _tag(arguments.get("pretrained_cfg")) == "iduta")
    model: nn.Module = build_model_with_cfg(CoResNet, variant, pretrained, **arguments)
    return model


def _tag(pretrained_cfg: Any) -> str | None:
    """The tag of what timm accepts as a configuration of weights: the tag itself, a dict, or timm's own class."""
    if isinstance(pretrained_cfg, str):
        return pretrained_cfg
    if isinstance(pretrained_cfg, Mapping):
        return pretrained_cfg.get("tag")
    return getattr(pretrained_cfg, "tag", None)


@register_model  # type: ignore[untyped-decorator]
def coresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNet-18."""
    return _create("coresnet18", pretrained, kwargs, _DEPTHS[18])


@register_model  # type: ignore[untyped-decorator]
def coresnet26(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNet-26."""
    return _create("coresnet26", pretrained, kwargs, _DEPTHS[26])


@register_model  # type: ignore[untyped-decorator]
def coresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNet-34."""
    return _create("coresnet34", pretrained, kwargs, _DEPTHS[34])


@register_model  # type: ignore[untyped-decorator]
def coresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNet-50."""
    return _create("coresnet50", pretrained, kwargs, _DEPTHS[50])


@register_model  # type: ignore[untyped-decorator]
def coresnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNet-101."""
    return _create("coresnet101", pretrained, kwargs, _DEPTHS[101])


@register_model  # type: ignore[untyped-decorator]
def coresnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNet-152."""
    return _create("coresnet152", pretrained, kwargs, _DEPTHS[152])


@register_model  # type: ignore[untyped-decorator]
def coresnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNeXt-50 (32×4d)."""
    return _create("coresnext50_32x4d", pretrained, kwargs, _DEPTHS[50], _32X4D)


@register_model  # type: ignore[untyped-decorator]
def coresnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CoResNeXt-101 (32×8d)."""
    return _create("coresnext101_32x8d", pretrained, kwargs, _DEPTHS[101], _32X8D)


@register_model  # type: ignore[untyped-decorator]
def coseresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-CoResNet-18."""
    return _create("coseresnet18", pretrained, kwargs, _DEPTHS[18], _SE)


@register_model  # type: ignore[untyped-decorator]
def coseresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-CoResNet-34."""
    return _create("coseresnet34", pretrained, kwargs, _DEPTHS[34], _SE)


@register_model  # type: ignore[untyped-decorator]
def coseresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-CoResNet-50."""
    return _create("coseresnet50", pretrained, kwargs, _DEPTHS[50], _SE)


@register_model  # type: ignore[untyped-decorator]
def coseresnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-CoResNet-101."""
    return _create("coseresnet101", pretrained, kwargs, _DEPTHS[101], _SE)


@register_model  # type: ignore[untyped-decorator]
def coseresnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-CoResNet-152."""
    return _create("coseresnet152", pretrained, kwargs, _DEPTHS[152], _SE)


@register_model  # type: ignore[untyped-decorator]
def coseresnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-CoResNeXt-50 (32×4d)."""
    return _create("coseresnext50_32x4d", pretrained, kwargs, _DEPTHS[50], _32X4D, _SE)


@register_model  # type: ignore[untyped-decorator]
def coseresnext101_32x8d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SE-CoResNeXt-101 (32×8d)."""
    return _create("coseresnext101_32x8d", pretrained, kwargs, _DEPTHS[101], _32X8D, _SE)
