"""Where the time of a contextual network goes that a plain one does not take, by torch's own profiler."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from coconv_surgery.bench.speed import SUBJECTS, Case, contender, prepare
from coconv_surgery.bench.timing import quiet

_WARMUP = 2  # runs that do not count
_SHARE = 0.005  # of the plain network's time, from which on a difference is told


@dataclass(frozen=True)
class Operator:
    """What an operator of torch's takes in a network, without the operators that it calls.

    Attributes:
        case: How the network is run.
        name: The operator.
        plain: How often the plain network calls it.
        plain_ms: Milliseconds that it takes there, all calls together, by medians.
        contextual: How often the contextual one calls it.
        contextual_ms: Milliseconds there.
    """

    case: Case
    name: str
    plain: int
    plain_ms: float
    contextual: int
    contextual_ms: float


def profile_operators(case: Case, device: torch.device, rounds: int) -> list[Operator]:
    """Profile a plain and a contextual network in turn.

    Args:
        case: How they are run.
        device: Where they compute.
        rounds: How often to run each.

    Returns:
        The operators for which they do not take the same time, the largest difference first.
    """
    subject = SUBJECTS[case.subject]
    with quiet():
        calls = [prepare(contender(subject, which), subject, case, device) for which in ("plain", "coconv")]
        runs = [[_profile(call, device) for call in calls] for _ in range(_WARMUP + rounds)]
    plain, contextual = (_medians(found) for found in zip(*runs[_WARMUP:], strict=True))
    least = _SHARE * sum(milliseconds for _, milliseconds in plain.values())
    rows = [Operator(case, name, *plain[name], *contextual[name]) for name in {**plain, **contextual}]
    told = [row for row in rows if abs(row.contextual_ms - row.plain_ms) >= least]
    return sorted(told, key=lambda row: -abs(row.contextual_ms - row.plain_ms))


def _medians(runs: Sequence[Mapping[str, tuple[int, float]]]) -> Mapping[str, tuple[int, float]]:
    """How often each operator is called, and its median milliseconds; none and 0 for others."""
    seen: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for run in runs:
        for name, found in run.items():
            seen[name].append(found)
    medians = {name: (each[-1][0], statistics.median(taken for _, taken in each)) for name, each in seen.items()}
    return defaultdict(lambda: (0, 0.0), medians)


def _profile(call: Callable[[], Any], device: torch.device) -> dict[str, tuple[int, float]]:
    """How often a call calls each operator, and the milliseconds that these calls take."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        call()
    return {
        event.key: (event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000)
        for event in seen.key_averages()
    }
