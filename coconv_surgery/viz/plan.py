"""A picture of a plan."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from coconv_surgery.layers.arguments import instance, text
from coconv_surgery.layers.functional import pair
from coconv_surgery.planning.plan import Plan, PlanRow
from coconv_surgery.viz.lettering import shortened
from coconv_surgery.viz.strips import BAR, WIDTH, Sheet, lay_out, name_axis
from coconv_surgery.viz.theme import Mode, Theme, drawing

_SHARES, _SIDES = 0.78, 0.46  # heights, in inches
_TOP, _MARGIN = 0.74, 0.02
_TITLE_SIZE, _SMALL = 11.0, 7.5


def plot_plan(plan: Plan, path: str | Path, title: str = "", *, mode: Mode = "light") -> None:
    """Draw how the output channels of each convolution are shared out over dilations, and the sizes of the maps.

    As in the plan's table, other kernels than 3×3 are left out unless they are converted. Many convolutions take
    several strips, in which groups have names instead of each convolution.

    Args:
        plan: The plan.
        path: The picture's file; its suffix chooses the format.
        title: A heading, such as the network's name.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        ValueError: If there is nothing to draw, or the file cannot be one of a picture.
        OSError: If the file's folder is not there.

    >>> import tempfile
    >>> from torch import nn
    >>> from coconv_surgery.surgery import plan_conversion
    >>> plan = plan_conversion(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), input_size=32)
    >>> file = Path(tempfile.mkdtemp()) / "plan.svg"
    >>> plot_plan(plan, file, "one convolution")
    >>> file.exists()
    True
    """
    text(title, "title")
    rows = instance(plan, "plan", Plan, "a Plan").in_question
    if not rows:
        raise ValueError("the plan has no convolution to draw: none is 3×3 or converted")
    sheet = lay_out([row.name for row in rows])
    panels = (_SHARES, _SIDES) if any(row.output_sizes for row in rows) else (_SHARES,)
    height = _TOP + sheet.height(panels) + _MARGIN
    with drawing(path, WIDTH, height, mode) as (figure, theme):
        highest = max(max(pair(dilation)) for row in rows for dilation in row.dilations)
        _write_title(figure, theme, title, _summary(plan, sheet))
        _explain(figure, theme, rows, highest)
        for strip, axes in sheet.draw(figure, theme, _TOP, panels):
            shown = [rows[layer] for layer in strip.layers]
            _draw_shares(axes[0], theme, shown, strip.places, highest)
            for below in axes[1:]:
                _draw_sides(below, theme, shown, strip.places, rows)


def _summary(plan: Plan, sheet: Sheet) -> str:
    others = len(plan.rows) - len(plan.in_question)
    return "; ".join(
        [
            f"{len(plan.converted)} of {len(plan.rows)} convolutions become CoConv",
            *([f"{others} with other kernel sizes are not drawn"] if others else []),
            *([f"names after {shortened(sheet.prefix, _SMALL, 1.5)}."] if sheet.prefix else []),
        ]
    )


def _write_title(figure: Figure, theme: Theme, title: str, summary: str) -> None:
    height = figure.get_size_inches()[1]
    title = shortened(title, _TITLE_SIZE, WIDTH - 0.4, "bold")
    figure.text(0.15 / WIDTH, 1 - 0.26 / height, title, fontsize=_TITLE_SIZE, fontweight="bold")
    figure.text(0.15 / WIDTH, 1 - 0.45 / height, summary, fontsize=_SMALL + 0.5)


def _explain(figure: Figure, theme: Theme, rows: Sequence[PlanRow], highest: int) -> None:
    found = sorted({max(pair(dilation)) for row in rows if row.converted for dilation in row.dilations})
    handles = [Patch(color=theme.dilation(dilation, highest), label=f"dilation {dilation}") for dilation in found]
    if any(not row.converted for row in rows):
        handles.append(Patch(color=theme.faint, label="left alone"))
    most = 8
    if len(handles) > most:  # the ends and the middle tell the scale
        kept = sorted({round(place * (len(handles) - 1) / (most - 1)) for place in range(most)})
        handles = [handles[place] for place in kept]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.15 / WIDTH, 1 - 0.52 / figure.get_size_inches()[1]),
        ncols=most,
        fontsize=_SMALL,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.0,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def _draw_shares(axes: Axes, theme: Theme, rows: Sequence[PlanRow], places: Sequence[float], highest: int) -> None:
    bars = []
    for row, place in zip(rows, places, strict=True):
        bottom = 0.0
        for dilation, channels in zip(row.dilations, row.splits, strict=True):
            share = channels / row.signature.out_channels
            colour = theme.dilation(max(pair(dilation)), highest) if row.converted else theme.faint
            bars.append(Rectangle((place - BAR / 2, bottom), BAR, share, facecolor=colour, linewidth=0))
            bottom += share
    axes.add_collection(PatchCollection(bars, match_original=True), autolim=False)
    axes.set(ylim=(0, 1), yticks=(0, 0.5, 1), yticklabels=("0", "50", "100 %"))
    name_axis(axes, "channels")


def _draw_sides(
    axes: Axes, theme: Theme, rows: Sequence[PlanRow], places: Sequence[float], of_all: Sequence[PlanRow]
) -> None:
    """A bar up to the smallest map of a convolution, and a line on to the largest."""
    sides = [_sides(row) for row in rows]
    bars = [Rectangle((place - BAR / 2, 0), BAR, min(each)) for place, each in zip(places, sides, strict=True)]
    axes.add_collection(PatchCollection(bars, facecolor=theme.muted, linewidth=0), autolim=False)
    axes.vlines(places, [min(each) for each in sides], [max(each) for each in sides], color=theme.muted, linewidth=1.2)
    known = [side for row in of_all for side in _sides(row) if side]
    lowest, largest = min(known).bit_length() - 1, (max(known) - 1).bit_length()  # powers of two around them
    axes.set_yscale("log", base=2)
    step = max(1, -(-(largest - lowest) // 2))
    ticks = [2**exponent for exponent in range(lowest, largest + 1, step)]
    axes.set(ylim=(2 ** (lowest - 1), 2**largest * 1.9), yticks=ticks, yticklabels=[str(tick) for tick in ticks])
    name_axis(axes, "map side")


def _sides(row: PlanRow) -> list[int]:
    return [min(size) for size in row.output_sizes] or [0]
