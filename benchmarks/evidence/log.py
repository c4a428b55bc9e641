"""One file a run."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coconv_surgery.bench.report import machine

RUNS = Path(__file__).parent / "runs"


def once(name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Make a run and log it, unless it is logged.

    Args:
        name: Its name: the part of the study, what is run, and the seed.
        run: Makes it; returns what was measured.
    """
    path = RUNS / f"{name}.json"
    if path.exists():
        return
    print(name, flush=True)
    start = time.perf_counter()
    measured = run()
    seconds = round(time.perf_counter() - start, 1)
    RUNS.mkdir(exist_ok=True)
    content = {"name": name, "measured": measured, "seconds": seconds, "machine": machine(torch.device("cpu"))}
    passing = path.with_suffix(".part")
    passing.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    passing.rename(path)


def logged(beginning: str) -> dict[str, dict[str, Any]]:
    """The logs of runs whose names begin so, by name."""
    files = sorted(RUNS.glob(f"{beginning}*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
