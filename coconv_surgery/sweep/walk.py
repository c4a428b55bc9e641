"""A walk over a collection in several processes: resumable, and no network stops it."""

import csv
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from dataclasses import fields
from pathlib import Path

import torch
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from coconv_surgery.sweep.check import CONVERTED, CRASHED, NOT_BUILT, Row, check
from coconv_surgery.sweep.zoo import Zoo

_COLUMNS = [field.name for field in fields(Row)]
# Processes are renewed after so many networks, as memory of a large one is not all given back.
_NETWORKS_A_PROCESS = 50


def walk(
    zoo: Zoo,
    names: Sequence[str],
    path: Path,
    *,
    jobs: int = 1,
    timeout: float = 600,
    progress: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Check networks of a collection, and write a CSV file with a row for each.

    Rows are appended as they come, so an interrupted walk goes on where it was: what the file says was converted, or
    could not be built, is not done again. In the end the rows are in the order of ``names``.

    Args:
        zoo: The collection.
        names: Which of its networks.
        path: The file.
        jobs: Number of processes, of one thread each.
        timeout: Seconds after which a network is given up.
        progress: Called with each row that is done, also with those that the file had.

    Returns:
        A row for each name. Where a process dies or a network takes too long, that row says so.
    """
    done = {row.name: row for row in read_rows(path) if row.status in (CONVERTED, NOT_BUILT) and row.name in set(names)}
    for row in done.values():
        progress(row)
    _write(path, list(done.values()))
    with ProcessPool(
        max_workers=jobs,
        max_tasks=_NETWORKS_A_PROCESS,
        initializer=torch.set_num_threads,
        initargs=[1],
        context=multiprocessing.get_context("spawn"),
    ) as pool:
        futures = {name: pool.schedule(check, args=[zoo, name], timeout=timeout) for name in names if name not in done}
        for name, future in futures.items():
            done[name] = row = _result(zoo, name, future)
            _append(path, row)
            progress(row)
    rows = [done[name] for name in names]
    _write(path, rows)
    return rows


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a CSV file; none if there is no such file, or if its columns are of another release."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return [Row.read(record) for record in reader] if reader.fieldnames == _COLUMNS else []


def _result(zoo: Zoo, name: str, future: "ProcessFuture[Row]") -> Row:
    try:
        return future.result()
    except ProcessExpired as error:
        problem = f"its process died with exit code {error.exitcode}"
    except TimeoutError:
        problem = "it took too long"
    return Row(name=name, family=zoo.family(name), status=CRASHED, error=problem)


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.record() for row in rows)


def _append(path: Path, row: Row) -> None:
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, _COLUMNS, lineterminator="\n").writerow(row.record())
