"""Sets of positions on a map, and what they are taken to by the operations before."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


class Taps:
    """Position y reads ``stride * y + offset`` for each offset.

    >>> Taps(2, [-1, 0, 1])(np.ones((1, 1), bool), 5)[1]
    9
    """

    def __init__(self, stride: int, offsets: Iterable[int]) -> None:
        self._stride, self._offsets = stride, sorted(offsets)

    def __call__(self, rows: Mask, start: int) -> tuple[Mask, int]:
        """Take rows, of which the first has a position, to those that they read."""
        low, span = self._offsets[0], (len(rows) - 1) * self._stride + 1
        read = np.zeros((span + self._offsets[-1] - low, rows.shape[1]), bool)
        for offset in self._offsets:
            read[offset - low : offset - low + span : self._stride] |= rows
        return read, start * self._stride + low


class Lookup:
    """Position y reads what a function says.

    >>> Lookup(lambda y: [y // 2])(np.ones((2, 1), bool), 4)[1]
    2
    """

    def __init__(self, function: Callable[[int], Sequence[int]]) -> None:
        self._function = function

    def __call__(self, rows: Mask, start: int) -> tuple[Mask, int]:
        """Take rows, of which the first has a position, to those that they read."""
        pairs = [(row, source) for row in range(len(rows)) for source in self._function(start + row)]
        low = min((source for _, source in pairs), default=0)
        read = np.zeros((max((source for _, source in pairs), default=low) - low + 1, rows.shape[1]), bool)
        for row, source in pairs:
            read[source - low] |= rows[row]
        return read, low


Relation = Taps | Lookup
SAME = Taps(1, [0])
FIRST = Lookup(lambda _: [0])


def every(side: int) -> Lookup:
    """Each position reads all of a side."""
    return Lookup(lambda _: range(side))


@dataclass(frozen=True)
class Spots:
    """A set of positions, which may lie outside of the map, where padding is.

    Attributes:
        mask: ``(height, width)``, as small as holds them.
        top: Position of its first row.
        left: Position of its first column.
    """

    mask: Mask
    top: int
    left: int

    @classmethod
    def at(cls, row: int, column: int) -> "Spots":
        """A single position."""
        return cls(np.ones((1, 1), bool), row, column)

    def read_by(self, vertical: Relation, horizontal: Relation) -> "Spots":
        """What they read."""
        mask, top = (self.mask, self.top) if vertical is SAME else vertical(self.mask, self.top)
        if horizontal is SAME:
            return Spots(mask, top, self.left)
        turned, left = horizontal(mask.T, self.left)
        return Spots(turned.T, top, left)

    def union(self, other: "Spots") -> "Spots":
        """All positions of both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom, right = (max(ends) for ends in zip(self._ends, other._ends, strict=True))
        mask = np.zeros((bottom - top, right - left), bool)
        for spots in (self, other):
            (low, first), (high, last) = (spots.top, spots.left), spots._ends
            mask[low - top : high - top, first - left : last - left] |= spots.mask
        return Spots(mask, top, left)

    def clipped(self, height: int, width: int) -> "Spots":
        """Those on a map."""
        bottom, right = self._ends
        if self.top >= 0 and self.left >= 0 and bottom <= height and right <= width:
            return self
        return Spots(self.within(height, width), 0, 0)

    def within(self, height: int, width: int) -> Mask:
        """Those on a map, as a mask of it."""
        mask = np.zeros((height, width), bool)
        (bottom, right), top, left = self._ends, max(self.top, 0), max(self.left, 0)
        if top < min(bottom, height) and left < min(right, width):
            part = self.mask[top - self.top : height - self.top, left - self.left : width - self.left]
            mask[top : top + part.shape[0], left : left + part.shape[1]] = part
        return mask

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the smallest box around them."""
        return _extent(self.mask.any(1)), _extent(self.mask.any(0))

    @property
    def _ends(self) -> tuple[int, int]:
        return self.top + self.mask.shape[0], self.left + self.mask.shape[1]


def _extent(line: Any) -> int:
    found = np.flatnonzero(line)
    return int(found[-1] - found[0] + 1) if len(found) else 0
