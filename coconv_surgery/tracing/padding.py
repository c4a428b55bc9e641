"""What pads a convolution's input or crops its output, in its own module or anywhere around."""

from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from coconv_surgery.tracing.axes import BY_HAND, Axis, Span

_Key = TypeVar("_Key", bound=Hashable)


class Corner(NamedTuple):
    """How far positions see to one side: the first and the last of them, among those with the same turn."""

    turn: int
    first: int
    last: int

    def within(self, other: "Corner") -> bool:
        """Whether none of these positions sees more than its own there."""
        return self.turn == other.turn and self.first <= other.first and self.last <= other.last

    def joined(self, other: "Corner") -> "Corner":
        """What both see together."""
        return Corner(self.turn, max(self.first, other.first), max(self.last, other.last))


Corners = tuple[Corner, ...]


class Kept(NamedTuple):
    """The least that is seen on every way from some positions to what reads them, and whether something does."""

    corners: Corners
    read: bool


class OneSided:
    """Which convolutions of a forward pass keep out of what they compute what comes later, or what came earlier.

    One does if, between some place before it and all that reads it behind, no position sees what comes after its own,
    whether counted from the first position or from the last.
    """

    def __init__(self) -> None:
        self._sides = (_Side(_late), _Side(_early))

    def __call__(self, input: Axis, output: Axis) -> bool:
        """Whether a convolution does.

        Args:
            input: Positions along an axis of its input.
            output: Those of its output.
        """
        behind = output.span(input.root)
        if behind is None or behind.high - behind.low <= input.high - input.low:
            return False  # it looks at one position
        return any(side.keeps_out(input, output) for side in self._sides)


class _Side:
    """One of the two sides. What is known of an axis is kept: each is looked at once, however many convolutions ask."""

    def __init__(self, seen: Callable[[int, Span], Corner]) -> None:
        self._seen = seen
        self._before: dict[Axis, Corners] = {}
        self._behind: dict[tuple[Axis, Axis], Kept] = {}

    def keeps_out(self, input: Axis, output: Axis) -> bool:
        most = [corner for corner in self._most_before(input) if corner.turn == input.turn]
        return any(kept.within(corner) for kept in self._kept_behind(output, input.root).corners for corner in most)

    def _most_before(self, axis: Axis) -> Corners:
        """The most that is seen anywhere between the root of an axis and itself."""

        def sources(axis: Axis) -> list[Axis]:
            return [source for source in axis.sources if source.root is axis.root]

        for each in _in_order(axis, sources, self._before):
            own = self._seen(each.turn, Span(each.low, each.high, each.size))
            self._before[each] = _maxima(
                [own, *(corner for source in sources(each) for corner in self._before[source])]
            )
        return self._before[axis]

    def _kept_behind(self, axis: Axis, root: Axis) -> Kept:
        """What is seen of a root behind an axis; nothing is least where that is not known."""

        def users(key: tuple[Axis, Axis]) -> list[tuple[Axis, Axis]]:
            axis, root = key
            return [] if axis.ends or axis.span(root) is None else [(user, root) for user in axis.users]

        for key in _in_order((axis, root), users, self._behind):
            each, span = key[0], key[0].span(root)
            ways = [way.corners for user in users(key) if (way := self._behind[user]).read]
            own = [] if span is None else [self._seen(each.turn, span)]
            self._behind[key] = Kept(_minima([*own, *_on_all(ways)]), bool(ways) or each.ends or span is None)
        return self._behind[axis, root]


def _late(turn: int, span: Span) -> Corner:
    """The last that the first and the last position see."""
    return Corner(turn, span.high, span.high + span.size)


def _early(turn: int, span: Span) -> Corner:
    """The first, counted the other way."""
    return Corner(turn, -span.low, -span.low - span.size)


def _on_all(ways: list[Corners]) -> Corners:
    """The least that is seen on all of several ways."""
    found = ways[0] if ways else ()
    for way in ways[1:]:
        found = _minima(one.joined(other) for one in found for other in way if one.turn == other.turn)
    return found


def _maxima(corners: Iterable[Corner]) -> Corners:
    return _outermost(corners, Corner.within)


def _minima(corners: Iterable[Corner]) -> Corners:
    return _outermost(corners, lambda corner, other: other.within(corner))


def _outermost(corners: Iterable[Corner], behind: Callable[[Corner, Corner], bool]) -> Corners:
    """Those of some corners that are behind no other."""
    found: list[Corner] = []
    for corner in corners:
        if not any(behind(corner, other) for other in found):
            found = [other for other in found if not behind(other, corner)] + [corner]
    return tuple(found)


def _in_order(start: _Key, following: Callable[[_Key], Iterable[_Key]], known: Container[_Key]) -> Iterator[_Key]:
    """What is not known yet, a start and all that follows it, each behind what follows it."""
    stack = [start]
    while stack:
        if stack[-1] in known:
            stack.pop()
        elif unknown := [key for key in following(stack[-1]) if key not in known]:
            stack += unknown
        else:
            yield stack[-1]


def padded_by(input: Axis, output: Axis) -> str | None:
    """The way in which a convolution's input is padded before, if not with zeros.

    What may be padding by hand is if it is taken off again, by the convolution itself or behind it.

    Args:
        input: Positions along an axis of its input.
        output: Those of its output.
    """
    added, behind = input.added, output.span(input.root)
    if added is None or added.mode != BY_HAND:
        return added.mode if added else None
    taken_off = behind is not None and (
        behind.size < input.size or _shrinks_everywhere(output, input.root, input.size - added.rows)
    )
    return added.mode if taken_off else None


def _shrinks_everywhere(output: Axis, root: Axis, size: int) -> bool:
    """Whether on every way from an output to something that reads it there are no more positions than a size once."""
    found, seen, stack = False, {output}, [output]
    while stack:
        axis = stack.pop()
        span = axis.span(root)
        if span is not None and axis.turn == output.turn and span.size <= size:
            found = True
        elif axis.ends or span is None:
            return False
        else:
            new = [user for user in axis.users if user not in seen]
            seen.update(new)
            stack += new
    return found
