"""Commands that show what a conversion does to a network."""

# ruff: noqa: D301 (click's \b keeps the lines of an example apart)

import shlex
from pathlib import Path
from typing import Any

import click

from coconv_cli import options
from coconv_cli.console import doing, width
from coconv_cli.networks import convert


@click.command()
@options.subject
@click.option("--calibrate", "folder", type=options.FOLDER, help="Calibrate on images of a folder, without labels.")
@click.option("--images", default=256, show_default=True, type=click.IntRange(min=1), help="How many, at most.")
@click.option("--time", "timed", is_flag=True, help="Time a forward pass beside that of the plain network.")
@click.option("-o", "--output", required=True, type=options.Output(".html", ".htm"), help="The page.")
def report(
    target: str,
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    pretrained: bool,
    folder: Path | None,
    images: int,
    timed: bool,
    output: Path,
    **choices: Any,
) -> None:
    """Write a page about the conversion of a network (extra: viz).

    It is one file: the plan, pictures, receptive fields before and after, counts, and the commands that reproduce it.

    \b
    coconv report resnet50 -o resnet50.html
    coconv report resnet50 --weights w.pth --calibrate photographs --time -o resnet50.html
    coconv report configs/convert/retinanet_r50_fpn_1x_coco.py -o retinanet.html
    """
    from coconv_surgery.cli import targets
    from coconv_surgery.cli.reporting import examine
    from coconv_surgery.reporting.page import write_page

    options.check_weights(checkpoint, pretrained)
    options.check_outputs(output, reads=[target, checkpoint])
    if folder is None and options.is_given("images"):
        raise click.UsageError("--images says how to calibrate: give --calibrate FOLDER as well")
    given = targets.read_arguments(arguments)
    chosen = options.asks_for_a_plan(choices)
    with doing(f"creating {target}") as tell:
        findings = examine(
            target,
            given,
            checkpoint=checkpoint,
            pretrained=pretrained,
            folder=folder,
            images=images,
            rounds=15 if timed else 0,
            anew=chosen,
            tell=tell,
            **choices,
        )
        tell(f"writing {output}")
        write_page(findings, output, _commands(target, convertible=bool(findings.plan.converted)))
    click.echo(findings.plan.summary())
    click.echo(f"page: {output}")


@click.command()
@options.subject
@click.option("--only", multiple=True, metavar="GLOB", help="Only convolutions with such a name. Repeatable.")
@click.option("--layer", metavar="NAME", help="Whose effective field is drawn. Default: the last with a map.")
@click.option("--figure", type=options.Output(), help="Draw theoretical fields by depth (extra: viz).")
@click.option("--heatmap", type=options.Output(), help="Draw the effective field of one convolution (extra: viz).")
def fields(
    target: str,
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    pretrained: bool,
    only: tuple[str, ...],
    layer: str | None,
    figure: Path | None,
    heatmap: Path | None,
    **choices: Any,
) -> None:
    """Show how many pixels each convolution of a converted network can see.

    \b
    coconv fields resnet50 --figure fields.png
    coconv fields resnet50 --weights w.pth --layer layer3.5.conv2 --heatmap effective.png
    """
    from coconv_surgery.cli import targets
    from coconv_surgery.cli.reporting import converted_network
    from coconv_surgery.planning.plan import align
    from coconv_surgery.receptive import effective_receptive_field, receptive_fields
    from coconv_surgery.reporting.gathering import before_and_after

    options.check_weights(checkpoint, pretrained)
    options.check_outputs(figure, heatmap, reads=[target, checkpoint])
    if layer is not None and heatmap is None:
        raise click.UsageError("--layer says what to draw a heatmap of: give --heatmap FILE as well")
    for path in (figure, heatmap):
        if path is not None:
            from coconv_surgery.viz.theme import picture_file

            picture_file(path)
    given = targets.read_arguments(arguments)
    chosen = options.asks_for_a_plan(choices)
    with doing(f"measuring {target}"):
        subject = converted_network(target, given, checkpoint=checkpoint, pretrained=pretrained, anew=chosen, **choices)
        inputs, networks = subject.inputs, before_and_after(subject.network)
        reports = {
            name: receptive_fields(each, example_inputs=inputs, names=only or None) for name, each in networks.items()
        }
        if heatmap is not None:
            size = tuple(inputs.args[0].shape[1:])
            effective = {
                name: effective_receptive_field(each, layer, input_size=size) for name, each in networks.items()
            }
    click.echo(align(reports["after"].cells(), width()))
    if figure is not None:
        from coconv_surgery.viz.fields import plot_receptive_fields

        plot_receptive_fields(reports, figure, target)
    if heatmap is not None:
        from coconv_surgery.viz.fields import plot_effective_fields

        plot_effective_fields(effective, heatmap, target)


def _commands(target: str, *, convertible: bool) -> list[str]:
    """This command, and the one that converts the network likewise, if one does."""
    from coconv_surgery.cli import targets

    own = [word for option in report.params for word in options.words_of(str(option.name))]
    lines = [["coconv", "report", target, *own]]
    if convertible and not targets.is_config(target):
        shared = {str(option.name) for option in convert.params} - {"output"}
        given = [word for option in report.params if option.name in shared for word in options.words_of(option.name)]
        lines.append(["coconv", "convert", target, *given, "--output", "converted.safetensors"])
    return [shlex.join(line) for line in lines]


COMMANDS = (report, fields)
