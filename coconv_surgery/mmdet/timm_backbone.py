"""timm networks as backbones of MMDetection."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from mmengine.model import BaseModule
from mmengine.model.weight_init import update_init_info
from timm.layers import Format, nhwc_to
from torch.nn.modules.batchnorm import _BatchNorm

from coconv_surgery.layers.arguments import flag, instance, whole_numbers
from coconv_surgery.mmengine.options import SurgeryOptions


class TIMMFeatures(BaseModule):  # type: ignore[misc]
    """A timm network, converted or not, that returns feature maps.

    The network is ``timm_model``, as in mmpretrain's TIMMBackbone, so that checkpoints have the same keys.

    Args:
        model_name: Any timm architecture that has ``features_only``.
        out_indices: Which feature maps to return; negative ones count from the last. Default: what timm returns.
        pretrained: Whether to start training from timm's pretrained weights. They are fetched when the weights are
            initialised, not when the network is built, so testing needs no download.
        checkpoint_path: A checkpoint of the timm network to start training from instead.
        norm_eval: Whether batch norms keep their running statistics in training.
        surgery: What to convert; the keys of :class:`~coconv_surgery.mmengine.SurgeryOptions`. The input size
            defaults to the one that timm says the network was trained at, so that the levels are those of pretraining.
        init_cfg: As in mmengine's BaseModule.
        **kwargs: Further arguments of :func:`timm.create_model`.

    Attributes:
        out_channels (list): Channels of the feature maps, for the neck's ``in_channels``.
        strides (list): Reduction of the feature maps.

    Raises:
        ValueError: If both sources of weights are given, or as :class:`~coconv_surgery.mmengine.SurgeryOptions` and
            :func:`~coconv_surgery.plan_conversion`.

    >>> backbone = TIMMFeatures("resnet18", out_indices=(1, 2, 3, 4), surgery=dict(policy="resolution"))
    >>> backbone.out_channels, backbone.strides
    ([64, 128, 256, 512], [4, 8, 16, 32])
    >>> backbone.timm_model.layer1[0].conv1.dilations
    (1, 2, 3, 4)
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        norm_eval: bool = False,
        surgery: Mapping[str, Any] | None = None,
        init_cfg: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        options = None if surgery is None else SurgeryOptions.read(surgery)
        if pretrained and checkpoint_path is not None:
            raise ValueError("pretrained and checkpoint_path both give the weights: choose one")
        self.pretrained = flag(pretrained, "pretrained")
        self.checkpoint_path = checkpoint_path
        self.norm_eval = flag(norm_eval, "norm_eval")
        if out_indices is not None:
            kwargs["out_indices"] = whole_numbers(out_indices, "out_indices", "must be whole numbers", at_least=None)
        name = instance(model_name, "model_name", str, "a name of timm's")
        self._arguments = {"model_name": name, "features_only": True, **kwargs}
        self.timm_model = timm.create_model(**self._arguments)
        self.out_channels: list[int] = self.timm_model.feature_info.channels()
        self.strides: list[int] = self.timm_model.feature_info.reduction()
        self._format = Format(getattr(self.timm_model, "output_fmt", Format.NCHW))
        if options is not None:
            options.convert(self.timm_model)

    def init_weights(self) -> None:
        """Load the weights to start training from."""
        if self.pretrained or self.checkpoint_path is not None:
            file = None if self.checkpoint_path is None else {"file": self.checkpoint_path}
            source = timm.create_model(**self._arguments, pretrained=True, pretrained_cfg_overlay=file)
            self.timm_model.load_state_dict(source.state_dict())
            if hasattr(self, "_params_init_info"):
                update_init_info(self, init_info=f"loaded from {self.checkpoint_path or 'timm'}")
        super().init_weights()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Extract features.

        Args:
            x: ``(N, 3, H, W)``.

        Returns:
            ``(N, C, H / stride, W / stride)`` for each index.
        """
        features = self.timm_model(x)
        if self._format == Format.NHWC:
            features = [nhwc_to(feature, Format.NCHW) for feature in features]
        return tuple(features)

    def train(self, mode: bool = True) -> "TIMMFeatures":
        """Set the training mode; with ``norm_eval``, batch norms stay in evaluation mode."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
