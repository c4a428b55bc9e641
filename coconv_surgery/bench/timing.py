"""Times of several calls, taken in turn, so that a drift of the machine's speed meets all of them alike."""

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
        """Pair times up by the round that they were taken in."""
        low, median, high = statistics.quantiles([a / b for a, b in zip(times, baseline, strict=True)], n=4)
        return cls(median, low, high)


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Time calls in turn, each round in an order of its own: a call finds the caches as the one before it left them.

    Args:
        calls: What to time, by name.
        rounds: How often each is timed, at least 2.
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
    """Keep from the times what is not the calls' own: numbers too small to matter, and fresh pages of memory.

    Denormal numbers slow random networks down at random; page faults of large tensors cost up to as much as a
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
