"""What pads a convolution's input or crops its output, in its own module or anywhere around."""

from collections.abc import Callable, Iterable

from coconv_surgery.tracing.axes import BY_HAND, Axis, Span, upstream

Corner = tuple[int, int]


def one_sided(input: Axis, output: Axis) -> bool:
    """Whether a convolution keeps what comes later out of what it computes, or what came earlier.

    It does if, between some place before it and all that reads it behind, no position sees what comes after its own,
    whether counted from the first position or from the last.

    Args:
        input: Positions along an axis of its input.
        output: Those of its output.
    """
    behind = output.span(input.root)
    if behind is None or behind.high - behind.low <= input.high - input.low:
        return False  # it looks at one position
    before = [Span(axis.low, axis.high, axis.size) for axis in upstream(input) if axis.turn == input.turn]
    return any(_keeps_out(output, input, before, side) for side in (_late, _early))


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
        behind.size < input.size or _everywhere_behind(output, input, lambda span: span.size <= input.size - added.rows)
    )
    return added.mode if taken_off else None


def _late(span: Span) -> Corner:
    """The last that the first and the last position see."""
    return span.high, span.high + span.size


def _early(span: Span) -> Corner:
    """The first, counted the other way."""
    return -span.low, -span.low - span.size


def _keeps_out(output: Axis, input: Axis, before: Iterable[Span], side: Callable[[Span], Corner]) -> bool:
    outermost: set[Corner] = set()
    for corner in map(side, before):
        if not any(_within(corner, other) for other in outermost):
            outermost = {other for other in outermost if not _within(other, corner)} | {corner}
    return _everywhere_behind(output, input, lambda span: any(_within(side(span), corner) for corner in outermost))


def _within(corner: Corner, other: Corner) -> bool:
    return corner[0] <= other[0] and corner[1] <= other[1]


def _everywhere_behind(output: Axis, input: Axis, test: Callable[[Span], bool]) -> bool:
    """Whether on every way from an output to something that reads it a test holds once."""
    found, seen, stack = False, {output}, [output]
    while stack:
        axis = stack.pop()
        span = axis.span(input.root)
        if span is not None and axis.turn == output.turn and test(span):
            found = True
        elif axis.ends or span is None:
            return False
        else:
            new = [user for user in axis.users if user not in seen]
            seen.update(new)
            stack += new
    return found
