"""Commands that run something of the user's."""

# ruff: noqa: D301 (click's \b keeps the lines of an example apart)

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from coconv_cli import options


@click.command(context_settings={"allow_interspersed_args": False})
@options.planning(policy=None)
@options.plan
@click.option(
    "-o",
    "--output",
    type=options.Output(folder=True),
    help="Where plans are written. Default: where the script is told to write, else the current folder.",
)
@click.option(
    "--network",
    "networks",
    multiple=True,
    metavar="GLOB",
    help="Only networks of such a name, and not a teacher, say; made by functions of that name as well, as "
    "torchvision.models.resnet50(), or package.module:function. Repeatable.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="SCRIPT [ARGUMENTS]...")
def run(
    command: tuple[str, ...], plan_path: Path | None, output: Path | None, networks: tuple[str, ...], **choices: Any
) -> None:
    """Run a training script, unedited, on converted networks.

    Our models are registered with timm, and every network that the script makes by its name, through timm.create_model
    or torchvision.models.get_model, is converted as it is made: by --policy, or by the --plan of an earlier run, which
    its checkpoints tell as well as the file that it wrote.
    With neither, nothing is converted. A module is run by -- -m and its name.

    Networks are planned for --input-size, or else for the size that timm says, whatever the script trains at. What the
    script makes in other ways, or in processes that it spawns rather than forks, is not converted.

    \b
    coconv run --policy resolution -- train.py DATA --model resnet50 --output runs/1
    coconv run --plan last.pth.tar -- validate.py DATA --model resnet50 --checkpoint last.pth.tar
    coconv run -- train.py DATA --model coresnet50
    coconv run --policy resolution --input-size 64 --network my_package.networks:make -- train.py DATA
    torchrun --nproc-per-node 2 -m coconv_surgery run --policy resolution -- train.py DATA --model resnet50
    """
    from coconv_surgery.cli import targets
    from coconv_surgery.cli.running import Converting, check_command, output_folder
    from coconv_surgery.cli.running import run as run_command

    check_command(command)
    policy = choices["policy"]
    given = [f"--{name.replace('_', '-')}" for name in choices if options.is_given(name)]
    if plan_path is not None and given:
        raise click.UsageError(f"--plan already decides everything: leave out {given[0]}")
    if plan_path is None and policy is None:
        idle = [*given, *(option for option, value in (("--network", networks), ("--output", output)) if value)]
        if idle:
            raise click.UsageError(f"{idle[0]} is for networks that are converted: give --policy or --plan as well")
        _as_python_would(functools.partial(run_command, command))
        return
    if plan_path is not None:
        change = functools.partial(targets.replay, plan=targets.read_plan_file(plan_path))
    else:
        targets.check_policy(**choices)
        change = functools.partial(targets.convert_as_chosen, **choices)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    folder = output or (output_folder(command) if plan_path is None else None)  # a plan that was given is there already
    converting = Converting(change, folder, networks)
    try:
        with converting.in_force():
            _as_python_would(functools.partial(run_command, command))
    except SystemExit as end:
        if end.code or converting.found_any:
            raise
    if not converting.found_any and converting.passed_over:
        made = ", ".join(dict.fromkeys(converting.passed_over))
        sys.exit(f"coconv: nothing was converted: the script made {made}, which no --network matches")
    if not converting.found_any:
        sys.exit(
            "coconv: nothing was converted: the script made no network with 3×3 convolutions by timm.create_model or "
            "torchvision.models.get_model in this process or one forked off; what it makes otherwise, as by "
            "torchvision.models.resnet50(), is converted by --network resnet50, or --network package.module:function"
        )


def _as_python_would(work: Callable[[], None]) -> None:
    """Run something whose errors are not ours: they are shown and end the process as they would without us."""
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


COMMANDS = (run,)
