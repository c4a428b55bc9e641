"""A picture of times side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

_COLUMNS = 3
_COLOURS = ("C1", "0.6", "C0")
_OFFSETS = (-0.22, 0.0, 0.22)

Spread = tuple[float, float, float]  # median, lower and upper quartile


class Panel(NamedTuple):
    """What is drawn of one layer or network.

    Attributes:
        title: Its name.
        labels: What was timed, line by line.
        series: Up to three contenders by name; for each line, the median and the quartiles of the contender's ratio to
            the plain convolution, or None where it was not timed.
    """

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[Spread | None]]


def draw_timings(panels: Sequence[Panel], path: str | Path, title: str = "") -> None:
    """Draw ratios to the plain convolution with their quartiles.

    Args:
        panels: What to draw, with the same contenders in each.
        path: The picture's file; its suffix chooses the format.
        title: A heading, such as the machine.
    """
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.0 + 0.26 * max(len(panel.labels) for panel in panels)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 0.8 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(_COLOURS), frameon=False, fontsize=8
    )
    figure.suptitle(f"Time over that of the plain one\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Any, panel: Panel) -> None:
    for offset, colour, (name, ratios) in zip(_OFFSETS, _COLOURS, panel.series.items(), strict=False):
        points = [(line + offset, *ratio) for line, ratio in enumerate(ratios) if ratio is not None]
        if points:
            lines, medians, lows, highs = np.transpose(points)
            spread = (medians - lows, highs - medians)
            axes.errorbar(medians, lines, xerr=spread, fmt="o", markersize=3.5, color=colour, label=name)
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    axes.set_title(panel.title, fontsize=9)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(min(0.8, axes.get_xlim()[0]), max(1.6, axes.get_xlim()[1]))
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
