"""The group of all commands."""

import re
from importlib.metadata import PackageNotFoundError, requires

import click

from coconv_cli import demos, gans, measuring, networks, reporting, running

_MISTAKES = (ImportError, OSError, RuntimeError, TypeError, ValueError)


class Mistake(click.ClickException):
    """What a user can mend, as one message."""

    def show(self, file: object = None) -> None:
        """Print it."""
        click.echo(f"coconv: {self.message}", err=True)


class Commands(click.Group):
    """Commands whose mistakes are one message, or a traceback where it is asked for."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command that was called."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, BrokenPipeError):  # which click ends the process by
            raise
        except _MISTAKES as error:
            if ctx.meta.get("tracebacks"):
                raise
            raise Mistake(_advice(error) if isinstance(error, ModuleNotFoundError) else str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="coconv-surgery")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def app(ctx: click.Context, debug: bool) -> None:
    """Contextual convolution (CoConv) for the networks you already have.

    TARGET is, wherever a command takes a network, a name of timm's (also hf_hub:… and local-dir:…), torchvision/NAME,
    package.module:factory, a file that coconv convert wrote, or the .py of an MMDetection config (extra: mmdet).

    Complete commands and options by TAB: eval "$(_COCONV_COMPLETE=bash_source coconv)" in bash, zsh_source in zsh, and
    _COCONV_COMPLETE=fish_source coconv | source in fish.
    """
    ctx.meta["tracebacks"] = debug


def _advice(error: ModuleNotFoundError) -> str:
    extra = _extra_with(error.name or "")
    return f"{error.name} is not installed: pip install 'coconv-surgery[{extra}]'" if extra else str(error)


def _extra_with(module: str) -> str | None:
    """The first extra that installs a module, by the name of its distribution."""
    try:
        needs = requires("coconv-surgery") or []
    except PackageNotFoundError:
        return None
    found = (re.match(rf"{re.escape(module.partition('.')[0])}\b.*extra == ['\"](\w+)['\"]", need) for need in needs)
    return next((match[1] for match in found if match and match[1] != "test"), None)


for _room in (networks, reporting, running, measuring, gans, demos):
    for _command in _room.COMMANDS:
        app.add_command(_command)
