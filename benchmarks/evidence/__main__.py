"""``python -m evidence``: make what is not there yet, then the tables and figures from all logs."""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from evidence.report import write_report
from evidence.study import make, runs


def main() -> None:
    """Make the study, or a part of it."""
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    parser.add_argument("--only", default="", help="runs whose names begin so")
    parser.add_argument("--jobs", type=int, default=2, help="processes, with one thread each")
    parser.add_argument("--report", action="store_true", help="tables and figures from what is there, no runs")
    arguments = parser.parse_args()
    wanted = [] if arguments.report else [name for name, _ in runs() if name.startswith(arguments.only)]
    # One thread each: in a subprocess, which some runs start, as well.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as executor:
        made = {name: executor.submit(make, name) for name in wanted}
    write_report()
    for name, run in made.items():
        if (error := run.exception()) is not None:
            raise RuntimeError(f"the run {name} has failed; the others are there") from error


if __name__ == "__main__":
    main()
