"""Effective receptive fields: the pixels that the middle of an output does respond to.

Paper: Luo, Li, Urtasun, Zemel, "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
NeurIPS 2016.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn

from coconv_surgery.layers.arguments import as_number, flag, instance, near_miss, text, whole_number
from coconv_surgery.planning.notes import inputs_for
from coconv_surgery.receptive.theoretical import revert_copy, watched_convs
from coconv_surgery.tracing.finding import find_sites
from coconv_surgery.tracing.inputs import Inputs, InputSize
from coconv_surgery.tracing.objects import in_words, tensors_in
from coconv_surgery.tracing.unseen import unseen
from coconv_surgery.tracing.visit import on_a_copy

_SHARE = 1 - 0.9545  # of the largest gradient: where a Gaussian is two standard deviations from its middle


@dataclass(frozen=True)
class EffectiveField:
    """The effective receptive field of a convolution.

    Attributes:
        name: Qualified name of the convolution.
        weight: ``(height, width)`` of the input, float64: how much the middle of the output responds to each pixel,
            divided by the most.
        images: On how many images that is the mean.
    """

    name: str
    weight: npt.NDArray[np.float64]
    images: int

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """``(height, width)``: pixels with more than 1 − 95.45 % of the largest weight, as the paper counts them."""
        return self.weight > _SHARE

    @property
    def area(self) -> int:
        """Pixels inside."""
        return int(self.inside.sum())

    @property
    def side(self) -> float:
        """Side in pixels of the square of that area, which is the paper's size."""
        return math.sqrt(self.area)


def effective_receptive_field(
    model: nn.Module,
    layer: str | None = None,
    images: Any = 8,
    *,
    input_size: InputSize | None = None,
    reverted: bool = False,
) -> EffectiveField:
    """Measure the effective receptive field of a convolution of a network.

    The gradient with respect to the image of the sum of all channels in the middle of the output; its absolute value,
    summed over colours, and averaged over images. It is measured on a copy in evaluation mode, on the device and in the
    dtype of the network. Weights decide: training widens the field, and in many new networks of timm's the residual
    branches give zero (``zero_init_last``), so that what they see does not count yet.

    Args:
        model: The network, which stays what it is.
        layer: Name of the convolution. Default: the last one called with a map of more than one position.
        images: ``(N, channels, height, width)``, as the network wants them; or how many to draw from a normal
            distribution, always the same ones, as the paper does.
        input_size: Size of images that are drawn: side, (height, width) or (channels, height, width). Default: what
            timm says of the network, or else what its conversion was planned for.
        reverted: Whether to measure what :func:`~coconv_surgery.revert` would make of it: the network before, with the
            same weights.

    Returns:
        The field.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If there is no such convolution, the network does not run on the images, or no gradient reaches
            them.

    >>> chain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    >>> effective_receptive_field(chain, images=2, input_size=15).inside.nonzero()[0].min()
    np.int64(5)
    """
    instance(model, "model", nn.Module, "a torch.nn.Module")
    flag(reverted, "reverted")
    names = _names(model, layer)
    with unseen(model):
        batch = _batch(model, images, input_size)
        inputs = Inputs((batch[:1],))
        measure = functools.partial(_measure, names=names, batch=batch, reverted=reverted)
        name, weight = on_a_copy(model, inputs, measure)
    return EffectiveField(name, weight, len(batch))


def _names(model: nn.Module, layer: str | None) -> list[str]:
    sites = find_sites(model)
    if layer is None:
        return [site.name for site in sites]
    known = {name: site.name for site in sites for name in (site.name, *site.aliases)}
    if text(layer, "layer") not in known:
        hint = near_miss(layer, known, 3)
        raise ValueError(f"layer={layer!r}: there is no such convolution{hint and f': {hint}'}")
    return [known[layer]]


def _batch(model: nn.Module, images: Any, input_size: InputSize | None) -> torch.Tensor:
    if as_number(images) is None:
        batch = instance(images, "images", torch.Tensor, "a batch of images, or a number of images to draw")
        if batch.dim() != 4 or not len(batch) or not batch.is_floating_point():
            raise ValueError(f"images must be floating point, (N, channels, height, width), not {tuple(batch.shape)}")
        if input_size is not None:
            raise ValueError("give either images or input_size=, not both: images have a size")
        parameter = next((p for p in model.parameters() if p.is_floating_point()), batch)
        return batch.detach().to(parameter.device, parameter.dtype)
    count = whole_number(images, "images", at_least=1)
    like = inputs_for(model, input_size).args[0]
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(count, *like.shape[1:], generator=generator, device="cpu").to(like)


def _measure(
    twin: nn.Module, names: list[str], batch: torch.Tensor, reverted: bool
) -> tuple[str, npt.NDArray[np.float64]]:
    if reverted:
        revert_copy(twin)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    outputs: list[tuple[str, torch.Tensor]] = []
    for module, site in watched_convs(twin, [site for site in find_sites(twin) if site.name in names]).items():
        module.register_forward_hook(functools.partial(_keep, outputs, site))
    weight = torch.zeros(batch.shape[-2:], dtype=torch.float64)
    name = ""
    for image in _one_by_one(batch):
        outputs.clear()
        name, gradient = _gradient(twin, image, outputs, batch.shape[-2:])
        weight += gradient
    if not weight.isfinite().all() or not weight.max() > 0:
        raise ValueError(f"{name}: the gradient that reaches the images is zero or not finite")
    normalised: npt.NDArray[np.float64] = (weight / weight.max()).numpy()
    return name, normalised


def _one_by_one(batch: torch.Tensor) -> Iterator[torch.Tensor]:
    for image in batch:
        yield image[None].clone().requires_grad_(True)


def _gradient(twin: nn.Module, image: torch.Tensor, outputs: list[Any], size: Any) -> tuple[str, torch.Tensor]:
    try:
        with torch.set_grad_enabled(True):
            list(tensors_in(twin(image.clone())))
    except Exception as error:  # the network's own code
        raise ValueError(f"{type(twin).__name__} does not run on these images ({in_words(error)})") from error
    reached = [(name, output) for name, output in outputs if output.requires_grad]
    if not reached:
        raise ValueError("layer: no convolution asked for is called on what comes from the images")
    name, output = next((found for found in reversed(reached) if max(found[1].shape[-2:]) > 1), reached[-1])
    height, width = output.shape[-2:]
    (gradient,) = torch.autograd.grad(output[..., height // 2, width // 2].sum(), image)
    return name, gradient.abs().sum((0, 1)).double().cpu()


def _keep(outputs: list[tuple[str, torch.Tensor]], name: str, module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, torch.Tensor) and output.dim() == 4:
        # A clone: an activation in place may follow.
        outputs.append((name, output.clone()))
