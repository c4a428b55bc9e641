"""Many networks, and all that fails on them: ``PYTHONPATH=tests python -m fuzz --networks 2000 --minutes 30``."""

import argparse
import contextlib
import faulthandler
import gc
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.stateful import run_state_machine_as_test

from fuzz import machine
from fuzz.networks import KINDS

BATCH = 20
STEPS = 20


@dataclass
class Result:
    """What a batch of networks came to."""

    operations: Counter = field(default_factory=Counter)
    refusals: Counter = field(default_factory=Counter)
    failures: Counter = field(default_factory=Counter)
    samples: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Result") -> None:
        self.operations += other.operations
        self.refusals += other.refusals
        self.failures += other.failures
        self.samples = other.samples | self.samples


def run_batch(
    number: int, networks: int, kinds: tuple[str, ...], checks: tuple[str, ...], shrink: str | None = None
) -> Result:
    """Run one batch of networks.

    Args:
        number: The seed.
        networks: How many.
        kinds: Of parts to draw from.
        checks: What to look for besides.
        shrink: The failure to stop at and to shrink, by a part of its text; others are passed over.
    """
    torch.set_num_threads(1)
    gc.freeze()
    faulthandler.enable()
    result = Result()

    class Collecting(machine.Surgery):
        @contextlib.contextmanager
        def guard(self, name: str, given: Any) -> Iterator[None]:
            self.steps.append(f"{name} {given or ''}")
            try:
                yield
            except UnsatisfiedAssumption:
                raise
            except Exception as error:
                self.ended = True
                text = describe(name, error)
                if shrink is not None and shrink in text:
                    raise
                result.failures[text] += 1
                where = "".join(traceback.format_exception(error, limit=-6))
                steps = "\n".join(self.steps)
                result.samples.setdefault(text, f"--seed {number}\n{self.recipe}\n{steps}\n{where}")

    Collecting.kinds, Collecting.checks = kinds, checks
    machine.OPERATIONS.clear()
    machine.REFUSALS.clear()
    run_state_machine_as_test(
        seed(number)(Collecting),
        settings=settings(
            max_examples=networks,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[Phase.generate] if shrink is None else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    result.operations, result.refusals = Counter(machine.OPERATIONS), Counter(machine.REFUSALS)
    return result


def describe(name: str, error: BaseException) -> str:
    """What distinguishes a failure from others."""
    message = re.sub(r"'[^']*'|0x[0-9a-f]+|\d+", "…", (str(error).splitlines() or [""])[0])[:140]
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/coconv_surgery/" in frame.filename]
    place = f" [{ours[-1].filename.rpartition('coconv_surgery/')[2]}:{ours[-1].name}]" if ours else ""
    return f"{name}: {type(error).__name__}: {message}{place}"


def start_batch(*given: Any) -> tuple[Connection, Any]:
    """Run a batch in a process of its own, which may crash."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(run_batch(*given)))
    process.start()
    sender.close()
    return receiver, process


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--networks", type=int, default=2000, help="how many")
    parser.add_argument("--minutes", type=float, default=30, help="stop after so long")
    parser.add_argument("--seed", type=int, default=None, help="of the first batch; default: the time")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--without", nargs="*", default=[], choices=KINDS, help="kinds of parts to leave out")
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=KINDS, help="kinds of parts to draw from")
    parser.add_argument("--unchecked", nargs="*", default=[], choices=machine.CHECKS, help="what not to look for")
    parser.add_argument("--shrink", help="stop at a failure whose text holds this, and make it small")
    parser.add_argument("--samples", action="store_true", help="print a network and its operations for each failure")
    given = parser.parse_args()
    first = int(time.time()) if given.seed is None else given.seed
    kinds = tuple(kind for kind in given.only if kind not in given.without)
    checks = tuple(check for check in machine.CHECKS if check not in given.unchecked)
    if given.shrink is not None:
        for number in range(first, first - given.networks // -BATCH):
            print(f"--seed {number}", flush=True)
            run_batch(number, min(BATCH, given.networks), kinds, checks, given.shrink)
        return
    start, total = time.monotonic(), Result()
    print(f"--seed {first}", flush=True)
    numbers = iter(range(first, first - given.networks // -BATCH))
    running: dict[Connection, tuple[int, Any]] = {}
    while True:
        while len(running) < given.jobs and time.monotonic() - start < 60 * given.minutes:
            if (number := next(numbers, None)) is None:
                break
            receiver, process = start_batch(number, min(BATCH, given.networks), kinds, checks)
            running[receiver] = number, process
        if not running:
            break
        for receiver in wait(list(running)):
            number, process = running.pop(receiver)
            try:
                total.add(receiver.recv())
            except EOFError:
                process.join()
                total.add(Result(failures=Counter({f"--seed {number} ended with {process.exitcode}": 1})))
    seconds = time.monotonic() - start
    made = total.operations.pop("networks", 0)
    print(f"{made} networks, {total.operations.total()} operations in {seconds:.0f} s on {given.jobs} processes")
    for title, counts in (("operations", total.operations), ("refused", total.refusals), ("failed", total.failures)):
        print(f"\n{title}: {counts.total()}")
        for what, count in counts.most_common():
            print(f"{count:7}  {what}")
            if given.samples and what in total.samples:
                print("\n".join(f"{'':9}{line}" for line in total.samples[what].splitlines()))
