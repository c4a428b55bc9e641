"""Contextual convolution.

Paper: Duta, Georgescu, Ionescu, "Contextual Convolutional Neural Networks", ICCV Workshops 2021.

A CoConv splits the output channels of one convolution over several levels. Every level sees the whole input through
kernels of its own dilation, so local detail and context come out of one layer, at the parameters and FLOPs of a plain
convolution (Eqs. 1 to 3).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, cast

import torch
import torch.fx
import torch.nn as nn

from coconv_surgery.layers.arguments import Pair, choice, flag, height_and_width, instance, shown, whole_number
from coconv_surgery.layers.functional import NAMED_PADDING, PADDING_MODES, Dilation, coconv2d, pair
from coconv_surgery.layers.levels import Levels, SplitRule, complete_levels, is_plain
from coconv_surgery.layers.metadata import CALIBRATED, STALE, mark_calibrated, may_load, write_levels

torch.fx.wrap("coconv2d")  # one node of a graph, as the convolution it replaces is


class CoConv2d(nn.Conv2d):
    """Contextual 2D convolution: a :class:`torch.nn.Conv2d` whose output channels are split over dilation levels.

    It has the parameters, state-dict keys and FLOPs of the plain convolution (Eq. 2). ``stride``, ``padding``,
    ``dilation`` and ``groups`` are the plain convolution's; each level gets the padding that keeps its output size.

    Args:
        in_channels: Input channels.
        out_channels: Output channels, over all levels.
        kernel_size: Odd along both axes unless there is one level.
        stride: As in :class:`torch.nn.Conv2d`.
        padding: As in :class:`torch.nn.Conv2d`, for the plain convolution.
        dilation: Of the plain convolution.
        groups: A level holds whole groups.
        bias: Whether to add a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Device of the parameters.
        dtype: Type of the parameters.
        levels: Number of levels: level k has k times ``dilation``. Default 1 where ``dilations`` is not given.
        dilations: Dilation of each level, instead of ``levels``.
        splits: Output channels of each level, or a rule, see :func:`split_channels`. Default ``"pow2"``.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If the convolution cannot be split this way, or an argument is not a number that it can be.

    >>> CoConv2d(64, 64, 3, padding=1, levels=3)
    CoConv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilations=(1, 2, 3), splits=(32, 16, 16))
    """

    # One attribute, in the instance's dict alone, so that a switch of the class sets all levels or none.
    _coconv_levels: Levels

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        levels: int | None = None,
        dilations: Sequence[Dilation] | None = None,
        splits: Sequence[int] | SplitRule = "pow2",
    ) -> None:
        choice(padding_mode, "padding_mode", PADDING_MODES)
        if isinstance(padding, str):
            choice(padding, "padding", NAMED_PADDING)
        super().__init__(
            whole_number(in_channels, "in_channels", at_least=1),
            whole_number(out_channels, "out_channels", at_least=1),
            height_and_width(kernel_size, "kernel_size", at_least=1),
            height_and_width(stride, "stride", at_least=1),
            padding if isinstance(padding, str) else height_and_width(padding, "padding", at_least=0),
            height_and_width(dilation, "dilation", at_least=1),
            whole_number(groups, "groups", at_least=1),
            flag(bias, "bias"),
            padding_mode,
            device,
            dtype,
        )
        if levels is None and dilations is None:
            levels = 1
        self._coconv_levels = complete_levels(self, levels, dilations, splits)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        levels: int | None = None,
        *,
        dilations: Sequence[Dilation] | None = None,
        splits: Sequence[int] | SplitRule = "pow2",
    ) -> "CoConv2d":
        """Build a contextual convolution that shares a convolution's parameters.

        Args:
            conv: A plain convolution, left as it is. Its parameters are shared, not copied.
            levels: As in the class.
            dilations: As in the class.
            splits: As in the class.

        Raises:
            TypeError: If it is not an ``nn.Conv2d``.
            ValueError: If the convolution cannot be split this way.

        >>> conv = nn.Conv2d(8, 8, 3, padding=1)
        >>> CoConv2d.from_conv(conv, levels=2).weight is conv.weight
        True
        """
        instance(conv, "conv", nn.Conv2d, "an nn.Conv2d")
        if "weight" not in conv._parameters:
            raise ValueError(
                "the weight is computed from other parameters, as by weight_norm: use to_coconv_() instead"
            )
        if type(conv) not in (nn.Conv2d, CoConv2d):
            raise ValueError(f"a {type(conv).__name__} does more than an nn.Conv2d: use to_coconv_() instead")
        chosen = complete_levels(conv, levels, dilations, splits)
        coconv = cls(
            conv.in_channels,
            conv.out_channels,
            pair(conv.kernel_size),
            pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else pair(conv.padding),
            pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
            dilations=chosen.dilations,
            splits=chosen.splits,
        )
        coconv.weight, coconv.bias = conv.weight, conv.bias
        return coconv.train(conv.training)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.dilations)

    @property
    def dilations(self) -> tuple[Dilation, ...]:
        """Dilation of each level, a pair where the axes differ."""
        return self._coconv_levels.dilations

    @property
    def splits(self) -> tuple[int, ...]:
        """Output channels of each level."""
        return cast("tuple[int, ...]", self._coconv_levels.splits)  # numbers: complete_levels() saw to it

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; not another ``dilation``, which the levels would not follow."""
        if name == "dilation" and "_coconv_levels" in vars(self) and pair(value) != pair(self.dilation):
            raise AttributeError(
                f"dilation={shown(value)} would change nothing: the levels have dilations of their own, "
                f"{self.dilations}. Set it before the conversion, or give other levels by to_coconv_()"
            )
        super().__setattr__(name, value)

    # What it inherits does the same, but with that a strict export does not say of the levels that they are
    # convolutions, which is what some quantisers go by.
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve ``(N, C, H, W)`` or ``(C, H, W)``."""
        # A bound method that somebody keeps, or has put something around, is called after a revert as well.
        contextual = isinstance(self, CoConv2d)
        output: torch.Tensor = super().forward(input) if contextual else type(self).forward(self, input)
        return output

    # mmcv's and mmengine's conv-BN evaluation call this method with weights of their own, so it is the one to override.
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if is_plain(self, self.dilations):
            output: torch.Tensor = super()._conv_forward(input, weight, bias)
            return output
        return coconv2d(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            dilations=self.dilations,
            splits=self.splits,
            padding_mode=self.padding_mode,
        )

    # A state dict holds the levels in its metadata: weights that were trained with others do not load.
    def _save_to_state_dict(self, destination: Mapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.contextual_levels is not None:
            write_levels(destination, prefix, self.contextual_levels, self)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if may_load(self.contextual_levels, state_dict, prefix, local_metadata, error_msgs):
            keys = missing_keys, unexpected_keys
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *keys, error_msgs)
            if isinstance(images := local_metadata.get(CALIBRATED), int) and f"{prefix}weight" in state_dict:
                mark_calibrated(self, images, stale=STALE in local_metadata)

    def parameters_for(self, kernels: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """Parameters with which it convolves with given kernels, or with the nearest ones that it can have.

        For subclasses that compute their kernels from their parameters: it is the inverse of that. This one convolves
        with its weight as it is.

        Args:
            kernels: ``(out_channels, in_channels / groups, kH, kW)``.

        Returns:
            New values by name; None if that is not known.
        """
        return None

    # Called by torch.jit.script(), which would compile attributes that it cannot.
    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            "torch.jit.script() does not know contextual convolutions: script what coconv_surgery.deploy() makes of "
            "the network, which computes the same in evaluation mode, or use torch.jit.trace()"
        )

    @property
    def contextual_levels(self) -> Levels | None:
        """The levels, or None where they compute what the plain convolution does."""
        return None if is_plain(self, self.dilations) else self._coconv_levels

    def extra_repr(self) -> str:
        """The plain convolution's arguments, then the levels."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, dilations={self.dilations}, splits={self.splits}"
