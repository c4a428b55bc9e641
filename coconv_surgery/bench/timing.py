"""Times of several calls, taken in turn, so that a drift of the machine's speed affects all of them alike."""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from coconv_surgery.bench.heap import keep_freed_memory


class Ratio(NamedTuple):
    """Paired ratios of one call's times to another's: the median, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float], baseline: list[float]) -> "Ratio":
        """Pair times of the same round."""
        low, median, high = statistics.quantiles([a / b for a, b in zip(times, baseline, strict=True)], n=4)
        return cls(median, low, high)


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Time calls in turn, in a new order each round, because a call finds the caches as the one before it left them.

    Args:
        calls: What to time, by name.
        rounds: How often to time each, at least once.
        device: Where the calls compute; on CUDA the times are those of events on its stream.
        warmup: Rounds that do not count.

    Returns:
        Seconds of every round, by name.
    """
    clock = _cuda_seconds if device.type == "cuda" else _seconds
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    shuffle = random.Random(0).shuffle
    for turn in range(-warmup, rounds):
        shuffle(names)
        for name in names:
            seconds = clock(calls[name])
            if turn >= 0:
                times[name].append(seconds)
    return times


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep denormal numbers and fresh pages of memory from distorting times.

    Denormal numbers slow random networks down at random; the page faults of a large tensor can cost as much as a
    convolution.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_seconds(call: Callable[[], Any]) -> float:
    event: Any = torch.cuda.Event
    start, stop = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000
