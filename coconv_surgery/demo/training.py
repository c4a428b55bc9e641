"""A training in a process of its own, with its log in a file."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path


def run_logged(command: Sequence[str], log: Path, on_line: Callable[[str], None], threads: int | None = None) -> None:
    """Run a command, and write what it prints to a file.

    Args:
        command: The command.
        log: The file; its folder is where the command runs.
        on_line: Told every line.
        threads: Of a process. Default: as many as torch takes.

    Raises:
        RuntimeError: If the command fails.
    """
    # Waiting threads give up their core, so that training does not slow down whatever else runs.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with (
        open(log, "w", buffering=1, encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=log.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            on_line(line)
    if process.returncode:
        raise RuntimeError(f"training ended with exit code {process.returncode}: see {log}")
