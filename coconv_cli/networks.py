"""Commands that take a network."""

# ruff: noqa: D301 (click's \b keeps the lines of an example apart)

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coconv_cli import options
from coconv_cli.console import doing, width

if TYPE_CHECKING:
    import torch.nn as nn


@click.command()
@click.argument("target")
@options.planning()
@options.arg
@options.weights
@click.option("--all", "every_conv", is_flag=True, help="Also show other kernels than 3×3 that are left alone.")
@click.option(
    "--json",
    "json_path",
    type=options.Output(dash=True),
    help="Write the plan to a file, or to standard output (-) and nothing else.",
)
@click.option("--figure", type=options.Output(), help="Draw the plan (extra: viz).")
def plan(
    target: str,
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    every_conv: bool,
    json_path: Path | None,
    figure: Path | None,
    **choices: Any,
) -> None:
    """Show what becomes of every convolution of a network, or became of it, if it is converted.

    \b
    coconv plan resnet50 --arg num_classes=10 --input-size 288 --json plan.json
    coconv plan hrnet_w18 --policy stage --exclude 'stage4.*'
    coconv plan torchvision/resnet50 --input-size 224x320
    coconv plan my_package.networks:make --input-size 1x64x64
    coconv plan resnet50 --weights runs/1/last.pth.tar
    coconv plan configs/ssd/ssd300_coresnet50_coco.py
    """
    from coconv_surgery.cli import targets
    from coconv_surgery.cli.weights import load
    from coconv_surgery.surgery import get_plan

    options.check_outputs(json_path, figure, reads=[target, checkpoint])
    if figure is not None:
        from coconv_surgery.viz.plan import plot_plan
        from coconv_surgery.viz.theme import picture_file

        picture_file(figure)
    given = targets.read_arguments(arguments)
    with doing(f"planning {target}"):
        network = targets.build(target, given)
        load(network, checkpoint)
        found = get_plan(network)
        if not found.converted or options.asks_for_a_plan(choices):
            found = targets.plan_as_chosen(network, target, **choices)
    # Before anything is shown, which nobody may read to its end.
    if json_path is not None and str(json_path) != "-":
        found.to_json(json_path)
    if figure is not None:
        plot_plan(found, figure, title=target)
    if str(json_path) == "-":
        click.echo(found.to_json())
    else:
        click.echo(found.table(every_conv=every_conv, width=width()))
        click.echo(found.summary())


@click.command()
@click.argument("target")
@options.planning()
@options.arg
@options.plan
@options.weights
@options.pretrained
@click.option("--calibrate", "folder", type=options.FOLDER, help="Calibrate on images of a folder, without labels.")
@click.option("--images", default=256, show_default=True, type=click.IntRange(min=1), help="How many, at most.")
@click.option("--also", multiple=True, metavar="GLOB", help="Plain convolutions to calibrate as well. Repeatable.")
@click.option("-o", "--output", required=True, type=options.Output(), help="safetensors file.")
def convert(
    target: str,
    arguments: tuple[str, ...],
    plan_path: Path | None,
    checkpoint: Path | None,
    pretrained: bool,
    folder: Path | None,
    images: int,
    also: tuple[str, ...],
    output: Path,
    **choices: Any,
) -> None:
    """Convert a network and save its weights together with the plan.

    A config converts by itself, by model=dict(type="CoConvSurgery", …), and is no TARGET here.

    A checkpoint of a converted network tells its plan, which holds unless another is asked for. Weights of a plain
    network compute something else once it is converted: calibrate it, fine-tune it, or do both.

    \b
    coconv convert resnet50 --pretrained --calibrate photographs -o coresnet50.safetensors
    coconv convert resnet50 --checkpoint w.pth --plan plan.json -o out.safetensors
    coconv convert coresnet50.iduta --checkpoint authors.pth -o out.safetensors
    """
    from coconv_surgery.calibration import calibrate
    from coconv_surgery.checkpoint import save_converted
    from coconv_surgery.checkpoint.converted import file_of_weights
    from coconv_surgery.checkpoint.origin import plan_for
    from coconv_surgery.cli import targets
    from coconv_surgery.cli.images import image_batches
    from coconv_surgery.cli.weights import load
    from coconv_surgery.surgery import NoChangeWarning, apply_plan, get_plan

    options.check_weights(checkpoint, pretrained)
    options.check_outputs(output, reads=[target, checkpoint, plan_path])
    file_of_weights(output)
    if targets.is_config(target):
        raise click.UsageError(
            'a config converts by itself, by model=dict(type="CoConvSurgery", …): see configs/convert/'
        )
    built_with = targets.read_arguments(arguments)
    given = [name for name in choices if options.is_given(name)]
    if folder is not None and targets.has_weights_of_chance(target, built_with, checkpoint, pretrained=pretrained):
        raise click.UsageError("--calibrate needs trained weights: give --pretrained or --checkpoint as well")
    if folder is not None and plan_path is not None:
        given = [name for name in given if name != "input_size"]  # which is that of the images
    if plan_path is not None and given:
        raise click.UsageError(f"--plan already decides everything: leave out --{given[0].replace('_', '-')}")
    if folder is None and (also or options.is_given("images")):
        raise click.UsageError("--images and --also say how to calibrate: give --calibrate FOLDER as well")
    replayed = None if plan_path is None else targets.read_plan_file(plan_path)
    with doing(f"creating {target}"):
        network = targets.build(target, built_with, pretrained=pretrained)
        kind = load(network, checkpoint)
    before = get_plan(network)
    told = kind == "converted" or (checkpoint is None and bool(before.converted))
    if folder is not None and (told or kind == "authors"):
        raise click.UsageError(
            f"{checkpoint or target} holds the weights of a converted network: --calibrate needs plain ones"
        )
    with doing(f"converting {target}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)  # the summary says so
        if replayed is not None:
            apply_plan(network, plan_for(network, replayed))
        elif options.asks_for_a_plan(choices) or not (told or before.converted):
            apply_plan(network, targets.plan_as_chosen(network, target, **choices))
    if folder is not None:
        batches = image_batches(network, folder, images, choices["input_size"])
        click.echo(calibrate(network, batches, max_images=images, also=also or None, progress=True))
    with doing(f"writing {output}"):
        save_converted(network, output, network=targets.describe(target, built_with))
    after = get_plan(network)
    if told and before.diff(after):
        click.echo("coconv: the weights were trained at other levels: fine-tune them", err=True)
    if not after.converted:
        click.echo("coconv: nothing was converted, and the weights are those of the plain network", err=True)
    _tell_of_chance(target, built_with, checkpoint, pretrained)
    click.echo(after.summary())
    click.echo(f"weights and plan: {output}")


@click.command()
@click.argument("target")
@options.arg
@options.weights
@options.pretrained
@options.size
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Images in a batch.")
@click.option("-o", "--output", required=True, type=options.Output(), help="A file .onnx, .pt2 or .xml (OpenVINO).")
def export(
    target: str,
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    pretrained: bool,
    input_size: int | tuple[int, ...] | None,
    batch: int,
    output: Path,
) -> None:
    """Write a network in the form for inference (extra: export).

    It is converted if its checkpoint says so, or if the model is one of ours. Norms are folded, contextual convolutions
    are plain ones, and what was written is compared with what the network computes. Of a detector its backbone, neck
    and, where it has one stage, its head's raw outputs are written (extra: mmdet).

    \b
    coconv export coresnet50.safetensors -o model.onnx
    coconv export resnet50 --checkpoint converted.pth -o model.onnx
    coconv export coresnet50 --input-size 288 -o model.pt2
    coconv export configs/ssd/ssd300_coresnet50_coco.py --input-size 300 -o ssd.xml
    """
    from coconv_surgery.cli import targets
    from coconv_surgery.cli.weights import load
    from coconv_surgery.deployment import deploy, get_deployment
    from coconv_surgery.deployment.exporting import export, files_of

    options.check_weights(checkpoint, pretrained)
    if targets.is_config(target) and (pretrained or arguments):
        raise click.UsageError("a config says all of its network: give the weights of a detector by --checkpoint")
    given = targets.read_arguments(arguments)
    options.check_outputs(*files_of(output), reads=[target, checkpoint])
    network: nn.Module
    part = None  # of a detector, what is written
    with doing(f"creating {target}"):
        if targets.is_config(target):
            from coconv_surgery.mmdet.exporting import maps_of_config

            maps = maps_of_config(Path(target), checkpoint)
            network, part = maps, maps.part
            inputs = maps.inputs(targets.sides_of_config(target, input_size))
        else:
            network = targets.build(target, given, pretrained=pretrained)
            load(network, checkpoint)
            inputs = targets.inputs_of(network, target, input_size)
    if part is not None:
        click.echo(f"of {target}: {part}")
    images = inputs.args[0].expand(batch, -1, -1, -1)
    with doing(f"deploying {target}"):
        deployed = deploy(network, example_inputs=replace(inputs, args=(images,)))
    click.echo(get_deployment(deployed))
    network.eval()
    with doing(f"writing {output}"):
        written = export(deployed, output, images, like=network)
    _tell_of_chance(target, given, checkpoint, pretrained)
    click.echo(f"{written}; for images of {'×'.join(map(str, images.shape))}")


def _tell_of_chance(target: str, arguments: dict[str, Any], checkpoint: Path | None, pretrained: bool) -> None:
    from coconv_surgery.cli import targets

    if targets.has_weights_of_chance(target, arguments, checkpoint, pretrained=pretrained):
        click.echo("coconv: the weights are random: --pretrained and --checkpoint bring trained ones", err=True)


@click.command()
@click.argument("target")
@options.arg
@options.weights
@options.size
@click.option("--shape", nargs=2, type=click.IntRange(min=1), metavar="H W", help="Size of the image, as two numbers.")
def flops(
    target: str,
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    input_size: int | tuple[int, ...] | None,
    shape: tuple[int, int] | None,
) -> None:
    """Count parameters and FLOPs of a network, of a detector's config without its data set.

    \b
    coconv flops resnet50
    coconv flops configs/ssd/ssd300_coresnet50_coco.py --shape 300 300
    """
    from coconv_surgery.cli import targets
    from coconv_surgery.cli.weights import load

    if shape is not None and input_size is not None:
        raise click.UsageError("--shape and --input-size say the same: give one of them")
    given = targets.read_arguments(arguments)
    with doing(f"counting {target}"):
        network = targets.build(target, given)
        load(network, checkpoint)
        parameters, count, at = targets.count(network, target, shape or input_size)
    click.echo(f"parameters  {parameters:,}")
    click.echo(f"GFLOPs      {count / 1e9:.3f} at {at}, a multiply-add as one")


COMMANDS = (plan, convert, export, flops)
