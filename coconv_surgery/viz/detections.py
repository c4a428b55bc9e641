"""A picture of detections next to the ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from coconv_surgery.viz.lettering import width_of
from coconv_surgery.viz.placing import Corners, place_labels
from coconv_surgery.viz.theme import Mode, Theme, drawing, ink_on

_COLUMN, _IMAGE = 3.2, 2.8  # inches: of a column, and of the longer side of an image in it at least
_TEXT, _LINE = 7.0, 0.14  # points of the font, inches of a line


class Boxes(NamedTuple):
    """The boxes of one image.

    Attributes:
        corners: ``(n, 4)``: left, top, right and bottom in pixels.
        labels: ``(n,)``: indices into the class names.
        scores: ``(n,)``; None for ground truth.
    """

    corners: npt.ArrayLike
    labels: npt.ArrayLike
    scores: npt.ArrayLike | None = None


def plot_detections(
    path: str | Path,
    images: Sequence[str | Path | npt.NDArray[np.uint8]],
    truth: Sequence[Boxes],
    detections: Sequence[Boxes],
    classes: Sequence[str],
    *,
    score_threshold: float = 0.5,
    title: str | None = None,
    mode: Mode = "light",
) -> None:
    """Draw images with their ground truth above and their detections below, one image a column.

    No label covers another as long as there is room in the image.

    Args:
        path: The picture's file; its suffix chooses the format.
        images: One or more, as files or as ``(height, width, 3)`` RGB arrays; four make a good picture.
        truth: Boxes of each image.
        detections: Boxes of each image, with scores.
        classes: Class names.
        score_threshold: Detections with lower scores are not drawn.
        title: Text above the whole.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        ValueError: If ``images`` is empty, or ``truth`` or ``detections`` are not as many.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "detections.png"
    >>> image = np.full((64, 64, 3), 200, np.uint8)
    >>> found = Boxes([[10, 20, 40, 50]], [0], [0.9])
    >>> plot_detections(file, [image], [Boxes([[12, 20, 40, 52]], [0])], [found], ["disc"])
    >>> file.exists()
    True
    """
    if not images or not len(images) == len(truth) == len(detections):
        raise ValueError(
            f"{len(images)} images, {len(truth)} truth and {len(detections)} detections: give at least one image, and "
            "as many of the others"
        )
    with drawing(path, _COLUMN * len(images), 6.8, mode) as (figure, theme):
        if title is not None:
            figure.suptitle(title)
        grid = figure.subplots(2, len(images), squeeze=False)
        for column, (image, expected, found) in enumerate(zip(images, truth, detections, strict=True)):
            pixels = _read(image)
            for axes, boxes in zip(grid[:, column], (expected, found), strict=True):
                axes.imshow(pixels)
                axes.set(xticks=[], yticks=[])
                _draw(axes, theme, boxes, pixels.shape[:2], classes, score_threshold)
        for axes, name in zip(grid[:, 0], ("ground truth", f"detections, score ≥ {score_threshold:g}"), strict=True):
            axes.set_ylabel(name)


def _read(image: str | Path | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        return image
    with Image.open(image) as opened:
        return np.asarray(opened.convert("RGB"))


def _draw(
    axes: Axes, theme: Theme, boxes: Boxes, size: tuple[int, int], classes: Sequence[str], score_threshold: float
) -> None:
    corners, labels = np.reshape(boxes.corners, (-1, 4)), np.reshape(boxes.labels, -1).astype(int)
    scores = np.full(len(labels), np.inf) if boxes.scores is None else np.reshape(boxes.scores, -1)
    # The best first: their labels have the first choice of places.
    shown = [index for index in np.argsort(-scores, kind="stable") if scores[index] >= score_threshold]
    names = [classes[labels[i]] + ("" if boxes.scores is None else f" {scores[i]:.2f}") for i in shown]
    colours = [theme.categories[labels[i] % len(theme.categories)] for i in shown]
    for index, colour in zip(reversed(shown), reversed(colours), strict=True):
        left, top, right, bottom = corners[index]
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2.2))
    height, width = size
    scale = max(width, height) / _IMAGE  # pixels of the image to an inch of the picture
    sizes = [((width_of(name, _TEXT) + 0.06) * scale, _LINE * scale) for name in names]
    for place, name, colour in zip(place_labels(corners[shown], sizes, (width, height)), names, colours, strict=True):
        _write(axes, place, name, colour)


def _write(axes: Axes, place: Corners, name: str, colour: str) -> None:
    left, top, right, bottom = place
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, color=colour, linewidth=0, zorder=3))
    middle = ((left + right) / 2, (top + bottom) / 2)
    axes.text(*middle, name, color=ink_on(colour), fontsize=_TEXT, ha="center", va="center_baseline", zorder=4)
