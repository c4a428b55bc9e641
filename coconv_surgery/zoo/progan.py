"""ProGAN (Karras et al., "Progressive Growing of GANs for Improved Quality, Stability, and Variation", ICLR 2018).

Its generator and discriminator, from 4×4 to 1024×1024 pixels, and CoProGAN's generator, of which Table 2 of the CoConv
paper shows the levels. They grow with the resolution: they are built whole, and a call says how far they have grown,
and how far the last block is faded in.

Source: the reference implementation, whose layers, gains and widths these are: ``G_paper`` and ``D_paper`` of
https://github.com/tkarras/progressive_growing_of_gans, without labels.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from coconv_surgery.layers.arguments import as_number, kind, shown, whole_number, whole_numbers
from coconv_surgery.surgery import convert
from coconv_surgery.zoo.equalized import EqualizedConv2d, EqualizedLinear, LatentToMap

SMALLEST, LARGEST = 4, 1024
_SLOPE = 0.2
_GROUP = 4  # how many images the standard deviation is taken over


class PixelNorm(nn.Module):
    """Scales the channels at every position to a mean square of 1 (section 4.2 of the ProGAN paper)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(N, C, ...)`` over the channels."""
        normalised: torch.Tensor = _pixel_norm(x)
        return normalised


# Its steps depend on the type of the numbers, which a symbolic trace does not know.
@torch.fx.wrap
def _pixel_norm(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # in half precision the squares overflow, and 1e-8 is 0
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-8)).to(x.dtype)


class MinibatchStdDev(nn.Module):
    """Adds a channel that says how much the images of a batch differ (section 3 of the ProGAN paper).

    The standard deviation is taken over groups of 4 images at every position of every channel, and averaged over
    those. Group k of M has the images k, M + k, 2M + k and 3M + k, as in the reference implementation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add a channel to ``(N, C, H, W)``.

        Raises:
            ValueError: If there are more than 4 images, but not a multiple of 4.
        """
        size = min(_GROUP, len(x))
        if len(x) % size:
            raise ValueError(f"a batch of {len(x)} images: the discriminator takes up to 4, or a multiple of 4")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = wide.reshape(size, -1, *x.shape[1:])
        spread = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        channel = spread.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return torch.cat([x, channel.to(x.dtype)], dim=1)


class Generator(nn.Module):
    """Generates images of up to 4 · 2ⁿ⁻¹ pixels a side from latents, for n resolutions.

    The first block has a linear layer, which makes the 4×4 map, and one 3×3 convolution. Each other one doubles the
    map by nearest-neighbour upsampling and has two 3×3 convolutions. Every resolution has a layer for its colours.

    Args:
        channels: Channels at each resolution. Default: Table 2's rows, for 128×128 pixels.
        latent: Size of the latent.
        colours: Channels of the image.

    Raises:
        ValueError: If an argument is not a number that it can be.

    >>> generator = Generator((16, 16, 8), latent=16)
    >>> generator(torch.randn(2, 16)).shape
    torch.Size([2, 3, 16, 16])
    >>> generator(torch.randn(2, 16), 8, fade=0.25).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self, channels: Sequence[int] = (512, 512, 512, 512, 256, 128), latent: int = 512, colours: int = 3
    ) -> None:
        super().__init__()
        channels = _channels(channels)
        self.latent = whole_number(latent, "latent", at_least=1)
        self.colours = whole_number(colours, "colours", at_least=1)
        self.norm = PixelNorm()
        self.blocks = nn.ModuleList([_FirstBlock(latent, channels[0])])
        self.blocks.extend(_UpBlock(wide, narrow) for wide, narrow in pairwise(channels))
        self.to_rgb = nn.ModuleList(EqualizedConv2d(count, colours, 1, gain=1) for count in channels)

    @property
    def resolution(self) -> int:
        """Side of the images when it is fully grown."""
        return SMALLEST << (len(self.blocks) - 1)

    @property
    def example_input_array(self) -> torch.Tensor:
        """A latent to call it with, ``(1, latent)``, the same one each time."""
        generator = torch.Generator("cpu").manual_seed(0)
        return _like_weights(self, torch.randn(1, self.latent, generator=generator, device="cpu"))

    def forward(self, latent: torch.Tensor, resolution: int | None = None, fade: float = 1.0) -> torch.Tensor:
        """Generate images.

        Args:
            latent: ``(N, latent)``; it is scaled to a mean square of 1.
            resolution: Side of the images: how far it has grown. Default: fully.
            fade: Share of the last block in the image, from 0 to 1. The rest is the image of the block before,
                upsampled.

        Returns:
            ``(N, colours, resolution, resolution)``, for colours from -1 to 1.

        Raises:
            ValueError: If it does not grow through this resolution, or the share is out of range.
        """
        blocks = _grown(len(self.blocks), resolution, fade)
        x = self.norm(latent)
        for block in self.blocks[: blocks - 1]:
            x = block(x)
        grown = self.blocks[blocks - 1](x)
        image: torch.Tensor = self.to_rgb[blocks - 1](grown)
        if blocks > 1 and fade < 1:
            image = torch.lerp(_double(self.to_rgb[blocks - 2](x)), image, fade)
        return image


class Discriminator(nn.Module):
    """Scores images: the mirror image of the generator.

    Args:
        channels: Channels at each resolution, the smallest first. Default: Table 2's rows, for 128×128 pixels.
        hidden: Size of the hidden layer before the score. Default: channels at the smallest resolution.
        colours: Channels of the image.

    Raises:
        ValueError: If an argument is not a number that it can be.

    >>> Discriminator((16, 16, 8))(torch.randn(4, 3, 16, 16)).shape
    torch.Size([4])
    """

    def __init__(
        self,
        channels: Sequence[int] = (512, 512, 512, 512, 256, 128),
        hidden: int | None = None,
        colours: int = 3,
    ) -> None:
        super().__init__()
        channels = _channels(channels)
        hidden = channels[0] if hidden is None else whole_number(hidden, "hidden", at_least=1)
        self.colours = whole_number(colours, "colours", at_least=1)
        self.act = nn.LeakyReLU(_SLOPE)
        self.from_rgb = nn.ModuleList(EqualizedConv2d(colours, count, 1) for count in channels)
        self.blocks = nn.ModuleList([_LastBlock(channels[0], hidden)])
        self.blocks.extend(_DownBlock(narrow, wide) for wide, narrow in pairwise(channels))

    @property
    def resolution(self) -> int:
        """Side of the images when it is fully grown."""
        return SMALLEST << (len(self.blocks) - 1)

    @property
    def example_input_array(self) -> torch.Tensor:
        """Four images to call it with, of colours from -1 to 1, the same ones each time."""
        generator = torch.Generator("cpu").manual_seed(0)
        shape = (_GROUP, self.colours, self.resolution, self.resolution)
        return _like_weights(self, 2 * torch.rand(shape, generator=generator, device="cpu") - 1)

    def forward(self, images: torch.Tensor, fade: float = 1.0) -> torch.Tensor:
        """Score images, high ones as real.

        Args:
            images: ``(N, colours, H, W)``; how large they are says how far it has grown.
            fade: Share of the block for this resolution, from 0 to 1. The rest passes by it, downsampled.

        Returns:
            ``(N,)``.

        Raises:
            ValueError: If it does not grow through this resolution, or the share is out of range.
        """
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"images of {images.shape[-2]}×{images.shape[-1]} pixels: the discriminator takes squares")
        blocks = _grown(len(self.blocks), images.shape[-1], fade)
        x = self.blocks[blocks - 1](self.act(self.from_rgb[blocks - 1](images)))
        if blocks > 1 and fade < 1:
            x = torch.lerp(self.act(self.from_rgb[blocks - 2](F.avg_pool2d(images, 2))), x, fade)
        for block in reversed(self.blocks[: blocks - 1]):
            x = block(x)
        score: torch.Tensor = x.squeeze(1)
        return score


class _FirstBlock(nn.Module):
    def __init__(self, latent: int, channels: int) -> None:
        super().__init__()
        # The reference implementation divides the gain by 4, to learn as an earlier one of its authors did.
        self.dense = LatentToMap(latent, channels, SMALLEST, gain=math.sqrt(2) / 4)
        self.conv = EqualizedConv2d(channels, channels, 3, padding=1)
        self.act = nn.LeakyReLU(_SLOPE)
        self.norm = PixelNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.act(self.dense(x)))
        x = self.norm(self.act(self.conv(x)))
        return x


class _UpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, outputs, 3, padding=1)
        self.conv1 = EqualizedConv2d(outputs, outputs, 3, padding=1)
        self.act = nn.LeakyReLU(_SLOPE)
        self.norm = PixelNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.act(self.conv0(_double(x))))
        x = self.norm(self.act(self.conv1(x)))
        return x


class _DownBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv0 = EqualizedConv2d(inputs, inputs, 3, padding=1)
        self.conv1 = EqualizedConv2d(inputs, outputs, 3, padding=1)
        self.act = nn.LeakyReLU(_SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv0(x))
        x = self.act(self.conv1(x))
        return F.avg_pool2d(x, 2)


class _LastBlock(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.spread = MinibatchStdDev()
        self.conv = EqualizedConv2d(channels + 1, channels, 3, padding=1)
        self.dense0 = EqualizedLinear(channels * SMALLEST**2, hidden)
        self.dense1 = EqualizedLinear(hidden, 1, gain=1)
        self.act = nn.LeakyReLU(_SLOPE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(self.spread(x)))
        x = self.act(self.dense0(x.flatten(1)))
        score: torch.Tensor = self.dense1(x)
        return score


def widths(resolution: int, fmap_base: int = 8192, fmap_max: int = 512) -> tuple[int, ...]:
    """Channels at each resolution: at 4·2ᵏ pixels ``fmap_base / 2ᵏ⁺¹``, and ``fmap_max`` at most.

    Args:
        resolution: The largest: 4, 8, …, 1024.
        fmap_base: 8192 gives the rows that Table 2 prints, 16384 the totals that it prints.
        fmap_max: Most channels.

    Raises:
        ValueError: If an argument is not a number that it can be.

    >>> widths(128)
    (512, 512, 512, 512, 256, 128)
    >>> widths(128, fmap_base=16384)
    (512, 512, 512, 512, 512, 256)
    """
    count = resolution_index(resolution) + 1
    fmap_base = whole_number(fmap_base, "fmap_base", at_least=1)
    fmap_max = whole_number(fmap_max, "fmap_max", at_least=1)
    channels = tuple(min(fmap_base >> (index + 1), fmap_max) for index in range(count))
    if channels[-1] == 0:
        raise ValueError(f"fmap_base={fmap_base} leaves no channels at {resolution}×{resolution} pixels: take more")
    return channels


def resolution_index(resolution: int) -> int:
    """How often a resolution is twice as large as 4×4.

    Raises:
        ValueError: If it is not 4, 8, …, 1024.

    >>> resolution_index(32)
    3
    """
    side = as_number(resolution)
    if side is None or not SMALLEST <= side <= LARGEST or side & (side - 1):
        raise ValueError(f"resolution={shown(resolution)} must be 4, 8, 16, …, {LARGEST}: a power of two")
    return side.bit_length() - SMALLEST.bit_length()


def progan(
    resolution: int = 128, fmap_base: int = 8192, fmap_max: int = 512, latent: int | None = None, colours: int = 3
) -> Generator:
    """ProGAN's generator.

    Args:
        resolution: Side of the images: 4, 8, …, 1024. CIFAR-10's network is that for 32.
        fmap_base: As of :func:`widths`.
        fmap_max: As of :func:`widths`.
        latent: Size of the latent. Default: ``fmap_max``, or ``fmap_base`` where that is less.
        colours: Channels of the image.

    Raises:
        ValueError: If an argument is not a number that it can be.

    >>> sum(parameter.numel() for parameter in progan(fmap_base=16384).parameters())
    27211538
    """
    channels = widths(resolution, fmap_base, fmap_max)
    return Generator(channels, min(fmap_base, fmap_max) if latent is None else latent, colours)


def coprogan(resolution: int = 128, **arguments: Any) -> Generator:
    """CoProGAN's generator, Table 2: converted by resolution, with channels shared out evenly.

    Args:
        resolution: As of :func:`progan`.
        **arguments: Further arguments of :func:`progan`.

    Raises:
        ValueError: As :func:`progan`.

    >>> generator = coprogan(fmap_max=64)
    >>> generator.blocks[2].conv0.dilations, generator.blocks[2].conv0.splits
    ((1, 2, 3), (22, 21, 21))
    """
    generator = progan(resolution, **arguments)
    convert(generator, "resolution", split="even")
    return generator


def discriminator(resolution: int = 128, fmap_base: int = 8192, fmap_max: int = 512, colours: int = 3) -> Discriminator:
    """ProGAN's discriminator, which CoProGAN has as well.

    Args:
        resolution: As of :func:`progan`.
        fmap_base: As of :func:`widths`.
        fmap_max: As of :func:`widths`.
        colours: Channels of the image.

    Raises:
        ValueError: If an argument is not a number that it can be.
    """
    return Discriminator(widths(resolution, fmap_base, fmap_max), min(fmap_base, fmap_max), colours)


def _channels(channels: Sequence[int]) -> tuple[int, ...]:
    most = resolution_index(LARGEST) + 1
    form = f"must be numbers of at least 1, one for each of up to {most} resolutions"
    return whole_numbers(channels, "channels", form, lengths=range(1, most + 1))


def _grown(most: int, resolution: int | None, fade: float) -> int:
    """How many blocks a network has that has grown so far."""
    blocks = most if resolution is None else resolution_index(resolution) + 1
    if blocks > most:
        full = SMALLEST << (most - 1)
        raise ValueError(f"resolution={resolution}: the network grows up to {full}×{full} pixels")
    if isinstance(fade, bool) or not isinstance(fade, (int, float)):
        raise TypeError(f"fade must be a number from 0 to 1, not {kind(fade)}")
    if not 0 <= fade <= 1:
        raise ValueError(f"fade={fade} must be from 0 to 1")
    return blocks


def _double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _like_weights(model: nn.Module, values: torch.Tensor) -> torch.Tensor:
    return values.to(next(model.parameters()))
