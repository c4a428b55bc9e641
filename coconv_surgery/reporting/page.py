"""The page: one file of HTML that needs no other, and no network."""

import base64
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader

from coconv_surgery.layers.files import whole_file
from coconv_surgery.reporting.gathering import Findings
from coconv_surgery.viz.calibration import plot_calibration
from coconv_surgery.viz.diagrams import plot_coconv
from coconv_surgery.viz.fields import plot_effective_fields, plot_receptive_fields
from coconv_surgery.viz.plan import plot_plan
from coconv_surgery.viz.theme import DARK, LIGHT, THEMES


class Picture(NamedTuple):
    """A picture in both themes, as data URIs, and what it shows in words."""

    light: str
    dark: str
    words: str


def write_page(findings: Findings, path: str | Path, commands: Sequence[str]) -> None:
    """Write a page.

    Args:
        findings: What it says.
        path: The file.
        commands: Those that reproduce it, and the converted network.

    Raises:
        OSError: If it cannot be written; one that was there before stays.
    """
    environment = Environment(
        loader=PackageLoader("coconv_surgery", "reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(
        findings=findings,
        plan=findings.plan,
        pictures=_pictures(findings),
        commands=commands,
        light=LIGHT,
        dark=DARK,
    )
    with whole_file(path, "path") as passing:
        passing.write_text(page, encoding="utf-8")


def _pictures(findings: Findings) -> dict[str, Picture]:
    drawn: dict[str, tuple[Callable[..., None], Any, str]] = {}
    plan = findings.plan
    if plan.in_question:
        drawn["plan"] = (
            functools.partial(plot_plan, title=findings.title),
            plan,
            "Share of the output channels at each dilation, and side of the output map",
        )
    if findings.example is not None:
        drawn["coconv"] = plot_coconv, findings.example, "A contextual convolution of this network"
    if any(row.size for report in findings.fields.values() for row in report.rows):
        drawn["fields"] = plot_receptive_fields, findings.fields, "Side of the theoretical receptive field by depth"
    if findings.effective:
        drawn["effective"] = plot_effective_fields, findings.effective, "Effective receptive field before and after"
    if findings.calibration is not None and findings.calibration.solved:
        drawn["calibration"] = plot_calibration, findings.calibration, "Error of each layer before and after"
    with tempfile.TemporaryDirectory() as folder:
        return {name: _picture(Path(folder), *parts) for name, parts in drawn.items()}


def _picture(folder: Path, plot: Callable[..., None], subject: Any, words: str) -> Picture:
    sources = {}
    for mode in THEMES:
        plot(subject, folder / "picture.svg", mode=mode)
        encoded = base64.b64encode((folder / "picture.svg").read_bytes()).decode()
        sources[mode] = f"data:image/svg+xml;base64,{encoded}"
    return Picture(sources["light"], sources["dark"], words)
