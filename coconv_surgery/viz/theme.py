"""The look of every picture: one palette, for light and dark pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps, rc_context
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from coconv_surgery.layers.arguments import choice, file_to_write

Mode = Literal["light", "dark"]

# Of Okabe and Ito's colours, which colour-blind readers tell apart, those that stand out from the page.
_CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_CATEGORIES_ON_DARK = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00")


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    Attributes:
        paper: Behind everything.
        ink: Text and axes.
        muted: What is there to compare with: plain networks, what is left alone.
        faint: Grid lines and frames.
        categories: For things without an order, in the order of their use.
        span: The part of ``viridis`` that stands out from the paper, for things with an order.
    """

    paper: str
    ink: str
    muted: str
    faint: str
    categories: tuple[str, ...]
    span: tuple[float, float]

    def dilation(self, dilation: int, highest: int) -> str:
        """Colour of a dilation, from 1 to the ``highest`` of the picture.

        >>> LIGHT.dilation(1, 4) != LIGHT.dilation(4, 4)
        True
        """
        low, high = self.span
        # Pictures with few levels and with many show the same level in the same colour.
        of = max(highest, 4) - 1
        return to_hex(colormaps["viridis"](low + (high - low) * (dilation - 1) / of))

    @property
    def settings(self) -> dict[Any, Any]:
        """Matplotlib's settings."""
        ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
        paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
        return {
            **dict.fromkeys(ink, self.ink),
            **dict.fromkeys(paper, self.paper),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 9,
            "grid.color": self.faint,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "text.parse_math": False,  # names of layers are no formulas
            "svg.hashsalt": "coconv_surgery",  # the same picture is the same file
        }


LIGHT = Theme("#ffffff", "#1f2328", "#8c959f", "#d8dee4", _CATEGORIES, (0.0, 0.9))
DARK = Theme("#0d1117", "#e6edf3", "#7d8590", "#30363d", _CATEGORIES_ON_DARK, (0.25, 1.0))
THEMES: dict[Mode, Theme] = {"light": LIGHT, "dark": DARK}


@contextmanager
def drawing(path: str | Path, width: float, height: float, mode: Mode = "light") -> Iterator[tuple[Figure, Theme]]:
    """Draw on a figure, which is saved at the end.

    Args:
        path: The picture's file, ``.png``, ``.svg`` or what else matplotlib writes; its suffix chooses the format.
        width: In inches.
        height: In inches.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Yields:
        The figure and its colours.

    Raises:
        ValueError: If there is no such mode, or the file has a suffix that matplotlib does not write.
    """
    choice(mode, "mode", list(THEMES))
    suffix = picture_file(path).suffix
    theme = THEMES[mode]
    with rc_context(theme.settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, theme
        # An SVG tells when it was made otherwise, and would differ each time.
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)


def ink_on(colour: str) -> str:
    """Black or white, whichever stands out more from a colour.

    >>> ink_on("#f0e442"), ink_on("#0072b2")
    ('#000000', '#ffffff')
    """
    return "#000000" if contrast(colour, "#000000") > contrast(colour, "#ffffff") else "#ffffff"


def contrast(first: str, second: str) -> float:
    """The contrast of two colours, from 1 to 21, as WCAG defines it.

    >>> round(contrast("white", "black"))
    21
    """
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def picture_file(path: str | Path) -> Path:
    """Check that a picture can be written to a file, before anything is computed for it.

    Raises:
        ValueError: If it has a suffix that matplotlib does not write.
        OSError: If its folder is not there.

    >>> picture_file("plan.svg").name
    'plan.svg'
    """
    file = file_to_write(path, "path")
    choice(file.suffix.removeprefix("."), f"the suffix of {file}", sorted(FigureCanvasBase.get_supported_filetypes()))
    return file
