"""What a command shows while it works, on standard error: standard output holds its result alone."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from threading import Timer
from typing import TextIO, TypeVar

import click
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

T = TypeVar("T")
Update = Callable[[float, str], None]

console = Console(stderr=True)
# Seconds of silence in a log.
_PATIENCE = 10


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done: by a spinner in a terminal, by a line in a log if it takes long.

    Yields:
        What changes the text.
    """
    if console.is_terminal:
        with console.status(what) as status, _quiet():
            yield status.update
        return
    said = [what]
    timer = Timer(_PATIENCE, lambda: _log(f"{said[-1]} …"))
    timer.daemon = True
    timer.start()
    try:
        with _quiet():
            yield said.append
    finally:
        timer.cancel()


@contextmanager
def progress(total: float) -> Iterator[Update]:
    """Show how far something is: by a bar in a terminal, by a line now and then in a log.

    Args:
        total: How much there is to do.

    Yields:
        What takes how much is done, and of what.
    """
    if console.is_terminal:
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar, _quiet():
            task = bar.add_task("", total=total)
            yield lambda done, what: bar.update(task, completed=done, description=what)
        return
    start = last = time.monotonic()

    def log(done: float, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PATIENCE:
            last = now
            _log(f"{done / total:4.0%} after {now - start:.0f} s: {what}")

    with _quiet():
        yield log


def tracked(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate over items and show how far it is."""
    everything = list(items)
    with progress(len(everything)) as update:
        for number, item in enumerate(everything):
            update(number, what)
            yield item
        update(len(everything), what)


def width() -> int | None:
    """Characters in a line of standard output; None where it goes to a file or another program."""
    if "COLUMNS" in os.environ or (sys.stdout is not None and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return None


def _quiet() -> redirect_stdout[TextIO]:
    """What libraries print is not the result."""
    return redirect_stdout(sys.stderr)


def _log(line: str) -> None:
    click.echo(f"coconv: {line}", err=True)
