"""A picture of a plan."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from coconv_surgery.layers.arguments import instance
from coconv_surgery.layers.functional import pair
from coconv_surgery.planning.plan import Plan, PlanRow


def draw_plan(plan: Plan, path: str | Path, title: str = "") -> None:
    """Draw how the output channels of each convolution are shared out over dilations, and the sizes of the maps.

    As in the plan's table, other kernels than 3×3 are left out unless they are converted.

    Args:
        plan: The plan.
        path: The picture's file; its suffix chooses the format.
        title: A heading, such as the network's name.

    Raises:
        ValueError: If there is nothing to draw.
    """
    rows = instance(plan, "plan", Plan, "a Plan").in_question
    if not rows:
        raise ValueError("the plan has no convolution to draw: none is 3×3 or converted")
    highest = max(max(pair(dilation)) for row in rows for dilation in row.dilations)
    figure = Figure(figsize=(max(7.0, 1.5 + 0.28 * len(rows)), 6.0), layout="constrained")
    shares, sizes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    colours = _colours(highest)
    for index, row in enumerate(rows):
        bottom = 0.0
        for dilation, channels in zip(row.dilations, row.splits, strict=True):
            share = channels / row.signature.out_channels
            colour = colours(max(pair(dilation)) - 1)
            shares.bar(index, share, 0.86, bottom, color=colour, alpha=1.0 if row.converted else 0.35)
            bottom += share
    sides = [min((min(size) for size in row.output_sizes), default=0) for row in rows]
    sizes.bar(range(len(rows)), sides, 0.86, color="0.65")
    sizes.set_yscale("log", base=2)
    sizes.set_ylim(bottom=1)
    sizes.yaxis.set_major_formatter("{x:g}")
    sizes.set_ylabel("side of output map")
    shares.set_ylabel("share of output channels")
    shares.set_ylim(0, 1)
    converted = f"{len(plan.converted)} of {len(plan.rows)} convolutions become CoConv"
    shares.set_title(f"{title}: {converted}" if title else converted)
    handles = [Patch(color=colours(d - 1), label=f"dilation {d}") for d in range(1, highest + 1)]
    if any(not row.converted for row in rows):
        handles.append(Patch(color=colours(0), alpha=0.35, label="left alone"))
    shares.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    if len(rows) <= 60:
        sizes.set_xticks(range(len(rows)), [_short(row) for row in rows], rotation=90, fontsize=7)
    else:
        sizes.xaxis.set_major_locator(MaxNLocator(integer=True))
        sizes.set_xlabel("convolution, in the order of the network")
    for axes in (shares, sizes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.savefig(path, dpi=150)


def _short(row: PlanRow) -> str:
    return row.name if len(row.name) <= 28 else f"…{row.name[-27:]}"


def _colours(count: int) -> Colormap:
    return colormaps["viridis"].resampled(max(count, 2))
