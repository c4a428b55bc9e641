"""A picture of detections next to the ground truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image


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


def save_detections(
    path: str | Path,
    images: Sequence[str | Path | npt.NDArray[np.uint8]],
    truth: Sequence[Boxes],
    detections: Sequence[Boxes],
    classes: Sequence[str],
    *,
    score_threshold: float = 0.5,
    title: str | None = None,
) -> None:
    """Draw images with their ground truth above and their detections below, one image a column.

    Args:
        path: The picture's file; its suffix chooses the format.
        images: One or more, as files or as ``(height, width, 3)`` RGB arrays; four make a good picture.
        truth: Boxes of each image.
        detections: Boxes of each image, with scores.
        classes: Class names.
        score_threshold: Detections with lower scores are not drawn.
        title: Text above the whole.

    Raises:
        ValueError: If ``images`` is empty, or ``truth`` or ``detections`` are not as many.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "detections.png"
    >>> image = np.full((64, 64, 3), 200, np.uint8)
    >>> found = Boxes([[10, 20, 40, 50]], [0], [0.9])
    >>> save_detections(file, [image], [Boxes([[12, 20, 40, 52]], [0])], [found], ["disc"])
    >>> file.exists()
    True
    """
    if not images or not len(images) == len(truth) == len(detections):
        raise ValueError(
            f"{len(images)} images, {len(truth)} truth and {len(detections)} detections: give at least one image, and "
            "as many of the others"
        )
    figure = Figure(figsize=(3.2 * len(images), 6.8), layout="constrained")
    if title is not None:
        figure.suptitle(title)
    grid = figure.subplots(2, len(images), squeeze=False)
    for column, (image, expected, found) in enumerate(zip(images, truth, detections, strict=True)):
        pixels = _read(image)
        for axes, boxes in zip(grid[:, column], (expected, found), strict=True):
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
            _draw(axes, boxes, pixels.shape[:2], classes, score_threshold)
    for axes, name in zip(grid[:, 0], ("ground truth", f"detections, score ≥ {score_threshold:g}"), strict=True):
        axes.set_ylabel(name)
    figure.savefig(path, dpi=120)


def _read(image: str | Path | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        return image
    with Image.open(image) as opened:
        return np.asarray(opened.convert("RGB"))


def _draw(axes: Any, boxes: Boxes, size: tuple[int, int], classes: Sequence[str], score_threshold: float) -> None:
    corners, labels = np.reshape(boxes.corners, (-1, 4)), np.reshape(boxes.labels, -1).astype(int)
    scores = np.full(len(labels), np.inf) if boxes.scores is None else np.reshape(boxes.scores, -1)
    # The best last, so that they lie on top.
    for index in np.argsort(scores, kind="stable"):
        if scores[index] < score_threshold:
            continue
        left, top, right, bottom = corners[index]
        colour = colormaps["tab10"](labels[index] % 10)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=2.2))
        # Names grow up and to the right from the top left corner, unless they would leave the picture there.
        height, width = size
        fits_above, fits_right = top > 0.06 * height, left < 0.6 * width
        axes.annotate(
            classes[labels[index]] + ("" if boxes.scores is None else f" {scores[index]:.2f}"),
            (left if fits_right else right, top),
            xytext=(0, 1 if fits_above else -1),
            textcoords="offset points",
            ha="left" if fits_right else "right",
            va="bottom" if fits_above else "top",
            color="white",
            fontsize=7,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
        )
