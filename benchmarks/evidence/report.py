"""Tables and figures from the logs, into ``docs/calibration.md`` between its marks, and beside it."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from coconv_surgery.viz.tables import markdown_table
from coconv_surgery.viz.theme import LIGHT, drawing
from evidence.log import logged

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"
_WAYS = ("plain", "cold", "norms recalibrated", "calibrated")
_MORE = ("calibrated, channels in place", "calibrated, plain ones too")
_COLOURS = dict(zip(_WAYS, (LIGHT.muted, *LIGHT.categories), strict=False))
_EPOCHS = (0, 1, 4)


def write_report() -> None:
    """Fill the page's tables in, and draw its figures."""
    text = PAGE.read_text(encoding="utf-8")
    for name, make in _TABLES.items():
        mark = f"<!-- {name}, by make evidence -->"
        block = re.compile(rf"{re.escape(mark)}.*?<!-- end -->", re.DOTALL)
        if block.search(text):
            text = block.sub(lambda _, mark=mark, make=make: f"{mark}\n{make()}\n<!-- end -->", text)
    PAGE.write_text(text, encoding="utf-8")
    _draw_classifiers()
    _draw_detectors()


def _runs(part: str) -> dict[str, list[dict[str, Any]]]:
    """What the runs of a part have measured, seed by seed, by what was run."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, run in logged(f"{part}-").items():
        what = name.removeprefix(f"{part}-").rpartition("-")[0]
        found[what].append(run["measured"])
    return found


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t; 0 for one value."""
    if len(values) < 2:
        return 0.0
    quantile: float = stats.t.ppf(0.975, len(values) - 1)
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def _mean(values: Iterable[float], digits: int = 1) -> str:
    values = list(values)
    spread = f" ± {interval(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _classifiers() -> str:
    rows = []
    for network, runs in sorted(_runs("a").items()):
        if not network:
            continue
        for way in (*_WAYS, *_MORE):
            kept = [100 * run[way][0] / run["plain"][0] for run in runs]
            cells = [_mean(run[way][i] for run in runs) if i < len(runs[0][way]) else "" for i in range(3)]
            rows.append((network, str(len(runs)), way, *cells, _mean(kept)))
    header = (
        "network",
        "seeds",
        "converted",
        "before",
        "after 1 epoch",
        "after 4 epochs",
        "of the plain one's, before",
    )
    return markdown_table(header, rows) + "\n\n" + _paired()


def _paired() -> str:
    lines = []
    for network, runs in sorted(_runs("a").items()):
        if network:
            gains = [_mean(run["calibrated"][i] - run["cold"][i] for run in runs) for i in range(3)]
            lines.append((network, *gains))
    return "Calibrated minus cold, in points, seed by seed:\n\n" + markdown_table(
        ("network", "before", "after 1 epoch", "after 4 epochs"), lines
    )


def _photographs() -> str:
    (run,) = [run["measured"] for run in logged("a-photographs").values()] or [{}]
    ways = ("cold", "calibrated, channels in place", "calibrated", "calibrated, plain ones too")
    return markdown_table(
        ("converted", "same class as the original, %"), [(w, f"{run[w]:.0f}") for w in ways if w in run]
    )


def _scratch() -> str:
    order = ("plain", "(1,1,1)", "(2,2,1)", "(3,2,1)", "top(3,2,1)", "resolution")
    runs = _runs("b")
    rows = [
        (what, str(len(runs[what])), _mean(run["accuracy"] for run in runs[what])) for what in order if what in runs
    ]
    return markdown_table(("levels", "seeds", "accuracy, %"), rows)


def _detectors_from_scratch() -> str:
    rows = []
    for backbone, runs in sorted(_runs("c").items(), reverse=True):
        figures = [_mean((run[key] for run in runs), 3) for key in ("mAP", "AP50")]
        classes = [_mean((run["by class"][name] for run in runs), 3) for name in runs[0]["by class"]]
        rows.append((backbone, str(len(runs)), *figures, *classes))
    names = list(next(iter(_runs("c").values()))[0]["by class"]) if rows else []
    return markdown_table(("backbone", "seeds", "mAP", "AP50", *names), rows)


def _detectors_converted() -> str:
    runs = [run["measured"] for run in logged("d-").values()]
    rows = []
    for way in ("plain", "cold", "calibrated, channels in place", "calibrated", "calibrated on 256 images"):
        if runs:
            figures = [_mean((run[way][key] for run in runs), 3) for key in ("mAP", "AP50")]
            kept = [_mean(100 * run[way][key] / run["plain"][key] for run in runs) for key in ("mAP", "AP50")]
            rows.append((way, str(len(runs)), *figures, *kept))
    return markdown_table(("detector", "seeds", "mAP", "AP50", "of the plain one's mAP, %", "of its AP50, %"), rows)


def _tries() -> str:
    runs = {name.removeprefix("tries-"): run["measured"] for name, run in logged("tries-").items()}
    rows = [
        (name, f"{run['mAP']:.3f}", f"{run['AP50']:.3f}", str(run.get("seconds", "")))
        for name, run in runs.items()
        if "mAP" in run
    ]
    text = markdown_table(("try, shapes detector of seed 0", "mAP", "AP50", "seconds"), rows)
    schedules = [run for name, run in runs.items() if name.startswith("levels one after another")]
    if schedules:
        cells = [(way, _mean(run[way] for run in schedules)) for way in schedules[0]]
        text += "\n\n" + markdown_table(("fine-tuning of digits, 4 epochs", "accuracy, %"), cells)
    return text


def _machines() -> str:
    runs = [*logged("").values()]
    machines = {", ".join(" ".join(item) for item in run["machine"].items()) for run in runs}
    minutes = sum(run["seconds"] for run in runs) / 60
    return f"{len(runs)} runs, {minutes:.0f} minutes of one thread, on " + "; ".join(sorted(machines)) + "."


_TABLES: dict[str, Callable[[], str]] = {
    "machines": _machines,
    "classifiers": _classifiers,
    "photographs": _photographs,
    "detectors": _detectors_converted,
    "tries": _tries,
    "from scratch": _scratch,
    "detectors from scratch": _detectors_from_scratch,
}


def _draw_classifiers() -> None:
    networks = {network: runs for network, runs in sorted(_runs("a").items()) if network}
    if not networks:
        return
    with drawing(_picture("classifiers"), 4 * len(networks), 3.6) as (figure, _):
        axes = figure.subplots(1, len(networks), sharey=True, squeeze=False)
        for axis, (network, runs) in zip(axes[0], networks.items(), strict=True):
            for way in _WAYS:
                values = [[100 - run[way][i] for run in runs] for i in range(3)]
                means = [statistics.mean(each) for each in values]
                axis.errorbar(
                    _EPOCHS,
                    means,
                    [interval(each) for each in values],
                    color=_COLOURS[way],
                    marker="o",
                    capsize=3,
                    label=way,
                )
            axis.set(
                title=f"{network}, {len(runs)} seeds", xlabel="epochs of fine-tuning", xticks=_EPOCHS, yscale="log"
            )
            ticks = (2, 5, 10, 20, 50, 100)
            axis.set_yticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
        axes[0][0].set_ylabel("error on digits, %")
        axes[0][-1].legend(loc="upper right", frameon=False)


def _draw_detectors() -> None:
    runs = [run["measured"] for run in logged("d-").values()]
    if not runs:
        return
    ways = ("plain", "cold", "calibrated, channels in place", "calibrated")
    with drawing(_picture("detectors"), 7, 3.2) as (figure, theme):
        axis = figure.subplots()
        for offset, key, colour in ((-0.2, "mAP", theme.categories[0]), (0.2, "AP50", theme.categories[1])):
            values = [[run[way][key] for run in runs] for way in ways]
            places = [number + offset for number in range(len(ways))]
            means, spreads = [statistics.mean(each) for each in values], [interval(each) for each in values]
            axis.barh(places, means, 0.38, xerr=spreads, color=colour, label=key, capsize=3)
            for place, mean, spread in zip(places, means, spreads, strict=True):
                axis.text(mean + spread + 0.01, place, f"{mean:.3f}", va="center", fontsize=8)
        axis.set(
            yticks=range(len(ways)), yticklabels=ways, xlim=(0, 1.15), title=f"Detection of shapes, {len(runs)} seeds"
        )
        axis.invert_yaxis()
        axis.legend(loc="center right", bbox_to_anchor=(1, 0.64), frameon=False)


def _picture(name: str) -> Path:
    return PAGE.parent / f"calibration-{name}.png"
