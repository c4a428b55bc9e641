"""A picture of generated images, beside real ones."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coconv_surgery.viz.theme import Mode, drawing


def plot_samples(path: str | Path, grids: Mapping[str, npt.NDArray[np.uint8]], *, mode: Mode = "light") -> None:
    """Draw grids of images side by side.

    Args:
        path: The picture's file; its suffix chooses the format.
        grids: ``(height, width, 3)`` by title, as of :func:`~coconv_surgery.generation.sampling.grid`.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        ValueError: If there are none.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "samples.png"
    >>> plot_samples(file, {"drawn": np.zeros((18, 18, 3), np.uint8)})
    >>> file.exists()
    True
    """
    if not grids:
        raise ValueError("no grids of images to draw")
    with drawing(path, 3.2 * len(grids), 3.5, mode) as (figure, _):
        for axes, (title, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
            axes.imshow(grid, interpolation="nearest")
            axes.set_title(title, fontsize=11)
            axes.set_axis_off()
