"""Where labels of boxes go, so that none covers another."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Corners = tuple[float, float, float, float]  # left, top, right, bottom


def place_labels(
    boxes: npt.ArrayLike, sizes: Sequence[tuple[float, float]], room: tuple[float, float]
) -> list[Corners]:
    """Place a label at each box: at its corners, outside or inside, or as near as there is room.

    Args:
        boxes: ``(n, 4)``: left, top, right and bottom.
        sizes: Width and height of each label.
        room: Width and height of the picture, which no label leaves unless it is larger.

    Returns:
        Corners of each label. They overlap only where there is no room left for one.

    >>> place_labels([[10, 20, 50, 60]], [(20, 8)], (64, 64))
    [(10.0, 12.0, 30.0, 20.0)]
    """
    placed: list[Corners] = []
    for box, size in zip(np.reshape(boxes, (-1, 4)).astype(float), sizes, strict=True):
        near = [_inside(corner, size, room) for corner in _at_corners(box.tolist(), size)]
        free = (place for place in near if not _covers(place, placed))
        placed.append(next(free, None) or _nearest(near[0], size, room, placed))
    return placed


def _at_corners(box: Sequence[float], size: tuple[float, float]) -> Iterator[tuple[float, float]]:
    left, top, right, bottom = box
    width, height = size
    tops = (top - height, top, bottom, bottom - height)
    return ((x, y) for y, x in itertools.product(tops, (left, right - width)))


def _inside(corner: tuple[float, float], size: tuple[float, float], room: tuple[float, float]) -> Corners:
    x, y = (max(0.0, min(at, most - side)) for at, side, most in zip(corner, size, room, strict=True))
    return x, y, x + size[0], y + size[1]


def _covers(label: Corners, placed: Sequence[Corners]) -> bool:
    left, top, right, bottom = label
    return any(left < x1 and x0 < right and top < y1 and y0 < bottom for x0, y0, x1, y1 in placed)


def _nearest(wanted: Corners, size: tuple[float, float], room: tuple[float, float], placed: list[Corners]) -> Corners:
    """The free place nearest to the one wanted: it touches other labels or the sides of the picture."""
    width, height = size
    columns = {wanted[0], 0.0, *(x for each in placed for x in (each[0] - width, each[2]))}
    lines = {wanted[1], 0.0, *(y for each in placed for y in (each[1] - height, each[3]))}
    places = {_inside(corner, size, room) for corner in itertools.product(columns, lines)}
    by_way = sorted(places, key=lambda place: (abs(place[0] - wanted[0]) + abs(place[1] - wanted[1]), place))
    return next((place for place in by_way if not _covers(place, placed)), wanted)
