"""Pictures of receptive fields: how far each convolution can see, and what it responds to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from coconv_surgery.layers.arguments import instance, mapping
from coconv_surgery.receptive.effective import EffectiveField
from coconv_surgery.receptive.theoretical import FieldReport
from coconv_surgery.viz.theme import Mode, Theme, drawing


def plot_receptive_fields(
    reports: Mapping[str, FieldReport], path: str | Path, title: str = "", *, mode: Mode = "light"
) -> None:
    """Draw the side of the theoretical receptive field of each convolution, by depth.

    Args:
        reports: Fields by the name of the network that has them, such as ``{"before": …, "after": …}``; networks with
            convolutions of the same names.
        path: The picture's file; its suffix chooses the format.
        title: A heading, such as the network's name.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        TypeError: If a report is not one.
        ValueError: If no field is known, or the file cannot be written in that format.
    """
    for name, report in mapping(reports, "reports", "reports by name").items():
        instance(report, f"reports[{name!r}]", FieldReport, "a FieldReport")
    if not any(row.size for report in reports.values() for row in report.rows):
        raise ValueError("reports: no receptive field is known, so there is nothing to draw")
    with drawing(path, 7.5, 3.6, mode) as (figure, theme):
        axes = figure.subplots()
        for (name, report), style in zip(reports.items(), _styles(theme, len(reports)), strict=True):
            sides = [np.nan if row.size is None else max(row.size) for row in report.rows]
            axes.step(range(1, len(sides) + 1), sides, where="mid", label=name, linewidth=1.8, **style)
        side = max(next(iter(reports.values())).input_size)
        axes.axhline(side, color=theme.muted, linewidth=1, linestyle=":", label=f"side of the image, {side}")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("convolution, in the order of calls")
        axes.set_ylabel("side of the field, in pixels")
        axes.margins(x=0.01)
        axes.grid(axis="y")
        axes.set_title(f"{title}: what each convolution can see" if title else "What each convolution can see")
        figure.legend(loc="outside lower center", ncols=len(reports) + 1)


def plot_effective_fields(
    fields: Mapping[str, EffectiveField], path: str | Path, title: str = "", *, mode: Mode = "light"
) -> None:
    """Draw effective receptive fields side by side, in one scale, each with a square of its area.

    Args:
        fields: Fields by the name of the network that has them, such as ``{"before": …, "after": …}``.
        path: The picture's file; its suffix chooses the format.
        title: A heading, such as the network's name.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        TypeError: If a field is not one.
        ValueError: If there are none, or the file cannot be written in that format.
    """
    for name, field in mapping(fields, "fields", "fields by name").items():
        instance(field, f"fields[{name!r}]", EffectiveField, "an EffectiveField")
    if not fields:
        raise ValueError("fields: there are none to draw")
    with drawing(path, 1.0 + 3.2 * len(fields), 4.1, mode) as (figure, theme):
        grid = figure.subplots(1, len(fields), squeeze=False)[0]
        for axes, (name, field) in zip(grid, fields.items(), strict=True):
            image = _draw_field(axes, field, name, theme)
        figure.colorbar(image, ax=list(grid), shrink=0.7, label="share of the largest gradient")
        figure.suptitle(_heading(title, next(iter(fields.values()))))


def _draw_field(axes: Any, field: EffectiveField, name: str, theme: Theme) -> Any:
    # Square roots, so that what is weak can be seen as well.
    image = axes.imshow(field.weight, cmap="viridis", norm=PowerNorm(0.5, 0, 1))
    row, column = (places.mean() for places in field.inside.nonzero())
    corner = column - field.side / 2, row - field.side / 2
    axes.add_patch(Rectangle(corner, field.side, field.side, fill=False, edgecolor="#ffffff", linewidth=1.2))
    axes.set_title(f"{name}\n{field.area:,} pixels, a square of {field.side:.0f}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(theme.faint)
    return image


def _heading(title: str, field: EffectiveField) -> str:
    what = f"{field.name} responds to, mean of {field.images} image{'s' if field.images > 1 else ''}"
    return f"{title}: what {what}" if title else f"What {what}"


def _styles(theme: Theme, count: int) -> list[dict[str, Any]]:
    if count == 1:
        return [{"color": theme.categories[0]}]
    return [{"color": theme.muted}, *({"color": colour} for colour in theme.categories[: count - 1])]
