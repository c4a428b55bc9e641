"""How much room text takes, before there is a picture."""

import bisect
import functools

from matplotlib.font_manager import FontProperties, findfont, get_font

_DPI = 720  # fine enough that hinting does not count


@functools.lru_cache(maxsize=4096)
def width_of(text: str, size: float, weight: str = "normal") -> float:
    """The width of a line of text.

    Args:
        text: The text, in the font of the theme.
        size: Of the font, in points.
        weight: ``"normal"`` or ``"bold"``.

    Returns:
        Inches.

    >>> width_of("layer1", 8) < width_of("layer1.0.conv2", 8) < 1
    True
    """
    font = get_font(findfont(FontProperties(weight=weight)))
    font.set_size(size, _DPI)
    font.set_text(text)
    return float(font.get_width_height()[0]) / 64 / _DPI


def shortened(text: str, size: float, room: float, weight: str = "normal") -> str:
    """A text without as much of its beginning as does not fit: names differ at their ends.

    Args:
        text: The text.
        size: Of the font, in points.
        room: In inches.
        weight: Of the font.

    >>> shortened("stage4.0.branches.3.0.conv1", 7, 1.0)
    '…ranches.3.0.conv1'
    """
    if width_of(text, size, weight) <= room:
        return text
    cuts = range(1, len(text))
    start = bisect.bisect_left(cuts, True, key=lambda start: width_of(f"…{text[start:]}", size, weight) <= room)
    return f"…{text[start + 1 :]}"
