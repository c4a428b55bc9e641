"""The constant kernels of a layer, whatever it computes them from, and the plain layers made of them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn as nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from coconv_surgery.deployment.comparing import SCALES, is_close
from coconv_surgery.deployment.forms import ConvLevels, GroupedConvLevels, SamePadding
from coconv_surgery.layers.arguments import Pair
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import level_padding, pair
from coconv_surgery.layers.levels import Levels

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What convolves with its weight as it is.
_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, CoConv2d)
_METHODS = ("forward", "_conv_forward")
_SIZES = 4  # one after another, of images to try a layer on: a stride may leave nothing to pad at some


@dataclass(frozen=True)
class Kernels:
    """What a layer multiplies its input with.

    Attributes:
        weight: ``(out_channels, ...)``; of a transposed convolution ``(in_channels, out_channels / groups, ...)``.
        bias: ``(out_channels,)``, or None.
        build: Makes a module of a weight and a bias.
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
            weight = (grouped * scale.view(self.transposed, 1, -1, *kernel)).flatten(0, 1)
        else:
            weight = self.weight * scale.view(-1, 1, *kernel)
        return replace(self, weight=weight, bias=shift if self.bias is None else self.bias * scale + shift)

    def module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A module of plain layers, with numbers of a type."""
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (self.weight, self.bias))
        return self.build(cast(torch.Tensor, weight), bias).eval()


Build = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a kind whose kernels can be read."""
    return isinstance(module, nn.Conv2d) or type_before_parametrizations(module) in _KNOWN


def is_as_it_is(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's own or a contextual convolution, and its weight a parameter."""
    computes = is_parametrized(layer) or layer._forward_pre_hooks or "weight" not in layer._parameters
    return type(layer) in _KNOWN and not computes and vars(layer).keys().isdisjoint(_METHODS)


def read_kernels(layer: nn.Module, rank: int) -> Kernels | None:
    """Read the kernels that a layer convolves with.

    What is of another class than torch's own and ours is tried on images of several sizes and magnitudes.

    Args:
        layer: A layer in evaluation mode, in double precision.
        rank: How many dimensions the maps have that it is called with.

    Returns:
        None where it does more than to convolve with the same kernels whatever its input is.
    """
    if is_as_it_is(layer):
        return _read_contextual(layer, rank) if isinstance(layer, CoConv2d) else _read_known(layer)
    with _disable_current_modes(), torch.no_grad():
        try:
            images = list(_images(layer, rank))
            candidates = _candidates(layer, images[0])
            expected = [layer(image.clone()) for image in images]
            for kernels in candidates:
                made = kernels.module()
                if all(is_close(made(image), output) for image, output in zip(images, expected, strict=True)):
                    return kernels
        except Exception:  # the layer's own code, which may want something else
            return None
    return None


def _images(layer: Any, rank: int) -> Iterator[torch.Tensor]:
    weight = layer.weight
    options = {"dtype": torch.float64, "device": weight.device}
    if isinstance(layer, nn.Linear):
        shapes = [(*[8] * (rank - 1), layer.in_features)]
    else:
        sides = weight.shape[2:]
        dilation = max(max(pair(d)) for d in layer.dilations) if isinstance(layer, CoConv2d) else max(layer.dilation)
        least = 2 * dilation * max(sides) + 1
        batch = [2] * (rank - len(sides) - 1)
        shapes = [(*batch, layer.in_channels, *[least + more] * len(sides)) for more in range(_SIZES)]
    for shape in shapes:
        for scale in SCALES:
            yield scale * torch.randn(shape, **options)


def _candidates(layer: Any, image: torch.Tensor) -> Iterator[Kernels]:
    if type_before_parametrizations(layer) in _KNOWN and not isinstance(layer, nn.Conv2d):
        layer(image)  # hooks compute its weight
        yield _read_known(layer)
    elif (call := _convolution_of(layer, image)) is not None:
        build: Build = functools.partial(_convs, call.without_numbers())
        same = SamePadding(layer.kernel_size, layer.stride, layer.dilation)
        for each in (build, functools.partial(_after, same, build)):
            yield Kernels(call.weight.detach(), _detached(call.bias), each)


def _read_known(layer: Any) -> Kernels:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
    arguments: dict[str, Any] = {}
    if isinstance(layer, nn.Linear):
        sizes = layer.in_features, layer.out_features
    else:
        sizes = layer.in_channels, layer.out_channels
        transposed = isinstance(layer, _TRANSPOSED)
        arguments = {name: getattr(layer, name) for name in names if transposed or name != "output_padding"}
    make = functools.partial(type_before_parametrizations(layer), *sizes, device="meta", **arguments)
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else 0
    return Kernels(layer.weight.detach(), _detached(layer.bias), functools.partial(_with_numbers, make), groups)


def _read_contextual(layer: CoConv2d, rank: int) -> Kernels:
    call = _own_convolution(layer, layer.weight, layer.bias, rank)
    return Kernels(layer.weight.detach(), _detached(layer.bias), functools.partial(_convs, call.without_numbers()))


def _with_numbers(make: Callable[..., Any], weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    made = make(bias=bias is not None)
    made.weight = constant(weight)
    if bias is not None:
        made.bias = constant(bias)
    return cast(nn.Module, made)


@dataclass(frozen=True)
class _Convolution:
    weight: torch.Tensor
    bias: torch.Tensor | None
    rank: int  # of its input
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    mode: str = "zeros"
    levels: Levels | None = None

    @property
    def channel_dim(self) -> int:
        return self.rank - 3

    def without_numbers(self) -> "_Convolution":
        return replace(self, weight=torch.empty(0, device="meta"), bias=None)


def _own_convolution(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None, rank: int) -> _Convolution:
    """What a module does by its attributes, with some weights."""
    stride, dilation = pair(conv.stride), pair(conv.dilation)
    numbers = rank, stride, _padding(conv, conv.padding, dilation), dilation, conv.groups
    levels = Levels(conv.dilations, conv.splits) if isinstance(conv, CoConv2d) else None
    return _Convolution(weight, bias, *numbers, conv.padding_mode, levels)


def _convolution_of(conv: nn.Conv2d, image: torch.Tensor) -> _Convolution | None:
    """The one convolution that a module makes of an image, with the weights that it computes for it."""
    seen: list[_Convolution] = []

    def convolve(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(_own_convolution(conv, weight, bias, input.dim()))
        with torch._C.DisableTorchFunction():  # type: ignore[no-untyped-call]
            output: torch.Tensor = type(conv)._conv_forward(conv, input, weight, bias)
        return output

    kept = vars(conv).get("_conv_forward")
    vars(conv)["_conv_forward"] = convolve
    try:
        with _ConvolutionCalls(conv, seen):
            conv(image.clone())
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
            tensors = call["weight"], call.get("bias")
            self._seen.append(
                _Convolution(*tensors, call["input"].dim(), stride, padding, dilation, call.get("groups", 1))
            )
        return func(*args, **(kwargs or {}))


def _padding(conv: nn.Conv2d, padding: Any, dilation: Pair) -> Pair:
    return level_padding(pair(conv.kernel_size), padding, dilation, dilation)


def _convs(call: _Convolution, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
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
    form = ConvLevels if call.groups == 1 else GroupedConvLevels
    return form(levels, call.channel_dim, call.padding, call.dilation)


def _conv(
    call: _Convolution, weight: torch.Tensor, bias: torch.Tensor | None, dilation: Pair, groups: int
) -> nn.Conv2d:
    kernel = weight.shape[2], weight.shape[3]
    make = functools.partial(
        nn.Conv2d,
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,
        call.stride,
        level_padding(kernel, call.padding, call.dilation, dilation),
        dilation,
        groups,
        padding_mode=cast(Any, call.mode),
        device="meta",
    )
    return cast(nn.Conv2d, _with_numbers(make, weight, bias))


def _after(first: nn.Module, build: Build, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    return nn.Sequential(first, build(weight, bias))


def constant(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter of its own with some numbers, that nothing trains."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()
