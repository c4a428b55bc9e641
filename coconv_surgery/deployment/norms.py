"""Norms that scale and shift each channel by numbers of their own."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from coconv_surgery.deployment.kernels import is_close


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


def read_norm(module: Any, image: torch.Tensor) -> Norm | None:
    """Read what a norm does in evaluation mode.

    Args:
        module: The norm, in double precision.
        image: Random numbers to call it with.

    Returns:
        None where it does something else than to scale, to shift, and to activate.
    """
    eps = cast(float, _eps(module))
    mean, variance = module.running_mean, module.running_var
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight.detach())
    shift = -mean * scale + (0.0 if bias is None else bias.detach())
    with _disable_current_modes(), torch.no_grad():
        expected = module(image.clone())
        tensors = module.running_mean, module.running_var, weight, bias
        normed = F.batch_norm(image, *tensors, training=False, eps=eps)
        if is_close(normed, expected):
            return Norm(scale, shift, None)
        if isinstance(act := module._modules.get("act"), nn.Module) and is_close(act(normed), expected):
            return Norm(scale, shift, "act")
    return None


def _eps(module: Any) -> float | None:
    eps = vars(module).get("eps")
    return float(eps) if isinstance(eps, int | float) else None
