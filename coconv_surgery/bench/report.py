"""Measurements as JSON, as a table and as a picture."""

import json
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coconv_surgery.bench import calibration
from coconv_surgery.bench.deployment import Deployed, Operations
from coconv_surgery.bench.memory import Peak
from coconv_surgery.bench.operators import Operator
from coconv_surgery.bench.speed import Timing
from coconv_surgery.bench.surgery import Cost, growth
from coconv_surgery.bench.timing import Ratio
from coconv_surgery.layers.depthwise import operators as built_operators
from coconv_surgery.viz.tables import markdown_table


class Files(NamedTuple):
    """What a benchmark writes.

    Attributes:
        data: The measurements, as JSON.
        page: The same as tables, in Markdown.
        picture: The timings, as PNG; None where nothing was timed side by side.
    """

    data: Path
    page: Path
    picture: Path | None


def machine(device: torch.device) -> dict[str, str]:
    """Describe what was measured on: processor or GPU, threads and versions."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{cpu_name()}, {torch.get_num_threads()} threads"
    versions = {package: _version(package) for package in ("torch", "timm", "mmdet")}
    operator = "not built or switched off" if built_operators() is None else "built"
    header = {"device": processor, "Python": platform.python_version(), **versions}
    return header if device.type == "cuda" else {**header, "operator for depthwise levels": operator}


def save(
    folder: Path,
    name: str,
    device: torch.device,
    command: str,
    *,
    timings: Sequence[Timing] = (),
    operators: Sequence[Operator] = (),
    memory: Sequence[Peak] = (),
    costs: Sequence[Cost] = (),
    calibrations: Sequence[calibration.Cost] = (),
    deployed: Sequence[Deployed] = (),
    operations: Sequence[Operations] = (),
) -> Files:
    """Write what a target measured.

    Args:
        folder: Where to write; created if it is missing.
        name: Name of the files, without suffix.
        device: What was measured on.
        command: The command that made the files.
        timings: Layers or networks side by side.
        operators: Where the difference goes.
        memory: Peak memory of a training step.
        costs: What surgery costs.
        calibrations: What calibration costs.
        deployed: Networks in the programs that run them.
        operations: Where their time goes in ONNX Runtime.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = machine(device)
    data: dict[str, Any] = {"machine": header, "command": command}
    lines = [f"Made by `{command}` on {', '.join(' '.join(item) for item in header.items())}.\n"]
    if timings:
        data["timings"] = [asdict(timing) for timing in timings]
        lines += _timings(timings)
    if operators:
        data["operators"] = [asdict(row) for row in operators]
        lines += [f"\n{_OPERATORS_LEGEND}\n", markdown_table(_OPERATORS, list(map(_operators, operators)))]
    if memory:
        data["memory"] = [peak._asdict() for peak in memory]
        rows = [(peak.network, f"{peak.coconv:.3f}", f"{peak.authors:.3f}") for peak in memory]
        lines += ["\nPeak memory of a training step, plain = 1:\n", markdown_table(_MEMORY, rows)]
    if costs:
        data["costs"] = [asdict(cost) for cost in costs]
        lines.append(markdown_table(_COSTS, [_cost(cost) for cost in costs]))
        if (ratio := growth(costs)) is not None:
            lines.append(f"\nSeconds a convolution, at 1,000 over at 100: {ratio:.2f}")
    if calibrations:
        data["calibrations"] = [asdict(cost) for cost in calibrations]
        cells = [(c.model, str(c.convs), f"{c.seconds:.0f}", f"{c.peak_mib / 1024:.2f}") for c in calibrations]
        lines += ["64 images of 224×224; memory of the whole process.\n", markdown_table(_CALIBRATIONS, cells)]
    if deployed:
        data["deployed"] = [asdict(row) for row in deployed]
        lines += [f"{_DEPLOYED_LEGEND}\n", markdown_table(_DEPLOYED, list(map(_deployed, deployed)))]
    if operations:
        data["operations"] = [asdict(row) for row in operations]
        lines += [f"\n{_OPERATIONS_LEGEND}\n", markdown_table(_OPERATIONS, list(map(_operations, operations)))]
    written, page = folder / f"{name}.json", folder / f"{name}.md"
    written.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Files(written, page, draw(written))


def draw(data: Path) -> Path | None:
    """Draw what was timed side by side, as a PNG beside the measurements.

    Args:
        data: Measurements that :func:`save` wrote.

    Returns:
        The picture; None where nothing was timed side by side.
    """
    measured = json.loads(data.read_text(encoding="utf-8"))
    subjects: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for kind, series in _SERIES.items():
        for row in measured.get(kind, ()):
            subject, *settings = row["case"].values() if "case" in row else (row["network"], row["runtime"])
            subjects[subject].append((" · ".join(settings), {name: row[key] for key, name in series.items()}))
    if not subjects:
        return None
    from coconv_surgery.viz.timings import Panel, plot_timings

    panels = []
    for subject, lines in subjects.items():
        labels, ratios = zip(*lines, strict=True)
        panels.append(Panel(subject, labels, {name: [line[name] for line in ratios] for name in ratios[0]}))
    picture = data.with_suffix(".png")
    plot_timings(panels, picture, measured["machine"]["device"])
    return picture


# What is drawn of each kind of measurement, by its name there.
_SERIES = {
    "timings": {"alone": "the levels' convolutions alone", "authors": "authors' layout", "coconv": "CoConv"},
    "deployed": {
        "plain_deployed": "plain, deployed",
        "contextual": "contextual",
        "contextual_deployed": "contextual, deployed",
    },
}


_LEGEND = (
    "Times over those of the plain convolution, medians of paired ratios with their quartiles; batch 8 for layers. "
    "*authors* is their layout: one convolution module a level, and a concatenation."
)
_ALONE = " *levels alone* is the levels' convolutions without anything around them."
_TIMINGS = ("", "mode", "layout", "precision", "engine", "plain ms", "CoConv", "authors")
_DEPLOYED_LEGEND = (
    "Times over those of the plain network as it is, medians of paired ratios with their quartiles; single precision. "
    "The last column is contextual, deployed over plain, deployed."
)
_DEPLOYED = (
    *("network", "program", "plain ms", "plain, deployed", "contextual", "contextual, deployed"),
    "deployed over deployed",
)
_OPERATIONS_LEGEND = (
    "Operations of the deployed networks in ONNX Runtime, by its profiler, of which one has more than the other: what "
    "they give, how many there are, and the milliseconds that they take together."
)
_SIDE_BY_SIDE = ("plain", "plain ms", "contextual", "contextual ms")
_OPERATIONS = ("network", "operation", "output", *_SIDE_BY_SIDE)
_OPERATORS_LEGEND = (
    "Operators of torch, by its profiler, for which the contextual network takes at least half a percent of the plain "
    "one's time more, or less: how often they are called, and the milliseconds that they take together without the "
    "operators that they call."
)
_OPERATORS = ("network", "mode", "layout", "operator", *_SIDE_BY_SIDE)
_MEMORY = ("network", "CoConv", "authors")
_CALIBRATIONS = ("network", "convs solved", "seconds", "peak GiB")
_COSTS = ("network", "convs", "plan s", "convert s", "weights MiB", "peak memory / weights")


def _timings(timings: Sequence[Timing]) -> list[str]:
    rows = []
    for timing in timings:
        what = (timing.case.subject, *timing.case.settings, f"{timing.plain_ms:.2f}")
        rows.append((*what, _ratio(timing.coconv), _ratio(timing.authors)))
    if all(timing.alone is None for timing in timings):
        return [f"{_LEGEND}\n", markdown_table(_TIMINGS, rows)]
    rows = [(*row, _ratio(timing.alone)) for row, timing in zip(rows, timings, strict=True)]
    return [f"{_LEGEND}{_ALONE}\n", markdown_table((*_TIMINGS, "levels alone"), rows)]


def _deployed(row: Deployed) -> tuple[str, ...]:
    ratios = (row.plain_deployed, row.contextual, row.contextual_deployed, row.over_deployed)
    return (row.network, row.runtime, f"{row.plain_ms:.2f}", *map(_ratio, ratios))


def _operations(row: Operations) -> tuple[str, ...]:
    return (row.network, row.kind, "×".join(map(str, row.output)), *_side_by_side(row))


def _operators(row: Operator) -> tuple[str, ...]:
    return (row.case.subject, row.case.mode, row.case.layout, row.name, *_side_by_side(row))


def _side_by_side(row: Operations | Operator) -> tuple[str, ...]:
    return (str(row.plain), f"{row.plain_ms:.2f}", str(row.contextual), f"{row.contextual_ms:.2f}")


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _cost(cost: Cost) -> tuple[str, ...]:
    seconds = (f"{cost.plan_s:.2f}", f"{cost.convert_s:.2f}")
    return (cost.model, str(cost.convs), *seconds, f"{cost.weights_mib:.0f}", f"{cost.memory:.3f}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def cpu_name() -> str:
    """What the processor of this machine calls itself, on Linux; elsewhere what Python calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
