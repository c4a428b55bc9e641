"""Measurements as JSON, as a table and as a picture."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from coconv_surgery.bench.speed import Timing
from coconv_surgery.bench.surgery import Cost, growth
from coconv_surgery.bench.timing import Ratio


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement belongs to: processor or GPU, threads and versions."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = {package: _version(package) for package in ("torch", "timm", "mmdet")}
    return {"device": processor, "Python": platform.python_version(), **versions}


def save(
    folder: Path,
    name: str,
    device: torch.device,
    command: str,
    *,
    timings: Sequence[Timing] = (),
    memory: Sequence[tuple[str, float, float]] = (),
    costs: Sequence[Cost] = (),
) -> list[Path]:
    """Write what a target measured.

    Args:
        folder: Where to.
        name: Name of the files, without suffix.
        device: Where it was measured.
        command: What made the files.
        timings: Layers or networks side by side.
        memory: Networks, with the peak memory of a training step over the plain network's: contextual, authors' layout.
        costs: What surgery costs.

    Returns:
        The files: JSON, Markdown, and a picture where there are timings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = machine(device)
    data: dict[str, Any] = {"machine": header, "command": command}
    lines = [f"Made by `{command}` on {', '.join(' '.join(item) for item in header.items())}.\n"]
    if timings:
        data["timings"] = [asdict(timing) for timing in timings]
        lines += _timings(timings)
    if memory:
        data["memory"] = [dict(zip(("network", "coconv", "authors"), row, strict=True)) for row in memory]
        cells = [(network, f"{coconv:.3f}", f"{authors:.3f}") for network, coconv, authors in memory]
        lines += ["\nPeak memory of a training step, plain = 1:\n", _markdown(("network", "CoConv", "authors"), cells)]
    if costs:
        data["costs"] = [asdict(cost) for cost in costs]
        lines.append(_markdown(_COSTS, [_cost(cost) for cost in costs]))
        if any(cost.model.startswith("1000 ") for cost in costs):
            lines.append(f"\nSeconds a convolution, at 1,000 over at 100: {growth(list(costs)):.2f}")
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    paths[0].write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    if timings:
        from coconv_surgery.viz.timings import draw_timings

        paths.append(folder / f"{name}.png")
        draw_timings(timings, paths[-1], title=header["device"])
    return paths


_LEGEND = (
    "Times over those of the plain convolution, medians of paired ratios with their quartiles; batch 8 for layers. "
    "*authors* is their layout: one convolution module a level, and a concatenation."
)
_ALONE = " *levels alone* is the levels' convolutions without anything around them."
_TIMINGS = ("", "mode", "layout", "precision", "engine", "plain ms", "CoConv", "authors")
_COSTS = ("network", "convs", "plan s", "convert s", "weights MiB", "peak memory / weights")


def _timings(timings: Sequence[Timing]) -> list[str]:
    rows = []
    for timing in timings:
        case = timing.case
        settings = (case.subject, case.mode, case.layout, case.precision, case.engine, f"{timing.plain_ms:.2f}")
        rows.append((*settings, *map(_ratio, (timing.coconv, timing.authors))))
    if all(timing.alone is None for timing in timings):
        return [f"{_LEGEND}\n", _markdown(_TIMINGS, rows)]
    rows = [(*row, _ratio(timing.alone)) for row, timing in zip(rows, timings, strict=True)]
    return [f"{_LEGEND}{_ALONE}\n", _markdown((*_TIMINGS, "levels alone"), rows)]


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _cost(cost: Cost) -> tuple[str, ...]:
    seconds = (f"{cost.plan_s:.2f}", f"{cost.convert_s:.2f}")
    return (cost.model, str(cost.convs), *seconds, f"{cost.weights_mib:.0f}", f"{cost.memory:.3f}")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
