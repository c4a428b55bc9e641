"""Depthwise levels in one pass: an optional operator in C++, built on demand.

Level by level, depthwise convolutions cost a multiple of the plain one, as there is little to compute and much to read,
split and join. The operator computes all levels at once. It is for what is slow, 3×3 kernels in single precision on a
CPU; whatever else there is, it leaves to the levels one by one, which compute the same.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from coconv_surgery.layers.arguments import Pair

_SOURCE = Path(__file__).with_suffix(".cpp")
_NAME = "coconv_surgery_depthwise"
_SWITCH = "COCONV_NATIVE"
_FLAGS = ("-O3", "-march=native", "-fopenmp")
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def build_depthwise() -> Path:
    """Compile the operator for depthwise levels on this machine, once; from then on every process uses it by itself.

    It takes about half a minute, a C++ compiler and ninja. The library is kept in ``$XDG_CACHE_HOME/coconv_surgery``,
    by version of torch and kind of processor. With the environment variable ``COCONV_NATIVE=0`` nobody uses it.

    Returns:
        The library.

    Raises:
        RuntimeError: If it cannot be compiled.
    """
    from torch.utils.cpp_extension import load

    library = _library()
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            try:
                load(_NAME, [str(_SOURCE)], extra_cflags=list(_FLAGS), build_directory=folder, is_python_module=False)
            except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
                reason = str(error).partition("\n")[0]
                raise RuntimeError(
                    f"the operator for depthwise levels was not compiled, and they go one by one ({reason}): install a "
                    "C++ compiler, and ninja by pip"
                ) from error
            (made,) = Path(folder).glob("*.so")  # torch counts the attempts of a process in its name
            passing = Path(shutil.copy(made, library.with_suffix(".part")))
            passing.replace(library)
    operators.cache_clear()
    return library


@functools.cache
def operators() -> Any | None:
    """The operators, or None where they were not built for this machine, or are switched off."""
    if os.environ.get(_SWITCH) == "0":
        return None
    if not hasattr(torch.ops.coconv_surgery, "depthwise"):
        library = _library()
        if not library.exists():
            return None
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError:  # of another machine
            return None
    return torch.ops.coconv_surgery


def _library() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    of = (_SOURCE.read_text(encoding="utf-8"), torch.__version__, platform.machine(), _processor(), *_FLAGS)
    key = hashlib.sha256("\n".join(of).encode()).hexdigest()[:16]
    return cache / "coconv_surgery" / f"{_NAME}-{key}.so"


def _processor() -> str:
    """What a processor can do, as far as Linux tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def suits_operator(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Pair, groups: int
) -> bool:
    """Whether the operator is for a convolution, and nobody watches, transforms or records what is computed.

    It is asked of depthwise ones alone.
    """
    return (
        groups == len(weight) == input.shape[-3]
        and weight.shape[1:] == (1, 3, 3)
        and input.dim() == 4
        and stride in ((1, 1), (2, 2))
        and type(input) in _TENSORS
        and type(weight) in _TENSORS
        and (bias is None or (type(bias) in _TENSORS and bias.dtype == torch.float32))
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and (input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and operators() is not None
    )


def depthwise(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    splits: Sequence[int],
    dilations: Sequence[Pair],
    paddings: Sequence[Pair],
    one_by_one: Callable[..., torch.Tensor],
) -> torch.Tensor | None:
    """Convolve all levels at once.

    Args:
        input: ``(N, C, H, W)``.
        weight: ``(C, 1, 3, 3)``.
        bias: ``(C,)``.
        stride: Along both axes.
        splits: Channels of each level.
        dilations: Height and width of each level's.
        paddings: The same.
        one_by_one: Computes the same of input, weight and bias, in a way that can be differentiated again.

    Returns:
        ``(N, C, H_out, W_out)``; None where the levels are of another kind.
    """
    sides = list(zip(dilations, paddings, strict=True))
    if any(d[0] != d[1] or p[0] != p[1] or not 0 <= p[0] <= 2 * d[0] for d, p in sides):
        return None
    if min(input.shape[-2:]) + 2 * paddings[0][0] <= 2 * dilations[0][0]:
        return None  # a kernel larger than the map, of which the levels one by one complain
    levels = list(splits), [d for d, _ in dilations], [p for p, _ in paddings]
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        apply: Any = _Depthwise.apply
        output: torch.Tensor = apply(input, weight, bias, levels, stride, one_by_one)
        return output
    computed: torch.Tensor = _operators().depthwise(input, weight, bias, *levels, stride)
    return computed


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any, levels: Any, stride: int, one_by_one: Any) -> Any:
        ctx.save_for_backward(input, weight, bias)
        ctx.levels, ctx.stride, ctx.one_by_one = levels, stride, one_by_one
        return _operators().depthwise(input, weight, bias, *levels, stride)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        input, weight, _ = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates again
            return (*_differentiable(ctx, gradient), None, None, None)
        is_last = not input.is_contiguous()
        gradient = gradient.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
        of_input = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            sizes = (*ctx.levels, ctx.stride, *input.shape[-2:])
            of_input = _operators().depthwise_input(gradient, weight, *sizes)
        if ctx.needs_input_grad[1]:
            of_weight = _operators().depthwise_weight(gradient, input, *ctx.levels, ctx.stride)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_input, of_weight, of_bias, None, None, None


def _differentiable(ctx: Any, gradient: torch.Tensor) -> list[torch.Tensor | None]:
    tensors = ctx.saved_tensors
    wanted = [tensor for tensor, needed in zip(tensors, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(ctx.one_by_one(*tensors), wanted, gradient, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


def _operators() -> Any:
    return torch.ops.coconv_surgery
