"""A picture of times side by side."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from coconv_surgery.bench.speed import Timing


def draw_timings(timings: Sequence[Timing], path: str | Path, title: str = "") -> None:
    """Draw each case's ratio to the plain convolution, with its quartiles.

    One series each for CoConv, the authors' layout and, where measured, the levels' convolutions alone.

    Args:
        timings: What to draw, a row each.
        path: The picture's file; the suffix says which format.
        title: A heading, such as the machine.
    """
    figure = Figure(figsize=(9.0, 1.2 + 0.24 * len(timings)), layout="constrained")
    axes = figure.subplots()
    series = (("alone", "the levels' convolutions alone", "C1"), ("authors", "authors' layout", "0.6"))
    for offset, (name, label, colour) in zip((-0.2, 0.0, 0.2), (*series, ("coconv", "CoConv", "C0")), strict=True):
        found = [(row, getattr(timing, name)) for row, timing in enumerate(timings)]
        rows = [row + offset for row, ratio in found if ratio is not None]
        ratios = [ratio for _, ratio in found if ratio is not None]
        if not ratios:
            continue
        middles = [ratio.median for ratio in ratios]
        spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        axes.errorbar(middles, rows, xerr=spread, fmt="o", markersize=4, color=colour, label=label)
    axes.axvline(1.0, color="0.3", linewidth=0.8)
    names = (timing.case for timing in timings)
    labels = [f"{c.subject} · {c.mode} · {c.layout} · {c.precision} · {c.engine}" for c in names]
    axes.set_yticks(range(len(timings)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel("time over that of the plain convolution")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
