"""Processes that are forked: what the process before them has imported they need not import again."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

Script = Path | str  # a file, or the name of a module
TIMEOUT = 600


def python(code: str, **modules: None) -> CompletedProcess[str]:
    """What ``python -c`` does with some code, in a process that has torch and timm, and nothing that these do not need.

    Args:
        code: It.
        **modules: What is not installed, as ``click=None``.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = bare().Process(target=_interpret, args=(code, modules, files))
        process.start()
        code_at_exit = _join(process)
        return CompletedProcess(code, code_at_exit, *(file.read_text() for file in files))


def bare() -> ForkServerContext:
    """Makes processes that have imported torch and timm, and nothing that these do not need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm"])
    return context


def start(script: Script, *arguments: object, output: Path) -> BaseProcess:
    """Start a script in a fork of this process that leads a group of its own.

    Args:
        script: It.
        *arguments: Of its command line.
        output: Where to add what it prints.
    """
    return _fork(_run, script, arguments, output)


def torchrun(script: Script, *arguments: object, output: Path) -> None:
    """Run a script in two processes, by what torchrun calls.

    Args:
        script: It.
        *arguments: Of its command line.
        output: Where to add what it prints.
    """
    process = _fork(_launch, script, arguments, output)
    assert _join(process) == 0, output.read_text()[-3000:]


def _join(process: BaseProcess) -> int:
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{process.name} takes more than {TIMEOUT} s")
    assert process.exitcode is not None
    return process.exitcode


def _fork(work: Callable[..., None], *arguments: object) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=_lead, args=(work, arguments))
    process.start()
    return process


def _lead(work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.setsid()
    work(*arguments)


def _launch(script: Script, arguments: tuple[object, ...], output: Path) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=output.stem,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    elastic_launch(config, _run)(script, arguments, output)


def _run(script: Script, arguments: tuple[object, ...], output: Path) -> None:
    _print_to(output, output)
    torch.set_num_threads(1)
    sys.argv = [str(each) for each in (script, *arguments)]
    execute: Callable[..., object] = runpy.run_path if isinstance(script, Path) else runpy.run_module
    execute(str(script), run_name="__main__")


def _interpret(code: str, modules: dict[str, Any], files: list[Path]) -> None:
    _print_to(*files)
    warnings.simplefilter("ignore")
    sys.modules.update(modules)
    exec(code, {"__name__": "__main__"})


def _print_to(*files: Path) -> None:
    for stream, path in enumerate(files, start=1):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
