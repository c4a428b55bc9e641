"""One target of the benchmarks, from its subjects to its files."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from coconv_surgery.bench import calibration, deployment
from coconv_surgery.bench.memory import measure_memory
from coconv_surgery.bench.operators import profile_operators
from coconv_surgery.bench.report import Files, save
from coconv_surgery.bench.speed import ENGINES, LAYERS, NETWORKS, Engine, cases, measure
from coconv_surgery.bench.surgery import MODELS
from coconv_surgery.bench.surgery import measure as measure_surgery

Target = Literal["layers", "networks", "surgery", "calibration", "deploy"]
_SUBJECTS: dict[Target, Iterable[str]] = {
    "layers": LAYERS,
    "networks": NETWORKS,
    "surgery": MODELS,
    "calibration": calibration.MODELS,
    "deploy": deployment.NETWORKS,
}


def run(
    target: Target,
    output: Path,
    *,
    only: str = "*",
    engines: Sequence[Engine] = (),
    rounds: int = 15,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Files:
    """Measure a target, on the GPU if there is one, and write the results.

    For networks in eager mode these include the peak memory of a training step, and the operators that cost the
    difference in single precision.

    Args:
        target: Layers or networks, contextual beside plain; what surgery or calibration costs; networks deployed.
        output: Folder of the files.
        only: A glob that chooses layers or networks by name.
        engines: Engines to run in; both if empty. They are part of the files' names.
        rounds: How often to time each contender.
        track: Wraps the sequence of what is measured, to show progress.

    Returns:
        The files.

    Raises:
        ValueError: If no name matches.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [name for name in _SUBJECTS[target] if fnmatchcase(name, only)]
    if not chosen:
        raise ValueError(f"no benchmark of {target} matches {only!r}: choose from {', '.join(_SUBJECTS[target])}")
    command = f"coconv bench {target}" + "".join(f" --engine {engine}" for engine in engines)
    command += ("" if only == "*" else f" --only '{only}'") + f" --rounds {rounds}"
    name = "-".join([target, *engines]) + ("-gpu" if device.type == "cuda" else "")
    if target == "calibration":
        return save(output, name, device, command, calibrations=[calibration.measure(model) for model in track(chosen)])
    if target == "surgery":
        costs = [measure_surgery(model, rounds) for model in track(chosen)]
        return save(output, name, device, command, costs=costs)
    if target == "deploy":
        deployed = [row for network in track(chosen) for row in deployment.measure(network, rounds)]
        operations = [row for network in chosen for row in deployment.profile(network, rounds)]
        return save(output, name, device, command, deployed=deployed, operations=operations)
    engines = engines or ENGINES
    timings = [measure(case, device, rounds) for case in track(list(cases(chosen, engines)))]
    if target == "layers" or "eager" not in engines:
        return save(output, name, device, command, timings=timings)
    profiled = [case for case in cases(chosen, ["eager"]) if case.precision == "fp32"]
    operators = [row for case in profiled for row in profile_operators(case, device, rounds)]
    memory = measure_memory(chosen, device)
    return save(output, name, device, command, timings=timings, memory=memory, operators=operators)
