"""Strips of the layers of a network, side by side under the names of its parts, as many strips as it takes."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from coconv_surgery.viz.lettering import shortened, width_of
from coconv_surgery.viz.theme import Theme

WIDTH = 7.5  # inches: nine hundred pixels of a page on a screen, and the width of one of paper
BAR = 0.84  # of a layer's room
NAME_SIZE = 7.0
_LEFT, _RIGHT = 0.62, 0.15
_BETWEEN_PANELS, _BETWEEN_STRIPS = 0.09, 0.16
_GAP = 0.8  # between parts, in rooms of a layer
_WIDEST = 0.45
_HEADING_SIZE, _HEADING_HEIGHT = 8.0, 0.24
_LONGEST_NAME = 1.35
# Up to so many layers each has its name; beyond, groups of them have.
_NAMED, _NAMED_IN_STRIP, _MOST_IN_STRIP = 60, 31, 64

Path = tuple[str, ...]
Panels = tuple[Axes, ...]


@dataclass(frozen=True)
class Label:
    """A name under some layers.

    Attributes:
        text: The name.
        start: Where they begin, in rooms of a layer.
        stop: Where they end.
        upright: Whether it is written upwards.
    """

    text: str
    start: float
    stop: float
    upright: bool = False


@dataclass(frozen=True)
class Strip:
    """Some layers in a row.

    Attributes:
        layers: Which ones.
        places: Where the middle of each is, in rooms of a layer.
        headings: Parts of the network, above.
        labels: Groups or layers, below.
    """

    layers: range
    places: tuple[float, ...]
    headings: tuple[Label, ...]
    labels: tuple[Label, ...]

    @property
    def depth(self) -> float:
        """How far the labels reach down, in inches."""
        return max((_height(label) for label in self.labels), default=0.0) + 0.06


@dataclass(frozen=True)
class Sheet:
    """Strips below each other.

    Attributes:
        strips: The strips.
        room: Width of a layer, in inches.
        prefix: What all names begin with, and none shows.
    """

    strips: tuple[Strip, ...]
    room: float
    prefix: str

    def height(self, panels: Sequence[float]) -> float:
        """Height of the strips, in inches.

        Args:
            panels: Height of each panel of a strip, in inches.
        """
        return sum(_HEADING_HEIGHT + _stacked(panels) + strip.depth + _BETWEEN_STRIPS for strip in self.strips)

    def draw(self, figure: Figure, theme: Theme, top: float, panels: Sequence[float]) -> Iterator[tuple[Strip, Panels]]:
        """Draw the names, and make axes for the rest.

        Args:
            figure: Where.
            theme: Its colours.
            top: Where the strips begin, in inches from the top of the figure.
            panels: Height of each panel, in inches.

        Yields:
            Each strip with the axes of its panels.
        """
        figure.set_layout_engine("none")  # every place is known
        for strip in self.strips:
            axes = tuple(self._panels(figure, theme, strip, top + _HEADING_HEIGHT, panels))
            for heading in strip.headings:
                _write_heading(axes[0], theme, heading)
            for label in strip.labels:
                _write_label(axes[-1], theme, label)
            yield strip, axes
            top += _HEADING_HEIGHT + _stacked(panels) + strip.depth + _BETWEEN_STRIPS

    def _panels(
        self, figure: Figure, theme: Theme, strip: Strip, top: float, heights: Sequence[float]
    ) -> Iterator[Axes]:
        width, height = figure.get_size_inches()
        rooms = strip.places[-1] + 0.5
        for panel in heights:
            place = (_LEFT / width, 1 - (top + panel) / height, rooms * self.room / width, panel / height)
            axes = figure.add_axes(place, xlim=(0, rooms), xticks=[])
            axes.tick_params(labelsize=NAME_SIZE, length=2)
            axes.spines[["left", "bottom"]].set_color(theme.faint)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
            top += panel + _BETWEEN_PANELS
            yield axes


def lay_out(names: Sequence[str]) -> Sheet:
    """Lay layers out in strips.

    Args:
        names: Their qualified names, one at least, in the order of the network. A part of it is what has the same first
            component in its name, after those that all have in common.
    """
    paths = [tuple(name.split(".")) for name in names]
    common = min(_in_common(paths), min(map(len, paths)) - 1)
    paths = [path[common:] for path in paths]
    each = len(paths) <= _NAMED
    cuts = [0, *_cuts(paths, _NAMED_IN_STRIP if each else _MOST_IN_STRIP), len(paths)]
    ranges = [range(start, stop) for start, stop in itertools.pairwise(cuts)]
    places = [_places([paths[layer] for layer in layers]) for layers in ranges]
    room = min(_WIDEST, (WIDTH - _LEFT - _RIGHT) / max(place[-1] + 0.5 for place in places))
    strips = []
    for layers, place in zip(ranges, places, strict=True):
        headings, labels = _names([paths[layer] for layer in layers], place, room, each)
        strips.append(Strip(layers, place, tuple(headings), tuple(labels)))
    return Sheet(tuple(strips), room, ".".join(names[0].split(".")[:common]))


def name_axis(axes: Axes, name: str) -> None:
    """Name the vertical axis of a panel, in line with those of the others."""
    axes.annotate(
        name,
        (0, 0.5),
        xycoords="axes fraction",
        xytext=(-36, 0),
        textcoords="offset points",
        rotation=90,
        fontsize=7.5,
        ha="center",
        va="center",
    )


def _stacked(panels: Sequence[float]) -> float:
    return sum(panels) + _BETWEEN_PANELS * (len(panels) - 1)


def _in_common(paths: Sequence[Path]) -> int:
    """How many components paths begin with alike."""
    alike = itertools.takewhile(lambda components: len(set(components)) == 1, zip(*paths, strict=False))
    return sum(1 for _ in alike)


def _cuts(paths: Sequence[Path], most: int) -> Iterator[int]:
    """Where to begin new strips: where names have least in common, among where a strip is half full or more."""
    start = 0
    while len(paths) - start > most:
        window = range(start + most, start + most // 2, -1)
        start = min(window, key=lambda cut: _in_common(paths[cut - 1 : cut + 1]))
        yield start


def _places(paths: Sequence[Path]) -> tuple[float, ...]:
    gaps = itertools.accumulate((_GAP * (a[0] != b[0]) for a, b in itertools.pairwise(paths)), initial=0.0)
    return tuple(layer + 0.5 + gap for layer, gap in enumerate(gaps))


def _names(paths: Sequence[Path], places: Sequence[float], room: float, each: bool) -> tuple[list[Label], list[Label]]:
    headings: list[Label] = []
    labels: list[Label] = []
    for part in _groups(paths, range(len(paths)), 0):
        heading = _label(paths, places, part, 0, 1)
        fits = _fits(heading, room, _HEADING_SIZE, "bold", _GAP / 2)
        if fits:
            headings.append(heading)
        if each:
            labels += (_layer(paths[layer], places[layer], fits) for layer in part)
        else:
            below = _below(paths, places, part, 1, room) if fits else ()
            labels += below or ([] if fits else [_upright(heading)])
    return headings, labels


def _layer(path: Path, place: float, under_heading: bool) -> Label:
    name = ".".join(path[1:] if under_heading else path) or path[0]
    return _upright(Label(name, place - 0.5, place + 0.5))


def _upright(label: Label) -> Label:
    return Label(shortened(label.text, NAME_SIZE, _LONGEST_NAME), label.start, label.stop, upright=True)


def _below(paths: Sequence[Path], places: Sequence[float], part: range, depth: int, room: float) -> list[Label]:
    """Labels of the groups of a part, as deep down as there is room for; none if there is none."""
    groups = list(_groups(paths, part, depth))
    labels = [_label(paths, places, group, 1, depth + 1) for group in groups]
    if any(len(paths[layer]) <= depth for layer in part) or not all(_fits(label, room, NAME_SIZE) for label in labels):
        return []
    deeper = (_below(paths, places, group, depth + 1, room) for group in groups)
    return [found for label, inner in zip(labels, deeper, strict=True) for found in inner or [label]]


def _groups(paths: Sequence[Path], part: range, depth: int) -> Iterator[range]:
    start = part.start
    for _, group in itertools.groupby(part, lambda layer: paths[layer][: depth + 1]):
        stop = start + sum(1 for _ in group)
        yield range(start, stop)
        start = stop


def _label(paths: Sequence[Path], places: Sequence[float], group: range, start: int, stop: int) -> Label:
    return Label(".".join(paths[group[0]][start:stop]), places[group[0]] - 0.5, places[group[-1]] + 0.5)


def _fits(label: Label, room: float, size: float, weight: str = "normal", beside: float = 0.0) -> bool:
    return width_of(label.text, size, weight) + 0.04 < (label.stop - label.start + beside) * room


def _height(label: Label) -> float:
    return 0.06 + (width_of(label.text, NAME_SIZE) if label.upright else 0.13)


def _write_heading(axes: Any, theme: Theme, heading: Label) -> None:
    _line(axes, heading, 1.0, 4, theme.muted)
    axes.annotate(
        heading.text,
        (heading.start + (1 - BAR) / 2, 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 5.5),
        textcoords="offset points",
        fontsize=_HEADING_SIZE,
        fontweight="bold",
        va="baseline",
    )


def _write_label(axes: Any, theme: Theme, label: Label) -> None:
    if not label.upright:
        _line(axes, label, 0.0, -3, theme.muted)
    axes.annotate(
        label.text,
        ((label.start + label.stop) / 2, 0.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, -4),
        textcoords="offset points",
        fontsize=NAME_SIZE,
        rotation=90 if label.upright else 0,
        ha="center",
        va="top",
    )


def _line(axes: Any, label: Label, height: float, points: float, colour: str) -> None:
    inset = (1 - BAR) / 2
    shifted = offset_copy(axes.get_xaxis_transform(), axes.figure, y=points, units="points")
    ends = (label.start + inset, label.stop - inset)
    axes.plot(ends, (height, height), transform=shifted, color=colour, linewidth=0.8, clip_on=False)
