"""Options and kinds of values that several commands share."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDERS = ("local-dir:", "local_dir:")  # how a TARGET names one
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class Output(click.Path):
    """A file or a folder that will be written, checked before the work for it starts.

    Args:
        suffixes: Those that a file may have. Default: any.
        dash: Whether ``-`` is standard output.
        folder: Whether it is a folder, which need not be there.
    """

    def __init__(self, *suffixes: str, dash: bool = False, folder: bool = False) -> None:
        super().__init__(file_okay=not folder, dir_okay=folder, writable=True, allow_dash=dash, path_type=Path)
        self._suffixes, self._folder = suffixes, folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check a path."""
        path = Path(str(super().convert(value, param, ctx)))
        if str(path) == "-" and self.allow_dash:
            return path
        if self._suffixes and path.suffix not in self._suffixes:
            self.fail(f"{path}: its name must end in {' or '.join(self._suffixes)}", param, ctx)
        place = next(parent for parent in path.absolute().parents if parent.exists() or not self._folder)
        if not place.is_dir():
            why = "is not a folder" if place.exists() else "does not exist"
            self.fail(f"cannot write {path}: the folder {place} {why}", param, ctx)
        if not os.access(place, os.W_OK):
            self.fail(f"cannot write {path}: {place} may not be written", param, ctx)
        return path


def read_size(value: str) -> int | tuple[int, ...]:
    """Read an input size: ``224``, ``224x320`` or ``3x224x320``; commas do as well.

    >>> read_size("224"), read_size("3x224x320")
    (224, (3, 224, 320))
    """
    try:
        sides = tuple(int(side) for side in value.lower().replace("×", "x").replace(",", "x").split("x"))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2, 3) or min(sides) < 1:
        raise click.BadParameter(f"{value!r} is no size: give 224, 224x320 or 3x224x320")
    return sides[0] if len(sides) == 1 else sides


size = click.option(
    "--input-size",
    type=read_size,
    metavar="SIDE|HxW|CxHxW",
    help="Input size. Default: what timm or the config says.",
)
arg = click.option(
    "--arg", "arguments", multiple=True, metavar="KEY=VALUE", help="For what builds the network. Repeatable."
)
weights = click.option("--checkpoint", "--weights", "checkpoint", type=FILE, help="File of weights to load.")
pretrained = click.option("--pretrained", is_flag=True, help="Load the weights that the library has for it.")
device = click.option("--device", metavar="NAME", help="Such as cpu or cuda:1. Default: a GPU if there is one.")
plan = click.option("--plan", "plan_path", type=FILE, help="A saved plan, or a file of weights that tells its own.")
# Without torch the names that the library has are not known here; a test compares.
POLICIES = ("resolution", "stage", "top", "uniform")
SPLITS = ("pow2", "even")


def planning(*, policy: str | None = "resolution") -> Callable[[Command], Command]:
    """Add the options of planning to a command.

    Args:
        policy: The default.
    """
    options = [
        size,
        click.option(
            "--policy",
            default=policy,
            show_default=policy is not None,
            help=f"One of {', '.join(POLICIES)}; numbers may follow, as in stage(3,3,2,1).",
        ),
        click.option(
            "--max-levels", type=click.IntRange(min=1), help="Most levels a convolution gets (policy resolution)."
        ),
        click.option("--split", type=click.Choice(SPLITS), help="How channels are shared out. Default: pow2."),
        click.option("--min-channels", type=click.IntRange(min=1), help="Fewest channels a level may have."),
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Only convolutions with such a name. Repeatable."
        ),
        click.option("--exclude", multiple=True, metavar="GLOB", help="No convolution with such a name. Repeatable."),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def subject(command: Command) -> Command:
    """Add what says which network a command looks at, with which weights, and how it is converted."""
    for decorate in (pretrained, weights, arg, planning(), click.argument("target")):
        command = decorate(command)
    return command


def asks_for_a_plan(choices: Iterable[str]) -> bool:
    """Whether options of planning stand on the command line, which want a plan other than the one that there is.

    Args:
        choices: Their names. The size of the input alone asks for no other plan.
    """
    return any(is_given(name) for name in choices if name != "input_size")


def is_given(name: str) -> bool:
    """Whether an option stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def check_weights(checkpoint: Path | None, pretrained: bool) -> None:
    """Check that weights are asked for once."""
    if checkpoint is not None and pretrained:
        raise click.UsageError("--checkpoint and --pretrained both give the weights: choose one")


def check_outputs(*outputs: Path | None, reads: Iterable[str | Path | None] = ()) -> None:
    """Check that no two files that are to be written are one, and none is one that is read.

    Args:
        *outputs: What is to be written.
        reads: What is read, or names something else.
    """
    paths = [path.resolve() for path in outputs if path is not None]
    names = [str(name) for name in reads if name is not None]
    folders = [Path(name.partition(":")[2]).resolve() for name in names if name.startswith(_FOLDERS)]
    files = [path for name in names if (path := Path(name)).is_file()]
    for path in paths:
        if paths.count(path) > 1:
            raise click.UsageError(f"{path.name} cannot be two files: give each output a name of its own")
        there = path.is_file()
        if there and (any(map(path.samefile, files)) or any(folder in path.parents for folder in folders)):
            raise click.UsageError(f"{path.name} is read, and would be written over: choose another name")


def words_of(name: str) -> list[str]:
    """An option as it stands on the command line, if it does."""
    context = click.get_current_context()
    option = next((option for option in context.command.params if option.name == name), None)
    if not isinstance(option, click.Option) or not is_given(name):
        return []
    value, flag = context.params[name], max(option.opts, key=len)
    if option.is_flag:
        return [flag]
    if isinstance(value, tuple) and not option.multiple:
        value = "x".join(map(str, value))
    return [word for one in (value if option.multiple else [value]) for word in (flag, str(one))]
