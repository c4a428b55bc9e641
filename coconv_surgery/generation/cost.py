"""What a training costs, counted and not measured."""

from functools import partial
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from coconv_surgery.generation.losses import discriminator_losses, generator_loss
from coconv_surgery.generation.model import ProGAN

_BATCH = 4


class Cost(NamedTuple):
    """What the images of one resolution cost.

    Attributes:
        resolution: Their side.
        images: Real images that are seen at it.
        each: Multiply-adds of a training step of both networks for an image: forward, backward and, for the penalty,
            backward through backward; of convolutions and linear layers, by torch's FLOP counter.
    """

    resolution: int
    images: int
    each: int


def training_cost(model: ProGAN) -> list[Cost]:
    """Count the multiply-adds of a whole training. Nothing is computed.

    Args:
        model: A GAN on the meta device.

    >>> with torch.device("meta"):
    ...     costs = training_cost(ProGAN(8, fmap_base=64, growth=dict(images=3000, stabilise=1000, fade=1000)))
    >>> [(cost.resolution, cost.images) for cost in costs]
    [(4, 1000), (8, 2000)]
    """
    images: dict[int, int] = {}
    for phase in model.growth.phases:
        images[phase.resolution] = images.get(phase.resolution, 0) + phase.end - phase.begin
    return [Cost(side, count, _step(model, side)) for side, count in images.items()]


def _step(model: ProGAN, side: int) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latents = torch.empty(_BATCH, model.latent)
        reals = torch.empty(_BATCH, model.colours, side, side)
        with torch.no_grad():
            fakes = model.generator(latents, side)
        fakes.requires_grad_()  # the counter does not take a gradient with respect to what nothing was computed from
        losses = discriminator_losses(model.discriminator, reals, fakes, torch.empty(_BATCH))
        torch.autograd.backward(list(losses.values()))
        critic = partial(torch.func.functional_call, model.discriminator, _constants(model))
        torch.autograd.backward(generator_loss(critic(model.generator(latents, side))))
    return int(counter.get_total_flops() // 2 // _BATCH)


def _constants(model: ProGAN) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.discriminator.named_parameters()}
