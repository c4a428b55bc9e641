"""A picture of times side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from coconv_surgery.bench.speed import Timing

_COLUMNS = 3
_SERIES = (
    ("alone", "the levels' convolutions alone", "C1"),
    ("authors", "authors' layout", "0.6"),
    ("coconv", "CoConv", "C0"),
)


def draw_timings(timings: Sequence[Timing], path: str | Path, title: str = "") -> None:
    """Draw each case's ratio to the plain convolution, with its quartiles; a panel for each layer or network.

    Args:
        timings: What to draw.
        path: The picture's file; the suffix says which format.
        title: A heading, such as the machine.
    """
    subjects = list(dict.fromkeys(timing.case.subject for timing in timings))
    panels = [[timing for timing in timings if timing.case.subject == subject] for subject in subjects]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.0 + 0.26 * max(map(len, panels))
    figure = Figure(figsize=(1.5 + 3.2 * columns, 0.8 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, subject, panel in zip(grid, subjects, panels, strict=False):
        _draw_panel(axes, panel)
        axes.set_title(subject, fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(_SERIES), frameon=False, fontsize=8
    )
    figure.suptitle(f"Time over that of the plain convolution\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Any, timings: Sequence[Timing]) -> None:
    for offset, (name, label, colour) in zip((-0.22, 0.0, 0.22), _SERIES, strict=True):
        found = [(row + offset, getattr(timing, name)) for row, timing in enumerate(timings)]
        found = [(row, ratio) for row, ratio in found if ratio is not None]
        if found:
            rows, ratios = zip(*found, strict=True)
            spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
            middles = [ratio.median for ratio in ratios]
            axes.errorbar(middles, rows, xerr=spread, fmt="o", markersize=3.5, color=colour, label=label)
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    cases = [timing.case for timing in timings]
    labels = [f"{case.mode} · {case.layout} · {case.precision} · {case.engine}" for case in cases]
    axes.set_yticks(range(len(timings)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlim(min(0.8, axes.get_xlim()[0]), max(1.6, axes.get_xlim()[1]))
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", linewidth=0.4)
    axes.spines[["top", "right"]].set_visible(False)
