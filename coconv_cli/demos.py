"""Commands that show something."""

from collections.abc import Callable
from pathlib import Path

import click

from coconv_cli import options
from coconv_cli.console import Update, doing, progress


@click.command()
@click.argument("root", type=options.Output(folder=True))
@click.option("--train", default=512, show_default=True, help="Images to train on.")
@click.option("--val", default=128, show_default=True, help="Images to validate on.")
@click.option("--size", default=300, show_default=True, help="Side of an image in pixels.")
@click.option("--seed", default=0, show_default=True)
def shapes(root: Path, train: int, val: int, size: int, seed: int) -> None:
    """Write a small COCO-format data set of drawn shapes to the folder ROOT."""
    from coconv_surgery.demo.shapes import write_shapes

    with doing(f"drawing {root}"):
        written = write_shapes(root, train=train, val=val, size=size, seed=seed)
    click.echo(f"{root}: {train} + {val} images {'written' if written else 'were there already'}")


@click.command()
@click.option("-o", "--output", default="demo_output", show_default=True, type=options.Output(folder=True))
@click.option("--detection", is_flag=True, help="Also train a detector: minutes on 2 cores (extra: mmdet).")
@click.option("--generation", is_flag=True, help="Also train two GANs: eight minutes on 2 cores (extra: generation).")
def demo(output: Path, detection: bool, generation: bool) -> None:
    """Convert a timm network, run it on a photograph, and write its plan as text, JSON and a picture."""
    from coconv_surgery.demo.conversion import convert_and_compare

    output.mkdir(parents=True, exist_ok=True)
    with doing("converting resnet50"):
        report = convert_and_compare("resnet50", output)
    click.echo(report)
    if detection:
        from coconv_surgery.demo.detection import train_and_detect

        _with_progress(train_and_detect, output)
    if generation:
        from coconv_surgery.demo.generation import train_and_generate

        _with_progress(train_and_generate, output)


def _with_progress(work: Callable[[Path, Update], str], output: Path) -> None:
    with progress(1.0) as update:
        report = work(output, update)
    click.echo(report)


COMMANDS = (shapes, demo)
