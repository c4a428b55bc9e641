"""The constant kernels of a convolution, whatever it computes them from, and the plain convolutions made of them."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from coconv_surgery.deployment.forms import ConvLevels, GroupedConvLevels, SamePadding
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import Pair, level_padding, pair
from coconv_surgery.layers.levels import Levels

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ROUNDING = 1e-6
_OTHERS = (nn.Linear, nn.Conv1d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class Kernels:
    """What a layer multiplies its input with.

    Attributes:
        weight: ``(out_channels, ...)``; of a transposed convolution ``(in_channels, out_channels / groups, ...)``.
        bias: ``(out_channels,)``, or None.
        build: Makes a module in place of the layer, of a weight and a bias.
        transposed: Groups of a transposed convolution; 0 for any other layer.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    build: "Build"
    transposed: int = 0

    def scaled(self, scale: torch.Tensor, shift: torch.Tensor) -> "Kernels":
        """The same with every output channel multiplied with a number, and another one added.

        Args:
            scale: ``(out_channels,)``.
            shift: ``(out_channels,)``.
        """
        kernel = [1] * (self.weight.dim() - 2)
        if self.transposed:
            grouped = self.weight.view(self.transposed, -1, *self.weight.shape[1:])
            weight = (grouped * scale.view(self.transposed, 1, -1, *kernel)).view(self.weight.shape)
        else:
            weight = self.weight * scale.view(-1, 1, *kernel)
        return replace(self, weight=weight, bias=shift if self.bias is None else self.bias * scale + shift)

    def module(self, layer: nn.Module) -> nn.Module:
        """A module of plain layers in place of the layer, with numbers of the same type."""
        dtype = next(layer.parameters()).dtype
        return self.build(layer, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


Build = Callable[[Any, torch.Tensor, torch.Tensor | None], nn.Module]


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a kind whose kernels can be read."""
    return isinstance(module, nn.Conv2d) or type(module) in _OTHERS


def read_kernels(module: nn.Module, image: torch.Tensor) -> Kernels | None:
    """Read the kernels that a layer convolves with.

    Args:
        module: A layer in evaluation mode, in double precision.
        image: Random numbers to call it with.

    Returns:
        None where it does more than to convolve with the same kernels whatever its input is.
    """
    with _disable_current_modes(), torch.no_grad():
        kernels = _read_conv(module, image) if isinstance(module, nn.Conv2d) else _read_other(module)
        if kernels is None:
            return None
        another = torch.randn_like(image)
        return kernels if is_close(kernels.module(module)(another), module(another.clone())) else None


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors that were computed in double precision differ by no more than rounding."""
    return found.shape == expected.shape and difference(found, expected) <= _ROUNDING


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference between two tensors, relative to the largest number; infinite where one is not finite."""
    if not expected.numel():
        return 0.0
    found, expected = found.to(torch.complex128), expected.to(torch.complex128)
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(found), finite):
        return torch.inf
    if not finite.any():
        return 0.0
    largest = expected[finite].abs().max()
    return float((found - expected)[finite].abs().max() / largest.clamp(min=torch.finfo(torch.float32).tiny))


def _read_other(layer: Any) -> Kernels:
    transposed = layer.groups if isinstance(layer, _TRANSPOSED) else 0
    return Kernels(layer.weight.detach(), _detached(layer.bias), _with_weights, transposed)


def _with_weights(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    memo = {id(parameter): None for parameter in (layer.weight, layer.bias)}
    made = copy.deepcopy(layer, memo)
    made.weight, made.bias = _constant(weight), None if bias is None else _constant(bias)
    return cast(nn.Module, made)


def _read_conv(conv: nn.Conv2d, input: torch.Tensor) -> Kernels | None:
    call = _convolution_of(conv, input)
    if call is None:
        return None
    build: Build = functools.partial(_convs, call.without_numbers())
    if not torch.equal(call.input, input):
        same = SamePadding(conv.kernel_size, conv.stride, conv.dilation)
        padded = same(input)
        if padded.shape != call.input.shape or not torch.equal(padded, call.input):
            return None
        build = functools.partial(_after, same, build)
    return Kernels(call.weight.detach(), _detached(call.bias), build)


@dataclass(frozen=True)
class _Convolution:
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    mode: str = "zeros"
    levels: Levels | None = None

    @property
    def channel_dim(self) -> int:
        return self.input.dim() - 3

    def without_numbers(self) -> "_Convolution":
        nothing = torch.empty(0, device="meta")
        return replace(self, input=self.input.to("meta"), weight=nothing, bias=None)


def _convolution_of(conv: nn.Conv2d, input: torch.Tensor) -> _Convolution | None:
    """The one convolution that a module makes of an input, with the weights that it computes for it."""
    seen: list[_Convolution] = []

    def convolve(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stride, dilation = pair(conv.stride), pair(conv.dilation)
        numbers = stride, _padding(conv, conv.padding, dilation), dilation, conv.groups
        levels = Levels(conv.dilations, conv.splits) if isinstance(conv, CoConv2d) else None
        seen.append(_Convolution(input, weight, bias, *numbers, conv.padding_mode, levels))
        with torch._C.DisableTorchFunction():  # type: ignore[no-untyped-call]
            output: torch.Tensor = type(conv)._conv_forward(conv, input, weight, bias)
        return output

    kept = vars(conv).get("_conv_forward")
    vars(conv)["_conv_forward"] = convolve
    try:
        with _ConvolutionCalls(conv, seen):
            conv(input.clone())
    finally:
        del vars(conv)["_conv_forward"]
        if kept is not None:
            vars(conv)["_conv_forward"] = kept
    return seen[0] if len(seen) == 1 else None


class _ConvolutionCalls(TorchFunctionMode):
    """Notes calls of torch's own convolution."""

    def __init__(self, conv: nn.Conv2d, seen: list[_Convolution]) -> None:
        super().__init__()
        self._conv, self._seen = conv, seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            call = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            stride, dilation = pair(call.get("stride", 1)), pair(call.get("dilation", 1))
            padding = _padding(self._conv, call.get("padding", 0), dilation)
            tensors = call["input"], call["weight"], call.get("bias")
            self._seen.append(_Convolution(*tensors, stride, padding, dilation, call.get("groups", 1)))
        return func(*args, **(kwargs or {}))


def _padding(conv: nn.Conv2d, padding: Any, dilation: Pair) -> Pair:
    return level_padding(pair(conv.kernel_size), padding, dilation, dilation)


def _convs(call: _Convolution, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """Plain convolutions that compute what a convolution does, with other numbers."""
    if call.levels is None:
        return _conv(call, weight, bias, call.dilation, call.groups)
    splits = list(cast(tuple[int, ...], call.levels.splits))
    weights = weight.split_with_sizes(splits)
    biases: Sequence[torch.Tensor | None] = [None] * len(splits) if bias is None else bias.split_with_sizes(splits)
    levels = [
        _conv(call, level_weight, level_bias, pair(dilation), max(1, channels * call.groups // len(weight)))
        for level_weight, level_bias, dilation, channels in zip(
            weights, biases, call.levels.dilations, splits, strict=True
        )
    ]
    if len(levels) == 1:
        return levels[0]
    return (ConvLevels if call.groups == 1 else GroupedConvLevels)(levels, call.channel_dim)


def _conv(
    call: _Convolution, weight: torch.Tensor, bias: torch.Tensor | None, dilation: Pair, groups: int
) -> nn.Conv2d:
    kernel = weight.shape[2], weight.shape[3]
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,
        call.stride,
        level_padding(kernel, call.padding, call.dilation, dilation),
        dilation,
        groups,
        bias is not None,
        cast(Any, call.mode),
        device="meta",
    )
    conv.weight = _constant(weight)
    if bias is not None:
        conv.bias = _constant(bias)
    return conv.eval()


def _after(
    first: nn.Module, build: Build, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    return nn.Sequential(first, build(layer, weight, bias)).eval()


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()
