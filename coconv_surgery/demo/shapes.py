"""A small detection data set of drawn shapes, for trying a detector out without a download.

A class is an outline together with its surroundings: the same outline is one class when bare and another inside a ring.
The ring lies wholly outside the box, so the outline tells half of the class and the context the other half. Rings
around nothing, which do not belong to any class, ensure that a ring alone tells nothing.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from coconv_surgery.layers.arguments import instance, whole_number

OUTLINES = ("disc", "square", "triangle")
CLASSES = tuple(f"{surroundings}{outline}" for outline in OUTLINES for surroundings in ("", "ringed "))

_FORMAT = 1  # raise it when the same arguments draw other images
_META = "shapes.json"
_CORNERS = {"disc": 0, "square": 4, "triangle": 3}
# In radii of the circle around the outline; the corners of the outline's box lie at up to 1.42.
_RING = (1.5, 1.7)
_REACH = 1.75

_Floats = npt.NDArray[np.floating[Any]]


def write_shapes(root: str | Path, *, train: int = 512, val: int = 128, size: int = 300, seed: int = 0) -> bool:
    """Write the data set in COCO format: ``train/``, ``val/``, ``annotations/train.json`` and ``annotations/val.json``.

    The same arguments give the same bytes (with the same numpy and Pillow), and an image does not depend on how many
    others there are. The folder appears whole or not at all: it is written under another name, then renamed.

    Args:
        root: The folder; created with its parents.
        train: Images to train on.
        val: Images to validate on.
        size: Sides of the square images in pixels, at least 64.
        seed: Not negative.

    Returns:
        True if it was written, False if the folder already holds exactly this data set.

    Raises:
        ValueError: If an argument is out of range, or if ``root`` holds something else.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "shapes"
    >>> write_shapes(folder, train=2, val=1), write_shapes(folder, train=2, val=1)
    (True, False)
    >>> sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))
    ['annotations/train.json', 'annotations/val.json', 'train/000001.jpg', 'train/000002.jpg', 'val/000001.jpg']
    """
    train, val = whole_number(train, "train", at_least=1), whole_number(val, "val", at_least=1)
    size, seed = whole_number(size, "size", at_least=64), whole_number(seed, "seed", at_least=0)
    instance(root, "root", (str, os.PathLike), "the path of a folder")
    root = Path(root).absolute()
    meta = {"format": _FORMAT, "train": train, "val": val, "size": size, "seed": seed}
    if _holds(root, meta):
        return False
    partial = root.with_name(f".{root.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    (partial / "annotations").mkdir(parents=True)
    _write_split(partial, "train", train, size, (seed, 0))
    _write_split(partial, "val", val, size, (seed, 1))
    (partial / _META).write_text(json.dumps(meta))
    partial.replace(root)
    return True


def _holds(root: Path, meta: dict[str, int]) -> bool:
    """Whether the folder already holds this data set; raises if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / _META).is_file():
        raise ValueError(f"{root} exists and is not a shapes data set: choose another folder")
    found = json.loads((root / _META).read_text())
    changed = [f"{key}={found.get(key)} instead of {value}" for key, value in meta.items() if found.get(key) != value]
    if changed:
        raise ValueError(f"{root} holds shapes with {', '.join(changed)}: delete it or choose another folder")
    return True


def _write_split(root: Path, split: str, count: int, size: int, seed: tuple[int, int]) -> None:
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        rng = np.random.default_rng((*seed, image_id))
        things = _place(rng, size)
        name = f"{image_id:06d}.jpg"
        Image.fromarray(_draw(rng, size, things)).save(root / split / name, quality=90)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for thing in things:
            if thing.outline is None:
                continue
            x, y, width, height = thing.box()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1 + 2 * OUTLINES.index(thing.outline) + thing.ringed,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category, "name": name} for category, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


class _Thing(NamedTuple):
    """A bare outline, a ringed one, or a ring around nothing; ``radius`` is that of the circle around the outline."""

    outline: str | None
    ringed: bool
    x: float
    y: float
    radius: float
    angle: float

    def corners(self) -> _Floats:
        """The directions of the outline's corners; a disc has none."""
        if self.outline is None:
            return np.empty(0)
        return self.angle + np.linspace(0, 2 * np.pi, _CORNERS[self.outline], endpoint=False)

    def box(self) -> list[float]:
        """The outline's box, ``[x, y, width, height]``."""
        corners = self.corners()
        extremes = np.stack((np.cos(corners), np.sin(corners))) if len(corners) else np.array([[-1, 1], [-1, 1]])
        low = self.radius * extremes.min(axis=1) + (self.x, self.y)
        return [round(float(value), 2) for value in (*low, *self.radius * np.ptp(extremes, axis=1))]

    def edge_distance(self, x: _Floats, y: _Floats) -> _Floats:
        """Distance of points, given from the centre, to the outline's edge; negative inside."""
        corners = self.corners()
        if not len(corners):
            return np.hypot(x, y) - self.radius
        half_turn = np.pi / len(corners)
        sides = [x * np.cos(side) + y * np.sin(side) for side in corners + half_turn]
        distance: _Floats = np.max(sides, axis=0) - self.radius * np.cos(half_turn)
        return distance


def _place(rng: np.random.Generator, size: int) -> list[_Thing]:
    """Choose what an image holds: up to six things, whose surroundings neither overlap nor leave the image."""
    things: list[_Thing] = []
    wanted = rng.integers(2, 7)
    for _ in range(50):
        kind = int(rng.integers(len(CLASSES) + 1))
        outline, ringed = (OUTLINES[kind // 2], kind % 2 == 1) if kind < len(CLASSES) else (None, True)
        radius, angle = size * rng.uniform(0.05, 0.15), rng.uniform(0, 2 * np.pi)
        x, y = rng.uniform(_REACH * radius, size - _REACH * radius, 2)
        free = all(np.hypot(x - other.x, y - other.y) > _REACH * (radius + other.radius) for other in things)
        # A ring around nothing is never the first, so that every image has something to find.
        if free and (things or outline is not None):
            things.append(_Thing(outline, ringed, x, y, radius, angle))
        if len(things) == wanted:
            break
    return things


def _draw(rng: np.random.Generator, size: int, things: list[_Thing]) -> npt.NDArray[np.uint8]:
    """Draw an image, ``(size, size, 3)``."""
    image = _background(rng, size)
    light = rng.uniform(0, 2 * np.pi)
    for thing in things:
        reach = _REACH * thing.radius
        left, top = int(thing.x - reach), int(thing.y - reach)
        window = image[top : int(thing.y + reach) + 1, left : int(thing.x + reach) + 1]
        rows, columns = np.indices(window.shape[:2])
        x, y = columns + left + 0.5 - thing.x, rows + top + 0.5 - thing.y
        if thing.ringed:
            inner, outer = (thing.radius * edge for edge in _RING)
            distance = np.hypot(x, y)
            _paint(window, _contrasting(rng, window), np.maximum(inner - distance, distance - outer))
        if thing.outline is not None:
            shade = 1 + 0.2 / thing.radius * (x * np.cos(light) + y * np.sin(light))
            _paint(window, _contrasting(rng, window) * shade[..., None], thing.edge_distance(x, y))
    image += 5 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, size: int) -> _Floats:
    """Two textured grounds with an irregular border, lit from above or below: ``(size, size, 3)``, up to 255."""
    grounds = []
    for smoothness in rng.uniform(0.4, 1.6, 2):
        # Muted, as most of a photograph is: the channels share most of their level and of their contrast.
        colour = rng.uniform(70, 185) + rng.uniform(-30, 30, 3)
        contrast = rng.choice((-25, 25)) + rng.uniform(-10, 10, 3)
        texture = _texture(rng, size, smoothness)[..., None]
        grounds.append(colour.astype(np.float32) + contrast.astype(np.float32) * texture)
    share = 1 / (1 + np.exp(-8 * _texture(rng, size, 1.6)[..., None]))
    lighting = 1 + rng.uniform(0, 0.3) * np.linspace(-1, 1, size, dtype=np.float32)[:, None, None]
    image: _Floats = (grounds[0] * share + grounds[1] * (1 - share)) * lighting
    return image


def _texture(rng: np.random.Generator, size: int, smoothness: float) -> _Floats:
    """Noise over several octaves, ``(size, size)``, of mean 0 and deviation 1; low ``smoothness`` is grainy."""
    octaves = (3, 6, 12, 24, 48)
    texture: _Floats = np.zeros((1, 1), np.float32)
    for cells, side in zip(octaves, (*octaves[1:], size), strict=True):
        detail = rng.standard_normal((cells, cells), dtype=np.float32) * cells**-smoothness
        coarse = Image.fromarray(texture + detail)
        texture = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    texture = (texture - texture.mean()) / texture.std()
    return texture


def _contrasting(rng: np.random.Generator, window: _Floats) -> _Floats:
    """A strong colour that stands out from what is there."""
    colour = rng.uniform(0, 80, 3)
    colour = np.where(rng.random(3) < 0.5, colour, 255 - colour)
    there = window.mean(axis=(0, 1))
    return max(colour, 255 - colour, key=lambda choice: float(np.abs(choice - there).sum()))


def _paint(window: _Floats, colour: _Floats, distance: _Floats) -> None:
    """Paint in place wherever the distance to the edge is negative, the edge itself one pixel soft."""
    window += np.clip(0.5 - distance, 0, 1)[..., None] * (colour - window)
