"""Contextual convolution as a function of tensors, and how it is computed."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch.amp.autocast_mode import is_autocast_available

from coconv_surgery.layers.arguments import (
    Pair,
    choice,
    height_and_width,
    instance,
    sequence,
    whole_number,
)
from coconv_surgery.layers.depthwise import depthwise, suits_operator

Dilation = int | Pair
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
NAMED_PADDING = ("same", "valid")
DIM_IF_NOT_PLAIN = -4


def coconv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    dilations: Sequence[Dilation],
    splits: Sequence[int],
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Contextual convolution, the functional form (Section 3, Figure 2a).

    ``stride`` to ``groups`` describe the plain convolution this one replaces, as in
    :func:`torch.nn.functional.conv2d`. Level k convolves with ``dilations[k]`` and with the padding that gives it the
    plain convolution's output size. It costs nothing to call it rightly: what is wrong with its arguments is looked
    into once they did not do. Whether a convolution suits its levels,
    :func:`coconv_surgery.layers.levels.check_levels` says.

    Args:
        input: ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.
        weight: ``(out_channels, in_channels / groups, kH, kW)``; the levels are consecutive slices of dimension 0.
        bias: ``(out_channels,)``.
        stride: Stride of the plain convolution.
        padding: Padding of the plain convolution: numbers, ``"same"`` or ``"valid"``.
        dilation: Dilation of the plain convolution.
        groups: Groups of the plain convolution; a level holds whole groups.
        dilations: Dilation of each level.
        splits: Output channels of each level.
        padding_mode: As in :class:`torch.nn.Conv2d`.

    Returns:
        ``(N, out_channels, H_out, W_out)``, the levels concatenated in order.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If one is not a number that it can be.

    >>> x, w = torch.randn(1, 8, 14, 14), torch.randn(6, 8, 3, 3)
    >>> coconv2d(x, w, padding=1, dilations=(1, 2), splits=(3, 3)).shape
    torch.Size([1, 6, 14, 14])
    """
    arguments = (input, weight, bias, stride, padding, dilation, groups, dilations, splits, padding_mode)
    if torch.compiler.is_compiling():
        return _coconv2d(*arguments)
    if isinstance(input, fx.Proxy):  # a graph that was transformed does not tell torch.fx.wrap any more
        return _one_node(input.tracer, *arguments)
    try:
        return _coconv2d(*arguments)
    except Exception:
        _check_arguments(arguments)
        raise


def _one_node(tracer: Any, *arguments: Any) -> torch.Tensor:
    *plain, dilations, splits, padding_mode = arguments
    named = {"dilations": dilations, "splits": splits, "padding_mode": padding_mode}
    node: torch.Tensor = tracer.create_proxy("call_function", coconv2d, tuple(plain), named)
    return node


def _coconv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    dilations: Sequence[Dilation],
    splits: Sequence[int],
    padding_mode: str,
) -> torch.Tensor:
    kernel, sizes = (weight.shape[2], weight.shape[3]), list(splits)
    stride, dilation = pair(stride), pair(dilation)
    if min(dilation) < 1 or (isinstance(padding, str) and padding not in NAMED_PADDING):
        raise ValueError(f"there is no convolution of {dilation=} and {padding=}")  # torch would not see it
    levels = [pair(level) for level in dilations]
    paddings = [level_padding(kernel, padding, dilation, level) for level in levels]
    input = _autocast(input)
    convolve = functools.partial(
        _one_by_one,
        stride=stride,
        groups=groups,
        sizes=sizes,
        dilations=levels,
        paddings=paddings,
        padding_mode=padding_mode,
        is_plain=levels[0] == dilation,
    )
    if (
        groups > 1
        and groups == weight.shape[0]
        and padding_mode == "zeros"
        and not (torch.compiler.is_compiling() or is_recorded())
        and suits_operator(input, weight, bias, stride, groups)
    ):
        output = depthwise(input, weight, bias, stride[0], sizes, levels, paddings, convolve)
        if output is not None:
            return output
    return convolve(input, weight, bias)


def _one_by_one(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    groups: int,
    sizes: list[int],
    dilations: Sequence[Pair],
    paddings: Sequence[Pair],
    padding_mode: str,
    is_plain: bool,
) -> torch.Tensor:
    """Convolve level by level.

    Args:
        input: As of :func:`coconv2d`, like the others.
        weight: As above.
        bias: As above.
        stride: Height and width.
        groups: As above.
        sizes: Output channels of each level.
        dilations: Height and width of each level's.
        paddings: The same.
        padding_mode: As above.
        is_plain: Whether the first level is dilated as the plain convolution is.
    """
    # Splitting has one gradient, where as many slices would each fill a tensor of the whole size. An exported graph has
    # lost the plain convolution's dilation: how the dimension is written says whether it is the first level's.
    weights = weight.split_with_sizes(sizes, 0 if is_plain else DIM_IF_NOT_PLAIN)
    biases = [None] * len(sizes) if bias is None else bias.split_with_sizes(sizes)
    # Counted from the front, as exported programs know it best.
    channel_dim = 1 if input.dim() == 4 else -3
    if groups == 1:
        level_groups = [1] * len(sizes)
        reordered = _is_faster_in_channels_last(input, sizes, stride)
        inputs: Sequence[torch.Tensor] = [_to_channels_last(input) if reordered else input] * len(sizes)
    else:
        level_groups = [channels * groups // weight.shape[0] for channels in sizes]
        reordered = False
        inputs = input.split_with_sizes([count * weight.shape[1] for count in level_groups], dim=channel_dim)
    outputs = []
    for level_input, level_weight, level_bias, level_dilation, (pad_h, pad_w), count in zip(
        inputs, weights, biases, dilations, paddings, level_groups, strict=True
    ):
        if padding_mode != "zeros":
            level_input = F.pad(level_input, (pad_w, pad_w, pad_h, pad_h), mode=padding_mode)
            pad_h = pad_w = 0
        outputs.append(
            _conv_level(level_input, level_weight, level_bias, stride, (pad_h, pad_w), level_dilation, count)
        )
    if not reordered:
        return torch.cat(outputs, dim=channel_dim)
    # With one of them in NCHW, torch.cat writes the others into an NCHW result without a reorder before. A level of one
    # channel has both layouts.
    outputs[0] = outputs[0].contiguous()
    return torch.cat(outputs, dim=channel_dim).contiguous()


def _check_arguments(arguments: tuple[Any, ...]) -> None:
    input, weight, bias, stride, padding, dilation, groups, dilations, splits, padding_mode = arguments
    for name, tensor in (("input", input), ("weight", weight), ("bias", weight if bias is None else bias)):
        instance(tensor, name, torch.Tensor, "a tensor")
        if tensor.is_quantized:
            raise TypeError(
                f"{name} is quantised, and a contextual convolution computes in floating point: eager quantisation "
                "does not know it; use torch.ao's FX graph mode or PT2E, which leave it in floating point"
            )
    height_and_width(stride, "stride", at_least=1)
    height_and_width(dilation, "dilation", at_least=1)
    whole_number(groups, "groups", at_least=1)
    choice(padding_mode, "padding_mode", PADDING_MODES)
    if isinstance(padding, str):
        choice(padding, "padding", NAMED_PADDING)
    else:
        height_and_width(padding, "padding", at_least=0)
    levels = [height_and_width(level, "dilations", at_least=1) for level in one_per_level(dilations, "dilations")]
    channels = [whole_number(count, "splits", at_least=1) for count in one_per_level(splits, "splits")]
    if len(levels) != len(channels):
        raise ValueError(f"dilations={dilations} and splits={splits} must have one entry for each level")
    if weight.dim() != 4 or sum(channels) != len(weight):
        raise ValueError(
            f"splits={splits} must sum up to the first of the four sides of weight, {tuple(weight.shape)}; if it was "
            "pruned, its levels were not: revert() before pruning and convert() anew"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have {len(weight)} numbers, one for each output channel, not {tuple(bias.shape)}")
    if input.dim() not in (3, 4) or input.shape[-3] != groups * weight.shape[1]:
        wanted = f"(N, C, H, W) or (C, H, W) with {groups * weight.shape[1]} channels (groups={groups})"
        raise ValueError(f"input must be {wanted}, not {tuple(input.shape)}")
    for level in levels:
        check_padding((weight.shape[2], weight.shape[3]), padding, pair(dilation), level)


def one_per_level(values: Any, name: str) -> tuple[Any, ...]:
    """Dilations or channels, as a tuple.

    Raises:
        ValueError: If they have no order.
    """
    return sequence(values, name, "must be a sequence with one entry for each level")


def level_padding(
    kernel_size: Pair, padding: int | Sequence[int] | str, dilation: Pair, level_dilation: Pair
) -> tuple[int, int]:
    """Padding that gives a level the output size of the plain convolution.

    ``padding + (level_dilation - dilation) * (kernel_size - 1) / 2`` along each axis; a negative result means that no
    padding does.

    >>> level_padding((3, 3), 1, (1, 1), (4, 4))
    (4, 4)
    """
    base: Sequence[int]
    if isinstance(padding, str):
        base = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(dilation, kernel_size, strict=True)]
    else:
        base = pair(padding)
    height, width = (
        p + (level_d - d) * (k - 1) // 2
        for p, level_d, d, k in zip(base, level_dilation, dilation, kernel_size, strict=True)
    )
    return height, width


def check_padding(kernel_size: Pair, padding: int | Sequence[int] | str, dilation: Pair, level_dilation: Pair) -> None:
    """Check that there is a padding that gives a level the output size of the plain convolution.

    Raises:
        ValueError: If it would be negative.
    """
    if min(level_padding(kernel_size, padding, dilation, level_dilation)) < 0:
        height, width = level_dilation
        raise ValueError(
            f"dilation {height if height == width else level_dilation} with padding {padding} would need negative "
            f"padding to keep the output size: use dilations of at least the conv's own, {dilation}"
        )


def _conv_level(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    # A kernel whose dilation is a multiple of its stride reads every stride-th pixel only. Backward passes that know
    # both a stride and a dilation are slow, so training takes these pixels and convolves without a stride.
    strided = stride != (1, 1) and torch.is_grad_enabled()
    strided = strided and all(d % s == p % s == 0 for d, p, s in zip(dilation, padding, stride, strict=True))
    if strided and not is_recorded():
        input = _every(stride, input)
        padding, dilation = ((size[0] // stride[0], size[1] // stride[1]) for size in (padding, dilation))
        stride = (1, 1)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _every(stride: Pair, input: torch.Tensor) -> torch.Tensor:
    """Every so many pixels, along each axis."""
    step_h, step_w = stride
    if input.stride(-3) != 1:
        return input[..., ::step_h, ::step_w]
    # Channels last: the gradient of a slice is contiguous as the tensor's dimensions are in order.
    return input.movedim(-3, -1)[..., ::step_h, ::step_w, :].movedim(-1, -3)


def is_recorded() -> bool:
    """Whether what is computed is written down, to be exported or read later: there its form is always the same."""
    if torch.compiler.is_dynamo_compiling():
        # Not is_exporting(), which is true for torch.compile as well. An older torch does not tell the two apart.
        exporting: bool = getattr(torch.compiler, "_is_exporting_flag", True)
        return exporting
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    key = torch._C._TorchDispatchModeKey.PROXY
    before_dispatch = torch._ops._get_dispatch_mode_pre_dispatch(key)  # type: ignore[no-untyped-call]
    return tracing or before_dispatch is not None or torch._C._get_dispatch_mode(key) is not None


def _autocast(input: torch.Tensor) -> torch.Tensor:
    # Once, where each level would cast the input, and save what it has cast, for itself.
    device = input.device.type
    if torch.compiler.is_compiling() or not is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return input
    if not input.is_floating_point() or input.dtype == torch.float64:
        return input
    return input.to(torch.get_autocast_dtype(device))


# Measured by `coconv bench layers` on an EPYC and a Xeon, see benchmarks/README.md: below so many input channels, and
# above so many channels a level, a reorder of the input costs more than it saves.
_REORDER_INPUTS = 16
_REORDER_LEVEL = 16


def _is_faster_in_channels_last(input: torch.Tensor, splits: Sequence[int], stride: Pair) -> bool:
    # oneDNN reorders an NCHW input anew for every level. One reorder before all of them pays where it is what narrow
    # levels do most, where a stride leaves little to bring back to NCHW, and in bfloat16, whose convolutions are short.
    # In training the reordered input would be one more tensor to save.
    return (
        not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        and len(splits) > 1
        and input.dim() == 4
        and input.shape[-3] >= _REORDER_INPUTS
        and input.is_contiguous()
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.bfloat16)
        and (input.dtype == torch.bfloat16 or max(splits) <= _REORDER_LEVEL or stride != (1, 1))
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and not is_recorded()
    )


def _to_channels_last(input: torch.Tensor) -> torch.Tensor:
    # Not contiguous(memory_format=...), which does not work within torch.vmap().
    return input.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def pair(value: int | Sequence[int]) -> Pair:
    """Height and width of what may be given as one number for both."""
    if type(value) is int:
        return value, value
    if isinstance(value, tuple) and len(value) == 2:
        return value
    return height_and_width(value, "value")
