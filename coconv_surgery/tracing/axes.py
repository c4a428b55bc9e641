"""Where positions along a dimension come from: what they see, what was added around, what was cut off."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Ways of padding that an operation is known to have, rather than pieces that may have been joined for another reason.
_ROUND = "circular"
BY_HAND = "piecewise"


class Added(NamedTuple):
    """What stands around a map that is not zeros: how it came, and how much of it is left."""

    mode: str
    rows: int


class Span(NamedTuple):
    """What the positions along a dimension see, as places in another.

    Attributes:
        low: The place of the first that position 0 sees, and so on for those behind it.
        high: The place of the last.
        size: How many positions there are.
    """

    low: int
    high: int
    size: int


@dataclass(eq=False)
class Axis:
    """The positions along a dimension.

    They are counted from those of another dimension, further up in the dataflow and at the same scale: the root.
    Position i sees places i + low to i + high there. Where that is not known, low is the most that it can be, and high
    the least.

    Attributes:
        size: How many there are.
        root: Where they are counted from; by default here.
        low: The first place that position 0 sees.
        high: The last.
        added: What was added that is not zeros.
        sources: What it comes from.
        users: What comes from it.
        ends: Whether something reads it that keeps no positions, or the network returns it.
        stride: For a root that takes every so many positions of its source: how many.
        turn: By how much it has been rolled around, with nothing that hides what came in at the other end.
    """

    size: int
    root: "Axis" = None  # type: ignore[assignment]
    low: int = 0
    high: int = 0
    added: Added | None = None
    sources: tuple["Axis", ...] = ()
    users: list["Axis"] = field(default_factory=list)
    ends: bool = False
    stride: int = 1
    turn: int = 0

    def __post_init__(self) -> None:
        self.root = self if self.root is None else self.root
        for source in self.sources:
            source.users.append(self)

    def span(self, root: "Axis") -> Span | None:
        """What it sees of a root: its own, or the one before, of which its own takes every so many positions."""
        if self.root is root:
            return Span(self.low, self.high, self.size)
        if self.root.stride == 1 or self.root.sources[0].root is not root:
            return None
        (whole,), stride = self.root.sources, self.root.stride
        more = self.size - self.root.size
        # What is added there pads the next layer: it does not shift this one.
        around = stride * max(0, more)
        low, high = whole.low + stride * self.low - around, whole.high + stride * self.high + around
        return Span(low, high, whole.size + stride * more)


class Blank(NamedTuple):
    """Positions that come from nowhere: numbers that do not depend on an input."""

    size: int
    zeros: bool


Piece = Axis | Blank


def resized(axis: Axis, before: int, after: int, mode: str | None = None) -> Axis:
    """Positions added before and after, with zeros unless a mode is given; or, where negative, cut off."""
    if not (before or after):
        return axis
    added = axis.added
    if before > 0 or after > 0:
        left = added.rows if added else 0
        added = Added(mode, left + max(before, 0) + max(after, 0)) if mode else None
    added = _less(added, -min(before, 0) - min(after, 0))
    return _from(axis, axis.size + before + after, axis.low - before, axis.high - before, added)


def window(axis: Axis, padding: int, reach: int, stride: int, size: int) -> Axis:
    """What a window sees that slides along: of reach + 1 positions, with padding on both sides."""
    whole, shrinks = axis, reach - 2 * padding
    if reach or padding:
        added = _less(axis.added, shrinks) if shrinks > 0 else None
        whole = _from(axis, axis.size - shrinks, axis.low - padding, axis.high + reach - padding, added)
    if stride > 1:
        return Axis(size, sources=(whole,), stride=stride)
    return whole if whole.size == size else Axis(size)


def taken(axis: Axis, size: int) -> Axis:
    """Positions taken by an index that is not known, more than there were or fewer."""
    more = size - axis.size
    if more >= 0:
        return resized(axis, more // 2, more - more // 2, BY_HAND)
    return _from(axis, size, axis.low - more, axis.high, _less(axis.added, -more))


def put(axis: Axis, size: int, *, zeros: bool) -> Axis:
    """Positions put into more of them, no one knows where."""
    more = size - axis.size
    return _from(axis, size, axis.low, axis.high - more, None if zeros else Added(BY_HAND, more))


def repeated(axis: Axis, times: int) -> Axis:
    """All positions, so many times in a row."""
    before = axis.size * ((times - 1) // 2)
    return resized(axis, before, axis.size * (times - 1) - before, BY_HAND)


def spread(axis: Axis, size: int) -> Axis:
    """One position, so many times."""
    return axis if size == axis.size else _from(axis, size, axis.low, axis.high, axis.added)


def rolled(axis: Axis, shift: int) -> Axis:
    """All positions moved; what leaves at one end comes in at the other."""
    return _from(axis, axis.size, axis.low - shift, axis.high - shift, axis.added, turn=axis.turn + shift)


def masked(axis: Axis) -> Axis:
    """Positions some of which may be hidden, such as those that came in at the other end."""
    return _from(axis, axis.size, axis.low, axis.high, axis.added, turn=0) if axis.turn else axis


def together(axes: Iterable[Axis]) -> Axis | None:
    """What is seen by positions that are computed from several, one from each; None if those have nothing in common."""
    several = list(dict.fromkeys(axes))
    if len({(axis.root, axis.turn, axis.size) for axis in several}) > 1:
        return None
    return several[0] if len(several) == 1 else _union(several[0].size, [(0, axis) for axis in several])


def overwritten(axis: Axis, start: int, piece: Piece) -> Axis:
    """Positions of which some are written over, from a start on."""
    end = start + piece.size
    # Cut by nobody but us: nothing is computed from these parts alone.
    before = Axis(start, axis.root, axis.low, axis.high, _less(axis.added, axis.size - start), turn=axis.turn)
    rest = _less(axis.added, end)
    after = Axis(axis.size - end, axis.root, axis.low + end, axis.high + end, rest, turn=axis.turn)
    row = joined([part for part in (before, piece, after) if part.size])
    if row is None:
        return axis
    parts = {before: axis, after: axis}
    sources = dict.fromkeys(parts.get(part, part) for part in row.sources)
    return Axis(row.size, row.root, row.low, row.high, row.added, tuple(sources), turn=row.turn)


def joined(pieces: Sequence[Piece]) -> Axis | None:
    """Positions in a row, piece by piece.

    Pieces that stand as they stood before are one again; anything else is padding around the largest such.
    """
    starts = itertools.accumulate((piece.size for piece in pieces[:-1]), initial=0)
    placed = [(start, piece) for start, piece in zip(starts, pieces, strict=True) if isinstance(piece, Axis)]
    if not placed:
        return None
    size = sum(piece.size for piece in pieces)
    groups = defaultdict(list)
    for start, axis in placed:
        groups[axis.root, axis.turn, axis.low + axis.high - 2 * start].append((start, axis))

    def weight(group: list[tuple[int, Axis]]) -> tuple[int, int]:
        (first, _), (last, end) = group[0], group[-1]
        return sum(axis.size for _, axis in group), -abs(first - (size - last - end.size))

    (root, _, place), main = max(groups.items(), key=lambda item: weight(item[1]))
    whole = _union(size, main, turn=0 if len(placed) < len(pieces) else None)
    own = weight(main)[0]
    zeros = all(isinstance(piece, Axis) or piece.zeros for piece in pieces)
    if len(main) == len(placed) and zeros:
        whole.added = whole.added if own == size else None
    else:
        others = [(other[2], group) for other, group in groups.items() if other[0] is root and group is not main]
        around = any((at - place) % (2 * root.size) == 0 and weight(group)[0] < own for at, group in others)
        whole.added = Added(_ROUND if around else BY_HAND, size - own + (whole.added.rows if whole.added else 0))
    return whole


def _from(axis: Axis, size: int, low: int, high: int, added: Added | None, *, turn: int | None = None) -> Axis:
    return Axis(size, axis.root, low, high, added, (axis,), turn=axis.turn if turn is None else turn)


def _union(size: int, placed: Sequence[tuple[int, Axis]], *, turn: int | None = None) -> Axis:
    low, high = min(axis.low - start for start, axis in placed), max(axis.high - start for start, axis in placed)
    axes = tuple(dict.fromkeys(axis for _, axis in placed))
    added = next((axis.added for axis in axes if axis.added), None)
    return Axis(size, axes[0].root, low, high, added, axes, turn=axes[0].turn if turn is None else turn)


def _less(added: Added | None, rows: int) -> Added | None:
    return added._replace(rows=added.rows - rows) if added and added.rows > rows else None
