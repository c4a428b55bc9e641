"""Where the time of a contextual network goes that a plain one does not take, by torch's own profiler."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from coconv_surgery.bench.speed import SUBJECTS, Case, contender, prepare
from coconv_surgery.bench.timing import quiet

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
        times: tuple[dict[str, list[float]], ...] = defaultdict(list), defaultdict(list)
        counts: tuple[dict[str, int], ...] = defaultdict(int), defaultdict(int)
        for turn in range(-2, rounds):
            for call, taken, count in zip(calls, times, counts, strict=True):
                found = _profile(call, device)
                if turn >= 0:
                    for name, (number, milliseconds) in found.items():
                        taken[name].append(milliseconds)
                        count[name] = number
    plain, contextual = ({name: statistics.median(each) for name, each in taken.items()} for taken in times)
    differences = {name: contextual.get(name, 0.0) - plain.get(name, 0.0) for name in {**plain, **contextual}}
    least = _SHARE * sum(plain.values())
    return [
        Operator(case, name, counts[0][name], plain.get(name, 0.0), counts[1][name], contextual.get(name, 0.0))
        for name, difference in sorted(differences.items(), key=lambda item: -abs(item[1]))
        if abs(difference) >= least
    ]


def _profile(call: Callable[[], Any], device: torch.device) -> dict[str, tuple[int, float]]:
    """How often a call calls each operator, and the milliseconds that these calls take."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        call()
    return {
        event.key: (event.count, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000)
        for event in seen.key_averages()
    }
