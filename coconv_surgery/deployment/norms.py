"""Norms that scale and shift each channel by numbers of their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from coconv_surgery.deployment.comparing import SCALES, is_close

_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Norm:
    """A norm in evaluation mode.

    Attributes:
        scale: ``(channels,)``, what it multiplies each channel with.
        shift: ``(channels,)``, what it adds then.
        act: The name of what it holds that activates then, if it does.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    act: str | None


def is_norm(module: Any) -> bool:
    """Whether a module has the running statistics of a norm."""
    statistics = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    return all(isinstance(each, torch.Tensor) and each.dim() == 1 for each in statistics) and _eps(module) is not None


def read_norm(module: Any, rank: int) -> Norm | None:
    """Read what a norm does in evaluation mode.

    What is not one of torch's own norms is tried on maps of several magnitudes, around what it centres.

    Args:
        module: The norm, in double precision.
        rank: How many dimensions the maps have that it is called with.

    Returns:
        None where it does something else than to scale, to shift, and to activate.
    """
    eps = cast(float, _eps(module))
    mean, variance = module.running_mean, module.running_var
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight.detach())
    norm = Norm(scale, -mean * scale + (0.0 if bias is None else bias.detach()), None)
    if type(module) in _KNOWN and not module.training and "forward" not in vars(module):
        return norm
    act = module._modules.get("act")
    with _disable_current_modes(), torch.no_grad():
        try:
            images = list(_images(mean, variance, rank))
            expected = [module(image.clone()) for image in images]
            normed = [F.batch_norm(image, mean, variance, weight, bias, training=False, eps=eps) for image in images]
            if all(map(is_close, normed, expected)):
                return norm
            if isinstance(act, nn.Module) and all(map(is_close, map(act, normed), expected)):
                return Norm(norm.scale, norm.shift, "act")
        except Exception:  # the norm's own code, which may want something else
            return None
    return None


def _images(mean: torch.Tensor, variance: torch.Tensor, rank: int) -> Iterator[torch.Tensor]:
    shape = (8, len(mean), *[8] * (rank - 2))
    sides = (1, -1, *[1] * (rank - 2))
    for scale in SCALES:
        numbers = torch.randn(shape, dtype=mean.dtype, device=mean.device)
        yield mean.view(sides) + scale * variance.clamp(min=1e-12).sqrt().view(sides) * numbers


def _eps(module: Any) -> float | None:
    eps = vars(module).get("eps")
    return float(eps) if isinstance(eps, int | float) else None
