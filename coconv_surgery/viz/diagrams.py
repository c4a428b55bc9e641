"""Diagrams of one contextual convolution, and of the way of a network through this package."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from coconv_surgery.layers.arguments import instance
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.functional import pair
from coconv_surgery.viz.theme import Mode, Theme, drawing, ink_on

_WIDTH = 7.5
_STEPS = ("network\n+ input size", "tracing", "planning", "surgery", "same network,\nconverted")
_SAID = ("", "which convolution\nruns where, on what map", "map side → levels", "class of a module,\nnothing else", "")
_AROUND = ("revert", "calibrate", "train", "deploy", "files")


def plot_coconv(conv: CoConv2d, path: str | Path, *, mode: Mode = "light") -> None:
    """Draw what a contextual convolution computes: its levels' kernels on the input map, and their output channels.

    Args:
        conv: The convolution; dilations and channels are read off it.
        path: The picture's file; its suffix chooses the format.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        TypeError: If it is another module.
        ValueError: If the file cannot be one of a picture.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "coconv.svg"
    >>> plot_coconv(CoConv2d(64, 64, 3, padding=1, levels=4), file)
    >>> file.exists()
    True
    """
    instance(conv, "conv", CoConv2d, "a CoConv2d")
    levels = len(conv.dilations)
    highest = max(max(pair(dilation)) for dilation in conv.dilations)
    height = 0.2 + max(levels, 2)
    with drawing(path, _WIDTH, height, mode) as (figure, theme):
        axes = _canvas(figure, _WIDTH, height)
        middle = height / 2
        _stack(axes, 0.5, middle, theme.muted)
        axes.text(0.95, middle - 0.75, f"input\n{conv.in_channels} channels", ha="center", va="top")
        top = middle + levels / 2
        for level, (dilation, channels) in enumerate(zip(conv.dilations, conv.splits, strict=True)):
            colour = theme.dilation(max(pair(dilation)), highest)
            across = middle + levels / 2 - level - 0.5
            _arrow(axes, theme, (1.55, middle), (2.55, across))
            _kernel(axes, theme, colour, (2.65, across - 0.42), pair(dilation), pair(conv.kernel_size), highest)
            shown = "×".join(map(str, pair(dilation))) if isinstance(dilation, tuple) else str(dilation)
            axes.text(3.65, across, f"dilation {shown}", va="center")
            share = levels * channels / conv.out_channels
            axes.add_patch(Rectangle((5.65, top - share), 0.5, share, facecolor=colour, edgecolor=theme.paper))
            axes.text(5.9, top - share / 2, f"{channels}", color=ink_on(colour), ha="center", va="center")
            _arrow(axes, theme, (4.6, across), (5.58, top - share / 2))
            top -= share
        axes.text(6.3, middle, f"output\n{conv.out_channels} channels", va="center")


def plot_way_through(path: str | Path, *, mode: Mode = "light") -> None:
    """Draw the way of a network through this package.

    Args:
        path: The picture's file; its suffix chooses the format.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        ValueError: If the file cannot be one of a picture.
    """
    with drawing(path, _WIDTH, 2.2, mode) as (figure, theme):
        axes = _canvas(figure, _WIDTH, 2.2)
        places = [0.78 + 1.485 * step for step in range(len(_STEPS))]
        for step, (place, name, said) in enumerate(zip(places, _STEPS, _SAID, strict=True)):
            ends = step in (0, len(_STEPS) - 1)
            _box(axes, theme, (place, 1.72), (1.24, 0.5), name, theme.categories[0] if ends else theme.faint)
            axes.text(place, 1.38, said, ha="center", va="top", fontsize=6.5)
            if step:
                _arrow(axes, theme, (places[step - 1] + 0.65, 1.72), (place - 0.65, 1.72))
        for place, name in zip(places, _AROUND, strict=True):
            _box(axes, theme, (place, 0.3), (1.1, 0.3), name, theme.paper)
        axes.plot((places[0], places[-1]), (0.7, 0.7), color=theme.muted, linewidth=1)
        _arrow(axes, theme, (places[-1], 1.42), (places[-1], 0.72))
        for place in places:
            _arrow(axes, theme, (place, 0.7), (place, 0.48))


def _canvas(figure: Figure, width: float, height: float) -> Axes:
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return axes


def _stack(axes: Axes, left: float, middle: float, colour: str) -> None:
    for sheet in range(4):
        corner = (left + 0.07 * sheet, middle - 0.5 + 0.07 * sheet)
        axes.add_patch(Rectangle(corner, 0.75, 0.75, facecolor=colour, edgecolor=axes.get_facecolor()))


def _kernel(
    axes: Axes,
    theme: Theme,
    colour: str,
    corner: tuple[float, float],
    dilation: tuple[int, int],
    kernel: tuple[int, int],
    highest: int,
) -> None:
    cells = 1 + highest * (max(kernel) - 1)
    side = 0.84 / cells
    taken = set(_samples(cells, dilation, kernel))
    for row in range(cells):
        for column in range(cells):
            place = (corner[0] + column * side, corner[1] + row * side)
            face = colour if (row, column) in taken else theme.paper
            axes.add_patch(Rectangle(place, side, side, facecolor=face, edgecolor=theme.faint, linewidth=0.5))


def _samples(cells: int, dilation: tuple[int, int], kernel: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            yield (
                (cells - 1) // 2 + dilation[0] * (row - kernel[0] // 2),
                (cells - 1) // 2 + dilation[1] * (column - kernel[1] // 2),
            )


def _arrow(axes: Axes, theme: Theme, start: tuple[float, float], stop: tuple[float, float]) -> None:
    axes.annotate("", stop, start, arrowprops={"arrowstyle": "-|>", "color": theme.muted, "shrinkA": 0, "shrinkB": 0})


def _box(
    axes: Axes, theme: Theme, middle: tuple[float, float], size: tuple[float, float], name: str, colour: str
) -> None:
    corner = (middle[0] - size[0] / 2 + 0.05, middle[1] - size[1] / 2 + 0.05)
    inner = (size[0] - 0.1, size[1] - 0.1)
    style = "round,pad=0.05"
    axes.add_patch(FancyBboxPatch(corner, *inner, boxstyle=style, facecolor=colour, edgecolor=theme.muted))
    axes.text(*middle, name, color=ink_on(colour), ha="center", va="center", fontsize=8, fontweight="bold")
