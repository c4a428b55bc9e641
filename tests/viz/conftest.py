"""What is drawn, for a look at it."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from coconv_surgery.viz import theme


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, in order."""
    figures = []

    def make(*args, **kwargs):
        figures.append(Figure(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(theme, "Figure", make)
    return figures


def texts(figure):
    """The visible texts of a figure, and where they are, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(renderer).padded(-0.5)) for text in found]


def faults(figure):
    """Texts that overlap, or are cut off."""
    placed = texts(figure)
    width, height = figure.bbox.width, figure.bbox.height
    cut = [name for name, box in placed if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    pairs = itertools.combinations(placed, 2)
    return cut + [(one, other) for (one, box), (other, by) in pairs if box.overlaps(by)]


@pytest.fixture
def legible():
    """A check that no text of a figure overlaps another or is cut off."""

    def check(figure):
        assert len(texts(figure)) > 3
        assert faults(figure) == []

    return check
