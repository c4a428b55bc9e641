"""Whether a merged block computes what it did: by what it returns, or by its kernels."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.merging.calls import Call
from coconv_surgery.merging.convs import kind
from coconv_surgery.merging.methods import is_needed
from coconv_surgery.merging.plain import make_plain
from coconv_surgery.tracing.differences import difference
from coconv_surgery.tracing.objects import tensor_leaves
from coconv_surgery.tracing.twin import Twin

_SIDE = 32
_TOLERANCE = 1e-3


def in_double(block: nn.Module) -> nn.Module | None:
    """A copy to compare with, without other people's hooks and of plain blocks, or None where there can be none."""
    try:
        copied: nn.Module = Twin(block, fake=False).model.double()
    except Exception:  # the block's own code, which may refuse to be copied
        return None
    for module in copied.modules():
        make_plain(module)
    return copied


def compute_the_same(before: nn.Module | None, after: nn.Module | None, tolerance: float) -> bool | None:
    """Whether all tensors that a merged block returns are among those that it returned before, on random images.

    Returns:
        None where the two cannot be run on images, or do not return a tensor.
    """
    if before is None or after is None:
        return None
    conv = next(module for module in before.modules() if isinstance(module, nn.Conv2d))
    device = next((tensor.device for tensor in before.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.randn(2, conv.in_channels, _SIDE, _SIDE, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        try:
            images = [image] * max(1, sum(map(is_needed, inspect.signature(before.forward).parameters.values())))
            expected, found = (tensor_leaves(module(*map(torch.clone, images))) for module in (before, after))
        except Exception:  # the block's own code, which may want something else than images
            return None
    if not found:
        return None
    return all(any(_close(tensor, other, tolerance) for other in expected) for tensor in found)


def tolerance_of(block: nn.Module) -> float:
    """How far apart numbers may be, since merged weights are rounded to the block's own type."""
    types = {parameter.dtype for parameter in block.parameters() if parameter.is_floating_point()}
    return max([_TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in types)])


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    # Where there is no number to compare, nothing is apart.
    return found.shape == expected.shape and not difference(found, expected) > tolerance


@dataclass(frozen=True)
class Kernel:
    """What a convolution's kernel was.

    Attributes:
        kind: Its size and levels.
        taps: ``(out_channels, n)``, all but those of the centre.
    """

    kind: tuple[Any, ...]
    taps: torch.Tensor


def kernels_of(convs: Iterable[nn.Conv2d]) -> list[Kernel]:
    """Kernels as they are now, to compare with later."""
    return [Kernel(kind(conv), _off_centre(conv.weight.detach())) for conv in convs]


def _off_centre(kernel: torch.Tensor) -> torch.Tensor:
    taps = kernel.flatten(2)
    centre = kernel.shape[2] // 2 * kernel.shape[3] + kernel.shape[3] // 2
    return torch.cat((taps[..., :centre], taps[..., centre + 1 :]), dim=2).flatten(1)


def kernels_agree(call: Call, before: list[Kernel], after: list[nn.Conv2d], tolerance: float) -> bool:
    """Whether a merged block computes the same by its kernels, as far as levels go.

    Off the centre, which all levels share, norms and sums of branches make each output channel's kernel a combination
    of kernels of that channel that had the same levels. Where there are no numbers, all that was merged must have been
    of one kind.
    """
    levels_went = any(isinstance(conv, CoConv2d) for conv in call.merged)
    if levels_went and not call.made:
        return False
    if any(conv.weight.is_meta for conv in after):
        return len(set(map(kind, call.merged))) <= 1
    sources = [*before, *kernels_of(conv for inner in call.within for conv in inner.all_made())]
    checked = (conv for conv in after if levels_went or isinstance(conv, CoConv2d))
    return all(_is_combination(kernel, sources, tolerance) for kernel in kernels_of(checked))


def _is_combination(kernel: Kernel, sources: list[Kernel], tolerance: float) -> bool:
    alike = [source.taps for source in sources if source.kind == kernel.kind and source.taps.shape == kernel.taps.shape]
    if not 0 < len(alike) < kernel.taps.shape[1]:  # anything is a combination of as many as it has numbers
        return False
    wanted, columns = (tensor.double().cpu() for tensor in (kernel.taps.unsqueeze(-1), torch.stack(alike, dim=-1)))
    return _close(columns @ torch.linalg.lstsq(columns, wanted).solution, wanted, tolerance)
