"""A picture of generated images, beside real ones."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure


def save_samples(path: str | Path, sets: Mapping[str, torch.Tensor]) -> None:
    """Draw sets of images side by side, each as a square of images.

    Args:
        path: The picture's file; its suffix chooses the format.
        sets: ``(N, C, H, W)`` of unsigned bytes by title.

    Raises:
        ValueError: If there are no sets.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "samples.png"
    >>> save_samples(file, {"drawn": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)})
    >>> file.exists()
    True
    """
    if not sets:
        raise ValueError("no sets of images to draw")
    figure = Figure(figsize=(3.2 * len(sets), 3.5), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        axes.imshow(_tiled(images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def _tiled(images: torch.Tensor) -> torch.Tensor:
    """Images in rows, with a white line between."""
    columns = math.ceil(math.sqrt(len(images)))
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)
    missing = -len(images) % columns
    full = torch.cat([framed, framed.new_full((missing, *framed.shape[1:]), 255)])
    rows = [torch.cat(list(row), dim=2) for row in torch.split(full, columns)]
    return torch.cat(rows, dim=1).permute(1, 2, 0)
