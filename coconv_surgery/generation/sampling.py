"""Images out of a generator: as bytes, in batches, and in a grid; and generators out of a checkpoint."""

import math
from collections.abc import Iterator, Mapping
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
from coconv_surgery.layers.arguments import file_to_read, file_to_write
from coconv_surgery.layers.files import whole_file
from coconv_surgery.layers.metadata import unchecked_levels
from coconv_surgery.planning.plan import Plan
from coconv_surgery.surgery import apply_plan
from coconv_surgery.zoo.progan import Generator

_AVERAGE, _TRAINED = "average.module.", "generator."
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

    def images(self, count: int, seed: int = 0) -> Iterator[torch.Tensor]:
        """Generate images, the same ones for the same seed.

        Args:
            count: How many.
            seed: Of the latents.

        Yields:
            Batches ``(N, colours, H, W)`` of unsigned bytes.
        """
        device = next(self.generator.parameters()).device
        chance = seeded(seed)
        for first in range(0, count, _BATCH):
            latents = torch.randn(min(_BATCH, count - first), self.generator.latent, generator=chance)
            with torch.inference_mode():
                yield as_bytes(self.generator(latents.to(device), self.resolution, self.fade))


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
    """
    path = file_to_write(path, "path")
    picture = Image.fromarray(grid(torch.cat(list(grown.images(count, seed)))))
    with whole_file(path, "path") as passing:
        picture.save(passing, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"))


def load_grown(path: str | Path) -> Grown:
    """Read the generator of a checkpoint: the averaged one, with the levels and the growth that it was trained with.

    Args:
        path: A checkpoint of a training of :class:`~coconv_surgery.generation.model.ProGAN`, or a state dict of a
            :class:`~coconv_surgery.zoo.progan.Generator`, which is taken to be fully grown. No code in it is executed.

    Raises:
        TypeError: If ``path`` is not a path.
        CheckpointError: If it cannot be read, or has no generator.
        OSError: If it cannot be opened.
    """
    path = file_to_read(path, "path")
    content = read_checkpoint(path)
    weights = weights_in(content, path)
    prefix = next((each for each in (_AVERAGE, _TRAINED) if any(name.startswith(each) for name in weights)), "")
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    generator = _built(state, path)
    if (plan := plan_of(content)) is not None:
        apply_plan(generator, _of_generator(plan, prefix, path))
    with unchecked_levels():  # they are those of the file
        generator.load_state_dict(state)
    seen, resolution, fade = None, generator.resolution, 1.0
    if isinstance(progress := weights.get("progress"), torch.Tensor):
        seen, _, resolution, fade = progress.tolist()
    return Grown(generator.eval(), int(resolution), fade, None if seen is None else int(seen))


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


def _of_generator(plan: Plan, prefix: str, path: Path) -> Plan:
    """The part of a plan that is about the generator, by its own names."""
    places = [prefix, _TRAINED] if prefix else [""]
    for place in places:
        rows = [replace(row, name=row.name.removeprefix(place)) for row in plan.rows if row.name.startswith(place)]
        if rows:
            return replace(plan, rows=tuple(rows))
    raise CheckpointError(f"{path} tells how another part was converted, but nothing of its generator")
