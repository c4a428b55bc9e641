"""A picture of what a calibration did."""

from pathlib import Path

from coconv_surgery.calibration.report import Calibration
from coconv_surgery.layers.arguments import instance, text
from coconv_surgery.viz.lettering import shortened
from coconv_surgery.viz.strips import WIDTH, lay_out, name_axis
from coconv_surgery.viz.theme import Mode, drawing

_PANEL, _TOP = 1.3, 0.74  # inches


def plot_calibration(calibration: Calibration, path: str | Path, title: str = "", *, mode: Mode = "light") -> None:
    """Draw the error of each contextual convolution before and after a calibration.

    Errors are of its output on images held out, relative to the wanted one (root mean squares). A layer that was
    skipped has none, and is left out.

    Args:
        calibration: What :func:`~coconv_surgery.calibrate` returned.
        path: The picture's file; its suffix chooses the format.
        title: A heading, such as the network's name.
        mode: ``"light"`` or ``"dark"``: the page that it will lie on.

    Raises:
        ValueError: If no layer was calibrated, or the file cannot be one of a picture.
        OSError: If the file's folder is not there.

    >>> import tempfile
    >>> from coconv_surgery.calibration.report import CalibratedLayer
    >>> file = Path(tempfile.mkdtemp()) / "calibration.png"
    >>> plot_calibration(Calibration((CalibratedLayer("conv", 0.6, 0.2),), 64, (0, 8)), file)
    >>> file.exists()
    True
    """
    text(title, "title")
    layers = instance(calibration, "calibration", Calibration, "a Calibration").layers
    errors = [
        (each.name, each.before, each.after) for each in layers if each.before is not None and each.after is not None
    ]
    if not errors:
        raise ValueError("the calibration has no error to draw: all of its layers were skipped")
    names, before, after = zip(*errors, strict=True)
    sheet = lay_out(names)
    highest = 1.08 * max(*before, *after)
    with drawing(path, WIDTH, _TOP + sheet.height([_PANEL]) + 0.02, mode) as (figure, theme):
        height = figure.get_size_inches()[1]
        heading = shortened(title or "calibration", 11, WIDTH - 0.4, "bold")
        figure.text(0.15 / WIDTH, 1 - 0.26 / height, heading, fontsize=11, fontweight="bold")
        summary = shortened(calibration.summary(), 8, WIDTH - 0.4)
        figure.text(0.15 / WIDTH, 1 - 0.45 / height, summary, fontsize=8)
        for strip, (axes,) in sheet.draw(figure, theme, _TOP, [_PANEL]):
            cold, solved = ([values[layer] for layer in strip.layers] for values in (before, after))
            axes.vlines(strip.places, cold, solved, color=theme.muted, linewidth=1)
            axes.plot(strip.places, cold, "o", color=theme.muted, markersize=3.5, label="before")
            axes.plot(strip.places, solved, "o", color=theme.categories[0], markersize=3.5, label="after")
            axes.set(ylim=(0, highest))
            name_axis(axes, "error")
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(0.15 / WIDTH, 1 - 0.52 / height),
            ncols=2,
            fontsize=7.5,
            borderpad=0,
            borderaxespad=0,
        )
