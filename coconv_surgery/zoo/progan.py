"""The generator of ProGAN (Karras et al., ICLR 2018) at its full depth, as Table 2 has it.

It is for counting and converting, and leaves out what only training needs: growing, which fades layers in, and the
equalised learning rate. Neither changes the convolutions or their number.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.layers.arguments import whole_number, whole_numbers
from coconv_surgery.planning.policies import ResolutionPolicy
from coconv_surgery.surgery import convert


class PixelNorm(nn.Module):
    """Scales the channels at every position to a mean square of 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(N, C, H, W)`` over the channels."""
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Generator(nn.Module):
    """Generates images of 4 · 2ⁿ⁻¹ pixels a side from latents, for n resolutions.

    The first resolution has a linear layer, which makes the 4×4 map, and one 3×3 convolution. Each other one doubles
    the map by nearest-neighbour upsampling and has two 3×3 convolutions.

    Args:
        channels: Channels at each resolution. Default: Table 2's, for 128×128 pixels.
        latent: Size of the latent.
        colours: Channels of the image.

    >>> Generator()(torch.zeros(2, 512)).shape
    torch.Size([2, 3, 128, 128])
    """

    def __init__(
        self, channels: Sequence[int] = (512, 512, 512, 512, 256, 128), latent: int = 512, colours: int = 3
    ) -> None:
        super().__init__()
        channels = whole_numbers(channels, "channels", "must be numbers of at least 1, one for each resolution")
        latent = whole_number(latent, "latent", at_least=1)
        colours = whole_number(colours, "colours", at_least=1)
        self.first = nn.Linear(latent, 16 * channels[0])
        self.act = nn.LeakyReLU(0.2)
        self.norm = PixelNorm()
        stages = [nn.Sequential(*_conv(channels[0], channels[0]))]
        for wide, narrow in pairwise(channels):
            stages.append(nn.Sequential(nn.Upsample(scale_factor=2), *_conv(wide, narrow), *_conv(narrow, narrow)))
        self.stages = nn.Sequential(*stages)
        self.to_rgb = nn.Conv2d(channels[-1], colours, 1)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Generate images.

        Args:
            latent: ``(N, latent)``.

        Returns:
            ``(N, colours, H, W)``.
        """
        x = self.first(F.normalize(latent) * latent.shape[1] ** 0.5).unflatten(1, (-1, 4, 4))
        image: torch.Tensor = self.to_rgb(self.stages(self.norm(self.act(x))))
        return image


def progan() -> Generator:
    """Table 2's ProGAN."""
    return Generator()


def coprogan() -> nn.Module:
    """Table 2's CoProGAN: the generator converted by resolution, with channels shared out evenly."""
    generator = Generator()
    latent = torch.zeros(1, generator.first.in_features)
    return convert(generator, ResolutionPolicy(split="even"), example_inputs=latent)


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.2), PixelNorm()
