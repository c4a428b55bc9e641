"""A walk over a collection in several processes: resumable, and no network stops it."""

import csv
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, TimeoutError, as_completed
from dataclasses import fields
from pathlib import Path

import torch
from pebble import ProcessExpired, ProcessPool

from coconv_surgery.sweep.check import CONVERTED, CRASHED, NOT_BUILT, Row, check
from coconv_surgery.sweep.collections import Collection

_COLUMNS = [field.name for field in fields(Row)]
# A process is replaced after so many networks, because it does not give all of a large one's memory back.
_NETWORKS_A_PROCESS = 50


def walk(
    collection: Collection,
    names: Sequence[str],
    path: Path,
    *,
    jobs: int = 1,
    timeout: float = 600,
    progress: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Check networks of a collection, and write a CSV file with a row for each.

    Rows are appended as they come, so an interrupted walk resumes where it stopped: networks that the file has as
    converted or not built are not tried again. Rows of other networks stay in the file.

    Args:
        collection: The collection.
        names: Which of its networks.
        path: The file.
        jobs: Number of processes, of one thread each.
        timeout: Seconds after which a network is given up.
        progress: Called with the row of each name that is done, including those already in the file.

    Returns:
        All rows of the file, by family. Where a process dies or a network takes too long, its row says so.

    Raises:
        ValueError: If the file has other columns than a sweep's.
    """
    rows = {row.name: row for row in read_rows(path)}
    todo = [name for name in names if name not in rows or rows[name].status not in (CONVERTED, NOT_BUILT)]
    for name in names:
        if name not in todo:
            progress(rows[name])
    _write(path, rows.values())
    with ProcessPool(
        max_workers=jobs,
        max_tasks=_NETWORKS_A_PROCESS,
        initializer=torch.set_num_threads,
        initargs=[1],
        context=multiprocessing.get_context("spawn"),
    ) as pool:
        futures: dict[Future[Row], str] = {
            pool.schedule(check, args=[collection, name], timeout=timeout): name for name in todo
        }
        for future in as_completed(futures):
            row = _result(collection, futures[future], future)
            rows[row.name] = row
            _append(path, row)
            progress(row)
    in_order = sorted(rows.values(), key=lambda row: (row.family, row.name))
    _write(path, in_order)
    return in_order


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a CSV file, without a last line that is cut short; none if the file does not exist.

    Raises:
        ValueError: If the file has other columns than a sweep's.
    """
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise ValueError(f"{path} is not of this release's sweeps: move it away, or start with --fresh")
        return [Row.read(record) for record in reader if None not in record.values()]


def _result(collection: Collection, name: str, future: Future[Row]) -> Row:
    try:
        return future.result()
    except ProcessExpired as error:
        problem = f"its process died with exit code {error.exitcode}"
    except TimeoutError:
        problem = "it took too long"
    except SystemExit as error:
        problem = f"it ended its process with exit code {error.code}"
    return Row(name=name, family=collection.family(name), status=CRASHED, error=problem)


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    with open(fresh, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.record() for row in rows)
    fresh.replace(path)


def _append(path: Path, row: Row) -> None:
    with open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.DictWriter(file, _COLUMNS, lineterminator="\n").writerow(row.record())
