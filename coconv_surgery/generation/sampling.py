"""Images out of a generator: as bytes, in batches, and in a grid; and generators out of a checkpoint."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.utils import make_grid

import coconv_surgery.mmengine  # noqa: F401 (which lets the safe reader take its checkpoints)
from coconv_surgery.checkpoint.origin import plan_of
from coconv_surgery.checkpoint.reading import CheckpointError, read_checkpoint, weights_in
from coconv_surgery.generation.images import seeded
from coconv_surgery.layers.arguments import file_to_read, file_to_write, whole_number
from coconv_surgery.layers.files import whole_file
from coconv_surgery.layers.metadata import PlainWeightsWarning, unchecked_levels
from coconv_surgery.planning.notes import is_guard
from coconv_surgery.planning.plan import Plan
from coconv_surgery.surgery import apply_plan, complete_plan
from coconv_surgery.zoo.progan import Generator

_PARTS = ("average.", "generator.")  # of a model that trains one: the averaged generator first
_BATCH = 32


class Grown(NamedTuple):
    """A generator, and how far it has grown.

    Attributes:
        generator: In evaluation mode.
        resolution: Side of the images.
        fade: Share of the newest block.
        images_seen: Real images that its discriminator has seen; None where a file does not tell.
    """

    generator: Generator
    resolution: int
    fade: float
    images_seen: int | None

    def __str__(self) -> str:
        seen = "" if self.images_seen is None else f" after {self.images_seen:,} real ones"
        faded = "" if self.fade == 1 else f", the newest block faded in by {self.fade:.0%}"
        return f"of {self.resolution}×{self.resolution} pixels{seen}{faded}"

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.generator.parameters()).device

    def images(self, count: int, seed: int = 0) -> Iterator[torch.Tensor]:
        """Generate images, the same ones for the same seed.

        Args:
            count: How many.
            seed: Of the latents.

        Yields:
            Batches ``(N, colours, H, W)`` of unsigned bytes.
        """
        chance = seeded(seed)
        for first in range(0, count, _BATCH):
            latents = torch.randn(min(_BATCH, count - first), self.generator.latent, generator=chance)
            with torch.inference_mode():
                yield as_bytes(self.generator(latents.to(self.device), self.resolution, self.fade))


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """Colours from -1 to 1 as unsigned bytes; what is out of range is cut.

    >>> as_bytes(torch.tensor([-2.0, -1.0, 0.0, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def grid(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Images side by side.

    Args:
        images: ``(N, 1 or 3, H, W)`` of unsigned bytes.

    Returns:
        ``(height, width, 3)``.
    """
    side = images.shape[-1]
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images of {images.shape[1]} colours cannot be pictured: of 1 or 3 they can")
    if side < 32:  # so that one sees something
        images = images.repeat_interleave(32 // side, -1).repeat_interleave(32 // side, -2)
    tiled = make_grid(images, nrow=math.ceil(math.sqrt(len(images))), padding=2, pad_value=255)
    return np.ascontiguousarray(tiled.permute(1, 2, 0).numpy())


def write_grid(grown: Grown, path: str | Path, count: int = 64, seed: int = 0) -> None:
    """Picture what a generator makes.

    Args:
        grown: The generator.
        path: The file, such as ``grid.png``.
        count: How many images.
        seed: Of the latents.

    Raises:
        OSError: If it cannot be written.
        ValueError: If its name is none of a picture, ``count`` is not a number, or the images are neither grey nor in
            colour.
    """
    path, count = file_to_write(path, "path"), whole_number(count, "count", at_least=1)
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in Image.SAVE:
        raise ValueError(f"{path}: name a picture, such as grid.png")
    picture = Image.fromarray(grid(torch.cat(list(grown.images(count, seed)))))
    with whole_file(path, "path") as passing:
        picture.save(passing, format=form)


def load_grown(path: str | Path, device: torch.device | str = "cpu") -> Grown:
    """Read the generator of a checkpoint: the averaged one, with the levels and the growth that it was trained with.

    Args:
        path: A checkpoint of a training of :class:`~coconv_surgery.generation.model.ProGAN`, or weights of a
            :class:`~coconv_surgery.zoo.progan.Generator`, which is taken to be fully grown. No code in it is executed.
        device: Where to put it.

    Raises:
        TypeError: If ``path`` is not a path.
        CheckpointError: If it cannot be read, or has no generator.
        OSError: If it cannot be opened.
    """
    path = file_to_read(path, "path")
    content = read_checkpoint(path)
    weights = weights_in(content, path)
    prefix = next((each for each in _PARTS if any(name.startswith(each) for name in weights)), "")
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    state = {name: value for name, value in own.items() if not is_guard(name)}
    generator = _built(state, path)
    if (plan := plan_of(path)) is not None:
        _convert_alike(generator, plan, prefix, path)
    elif not any(hasattr(each, "_metadata") for each in (content, *content.values())):
        warnings.warn(
            PlainWeightsWarning(f"{path} does not say whether its generator was converted: it is taken to be plain"),
            stacklevel=2,
        )
    with unchecked_levels():  # they are those of the file
        generator.load_state_dict(state)
    generator.to(device).eval()
    if not isinstance(progress := weights.get("progress"), torch.Tensor):
        return Grown(generator, generator.resolution, 1.0, None)
    if progress.shape != (5,):
        raise CheckpointError(f"{path} does not say how far its generator has grown: progress is {progress.tolist()}")
    seen, _, resolution, fade, _ = progress.tolist()
    return Grown(generator, int(resolution), fade, int(seen))


def part_of_plan(plan: Plan, places: Sequence[str]) -> Plan | None:
    """What a plan says of a part of the network, by the part's own names.

    Args:
        plan: The plan.
        places: What the part's names may begin with.

    Returns:
        The plan of the first of them, the longest first, that it says something of; None if it says nothing.
    """
    for place in sorted(places, key=len, reverse=True):
        rows = tuple(
            replace(row, name=row.name.removeprefix(place), aliases=())
            for row in plan.rows
            if row.name.startswith(place)
        )
        if rows:
            return replace(plan, rows=rows)
    return None


def _built(state: Mapping[str, Any], path: Path) -> Generator:
    """A generator for these weights, plain and with other ones."""
    try:
        latent, _ = state["blocks.0.dense.weight"].shape[:2]
        colours = state["to_rgb.0.weight"].shape[0]
        channels = [state[f"to_rgb.{n}.weight"].shape[1] for n in range(len(state)) if f"to_rgb.{n}.weight" in state]
        with torch.device("meta"):
            generator = Generator(channels, latent, colours)
        expected = {name: value.shape for name, value in generator.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != expected:
            raise KeyError
    except (KeyError, AttributeError, ValueError):
        raise CheckpointError(
            f"{path} does not hold a generator of ProGAN: give a checkpoint of a training by configs/progan/"
        ) from None
    return generator.to_empty(device="cpu")


def _convert_alike(generator: Generator, plan: Plan, prefix: str, path: Path) -> None:
    """Convert a generator as the one of a file was."""
    part = part_of_plan(plan, [*_PARTS, "generator.module."] if prefix else [""])
    if part is not None:
        # Of what ran in the file's network alone, such as colours of smaller images, a plan may say nothing.
        apply_plan(generator, complete_plan(generator, part))
    elif not all(row.name.startswith("discriminator.") for row in plan.rows):
        raise CheckpointError(f"{path} tells how another part was converted, but nothing of its generator")
