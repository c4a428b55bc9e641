"""A script run as it is, with every network that it makes converted as it is made."""

import functools
import inspect
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import timm
import torch.nn as nn
from timm.models import load_checkpoint

from coconv_surgery.layers.arguments import shown
from coconv_surgery.surgery import get_plan

Maker = Callable[..., nn.Module]
# What scripts call the option by which they are told where to write.
_FOLDERS = ("output", "output-dir", "outdir", "work-dir", "save-dir", "log-dir")


def check_command(command: Sequence[str]) -> None:
    """Check that there is something to run.

    Args:
        command: As it would follow ``python``.

    Raises:
        ValueError: If it names no module.
        FileNotFoundError: If there is no such script.
    """
    if list(command) == ["-m"]:
        raise ValueError("-m: give a module, as in -m package.train")
    if command[0] != "-m" and not os.path.exists(command[0]):
        raise FileNotFoundError(f"there is no script {shown(command[0])}: give its path, or -m and a module")


def run(command: Sequence[str]) -> None:
    """Run a script, or ``-m`` and a module, with its arguments, as ``python`` would.

    Args:
        command: As of :func:`check_command`.
    """
    script, *arguments = command
    if script == "-m":
        sys.argv = arguments
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


class Converting:
    """Converts what ``timm.create_model`` and ``torchvision.models.get_model`` make.

    Args:
        change: Converts a network in place.
        folder: Where its plan is written, by the first process of a distributed run alone.

    Attributes:
        count: How many networks were converted.
    """

    def __init__(self, change: Callable[[nn.Module], nn.Module], folder: Path) -> None:
        self.count = 0
        self._change, self._folder = change, folder
        self._is_within = False

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within, networks are converted as they are made, whoever imports what makes them, and from where."""
        makers = [timm.create_model, *_of_torchvision()]
        with _replaced({make: self.converting(make) for make in makers}):
            yield

    def converting(self, make: Maker) -> Maker:
        """What makes a converted network as ``make`` makes a plain one; a file of weights is loaded once it is."""
        signature = inspect.signature(make)

        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> nn.Module:
            if self._is_within:  # a maker that is called by another, whose network will be converted
                return make(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            checkpoint = given.arguments.pop("checkpoint_path", None)
            self._is_within = True
            try:
                network = self._change(make(*given.args, **given.kwargs))
            finally:
                self._is_within = False
            self._tell(network, str(next(iter(given.arguments.values()))))
            if checkpoint:
                load_checkpoint(network, checkpoint)
            return network

        return made

    def _tell(self, network: nn.Module, name: str) -> None:
        self.count += 1
        if _rank() > 0:
            return
        number = f"-{self.count}" if self.count > 1 else ""
        stem = re.sub(r"[^\w.-]+", "-", f"coconv-plan-{name}")
        path = self._folder / f"{stem}{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        plan = get_plan(network)
        plan.to_json(path)
        print(f"coconv: {name}, converted by {plan.policy} for {plan.input}\n{plan}\nplan: {path}", file=sys.stderr)


def output_folder(command: Sequence[str]) -> Path:
    """Where a script was told to write, by an option such as ``--output`` or ``--work-dir``; else the current folder.

    >>> str(output_folder(["train.py", "data", "--output_dir=runs/1"]))
    'runs/1'
    """
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("_", "-") in _FOLDERS:
            return Path(value if equals else following)
    return Path()


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _of_torchvision() -> list[Maker]:
    try:
        from torchvision.models import get_model
    except ImportError:
        return []
    return [get_model]


@contextmanager
def _replaced(others: dict[Maker, Maker]) -> Iterator[None]:
    """Within, functions are others, under every name that a module has for them."""
    held = [
        (module, name, value)
        for module in list(sys.modules.values())
        if issubclass(type(module), ModuleType)
        for name, value in list(vars(module).items())
        if type(value) is FunctionType and value in others  # asking others for their class may wake them
    ]
    for module, name, value in held:
        setattr(module, name, others[value])
    try:
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)
