"""A picture of times side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from coconv_surgery.viz.theme import Mode, Theme, drawing

_COLUMNS = 3
_OFFSETS = (-0.22, 0.0, 0.22)
_CONTENDERS = len(_OFFSETS)

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


def plot_timings(panels: Sequence[Panel], path: str | Path, title: str = "", *, mode: Mode = "light") -> None:
    """Draw ratios to the plain convolution with their quartiles.

    Args:
        panels: What to draw, with the same contenders in each.
        path: The picture's file; its suffix chooses the format.
        title: A heading, such as the machine.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.
    """
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.0 + 0.26 * max(len(panel.labels) for panel in panels)
    with drawing(path, 1.5 + 3.2 * columns, 0.8 + height * rows, mode) as (figure, theme):
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, theme, panel)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        named = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid)
        handles = {label: handle for pairs in named for handle, label in pairs}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=_CONTENDERS, fontsize=8)
        figure.suptitle(f"Time over that of the plain one\n{title}", fontsize=10)


def _draw_panel(axes: Axes, theme: Theme, panel: Panel) -> None:
    colours = (theme.categories[1], theme.muted, theme.categories[0])
    for offset, colour, (name, ratios) in zip(_OFFSETS, colours, panel.series.items(), strict=False):
        points = [(line + offset, *ratio) for line, ratio in enumerate(ratios) if ratio is not None]
        if points:
            lines, medians, lows, highs = np.transpose(points)
            spread = (medians - lows, highs - medians)
            axes.errorbar(medians, lines, xerr=spread, fmt="o", markersize=3.5, color=colour, label=name)
    axes.axvline(1.0, color=theme.ink, linewidth=0.8)
    axes.set_title(panel.title, fontsize=9)
    axes.set_yticks(range(len(panel.labels)), panel.labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(min(0.8, axes.get_xlim()[0]), max(1.6, axes.get_xlim()[1]))
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x")
