"""What the ``coconv`` command can do."""

# ruff: noqa: D301 (click's \b keeps the lines of an example apart)

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast, get_args

import torch
import torch.nn as nn
from timm.models import load_checkpoint

from coconv_surgery.bench.run import Target, run
from coconv_surgery.bench.speed import ENGINES, Engine
from coconv_surgery.calibration import calibrate
from coconv_surgery.checkpoint import load_converted, plan_of, save_converted
from coconv_surgery.cli import targets
from coconv_surgery.cli.images import image_batches
from coconv_surgery.demo.shapes import write_shapes
from coconv_surgery.deployment import deploy, get_deployment
from coconv_surgery.layers.arguments import choice
from coconv_surgery.layers.levels import SplitRule
from coconv_surgery.planning.plan import Plan, align
from coconv_surgery.planning.policies import POLICIES
from coconv_surgery.surgery import NoChangeWarning, apply_plan, get_plan, plan_conversion
from coconv_surgery.sweep.collections import COLLECTIONS
from coconv_surgery.tracing.inputs import infer_inputs
from coconv_surgery.zoo.authors import is_authors_checkpoint, load_authors_checkpoint

try:
    import click
    from click.core import ParameterSource
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
except ImportError as error:
    raise ImportError(f"{error.name} is not installed: pip install 'coconv-surgery[cli]'") from error

# Progress goes to standard error, so that standard output holds the result alone.
console = Console(stderr=True)


_size_option = click.option(
    "--input-size",
    type=targets.read_size,
    metavar="SIDE|HxW|CxHxW",
    help="Input size. Default: what timm or the config says.",
)
_arg_option = click.option(
    "--arg", "arguments", multiple=True, metavar="KEY=VALUE", help="For what builds the network. Repeatable."
)
_weights_option = click.option(
    *("--checkpoint", "--weights", "checkpoint"),
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File of weights to load.",
)
_pretrained_option = click.option("--pretrained", is_flag=True, help="Load the weights that the library has for it.")
_device_option = click.option("--device", metavar="NAME", help="Such as cpu or cuda:1. Default: a GPU if there is one.")


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(int(number) for number in value.split(","))


def _planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        _size_option,
        click.option(
            "--policy",
            default="resolution",
            show_default=True,
            help=f"One of {', '.join(POLICIES)}; numbers may follow, as in stage(3,3,2,1).",
        ),
        click.option(
            "--max-levels", type=click.IntRange(min=1), help="Most levels a convolution gets (policy resolution)."
        ),
        click.option(
            "--split", type=click.Choice(get_args(SplitRule)), help="How channels are shared out. Default: pow2."
        ),
        click.option("--min-channels", type=click.IntRange(min=1), help="Fewest channels a level may have."),
        click.option(
            "--include", multiple=True, metavar="GLOB", help="Only convolutions with such a name. Repeatable."
        ),
        click.option("--exclude", multiple=True, metavar="GLOB", help="No convolution with such a name. Repeatable."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="coconv-surgery")
def app() -> None:
    """Contextual convolution (CoConv) for the networks you already have."""


@app.command()
@click.argument("target")
@_planning_options
@_arg_option
@click.option("--all", "every_conv", is_flag=True, help="Also show other kernels than 3×3 that are left alone.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan to a file.")
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="Draw the plan (extra: viz).")
def plan(
    target: str,
    arguments: tuple[str, ...],
    every_conv: bool,
    json_path: Path | None,
    figure: Path | None,
    **options: Any,
) -> None:
    """Show what becomes of every convolution of a network.

    TARGET is a name of timm's (also hf_hub:… and local-dir:…), torchvision/NAME, package.module:factory, or the .py of
    an MMDetection config (extra: mmdet).

    \b
    coconv plan resnet50 --arg num_classes=10 --input-size 288 --json plan.json
    coconv plan hrnet_w18 --policy stage --exclude 'stage4.*'
    coconv plan torchvision/resnet50 --input-size 224x320
    coconv plan my_package.networks:make --input-size 1x64x64
    coconv plan configs/ssd/ssd300_coresnet50_coco.py
    """
    given = targets.read_arguments(arguments)
    with console.status(f"planning {target}"):
        found = _plan(targets.build(target, given), target, options)
    click.echo(found.table(every_conv=every_conv))
    click.echo(found.summary())
    if json_path is not None:
        found.to_json(json_path)
    if figure is not None:
        from coconv_surgery.viz.plan import plot_plan

        plot_plan(found, figure, title=target)


@app.command()
@click.argument("target")
@_planning_options
@_arg_option
@click.option("--plan", "plan_path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A saved plan.")
@_weights_option
@_pretrained_option
@click.option(
    "--calibrate",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Calibrate on images of a folder, without labels.",
)
@click.option("--images", default=256, show_default=True, type=click.IntRange(min=1), help="How many, at most.")
@click.option("--also", multiple=True, metavar="GLOB", help="Plain convolutions to calibrate as well. Repeatable.")
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="safetensors file."
)
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
    **options: Any,
) -> None:
    """Convert a network and save its weights together with the plan.

    TARGET is as of coconv plan, but not a config, which converts by itself: model=dict(type="CoConvSurgery", …).

    A checkpoint of a converted network tells its plan, which holds unless another is asked for. Weights of a plain
    network compute something else once it is converted: calibrate it, fine-tune it, or do both.

    \b
    coconv convert resnet50 --pretrained --calibrate photographs -o coresnet50.safetensors
    coconv convert resnet50 --checkpoint w.pth --plan plan.json -o out.safetensors
    coconv convert coresnet50.iduta --checkpoint authors.pth -o out.safetensors
    """
    _check_weights(checkpoint, pretrained)
    if targets.is_config(target):
        raise click.UsageError(
            'a config converts by itself, by model=dict(type="CoConvSurgery", …): see configs/convert/'
        )
    built_with = targets.read_arguments(arguments)
    context = click.get_current_context()
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if folder is not None and checkpoint is None and not pretrained:
        raise click.UsageError("--calibrate needs trained weights: give --pretrained or --checkpoint as well")
    if folder is not None and plan_path is not None:
        given = [name for name in given if name != "input_size"]  # which is that of the images
    if plan_path is not None and given:
        raise click.UsageError(f"--plan already decides everything: leave out --{given[0].replace('_', '-')}")
    if folder is None and (also or context.get_parameter_source("images") is ParameterSource.COMMANDLINE):
        raise click.UsageError("--images and --also say how to calibrate: give --calibrate FOLDER as well")
    with console.status(f"creating {target}"):
        network = targets.build(target, built_with, pretrained=pretrained)
        kind = _load(network, checkpoint)
    told = kind == "converted"
    if folder is not None and (told or kind == "authors"):
        raise click.UsageError(f"{checkpoint} holds the weights of a converted network: --calibrate needs plain ones")
    with console.status(f"converting {target}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)  # the summary says so
        if plan_path is not None:
            apply_plan(network, Plan.from_json(plan_path))
        elif given or not told:
            apply_plan(network, _plan(network, target, options))
    if folder is not None:
        batches = image_batches(network, folder, images, options["input_size"])
        click.echo(calibrate(network, batches, max_images=images, also=also or None, progress=True))
    with console.status(f"writing {output}"):
        save_converted(network, output)
    click.echo(get_plan(network).summary())
    click.echo(f"weights and plan: {output}")


@app.command()
@click.argument("target")
@_arg_option
@_weights_option
@_pretrained_option
@_size_option
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Images in a batch.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file .onnx, .pt2 or .xml (OpenVINO).",
)
def export(
    target: str,
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    pretrained: bool,
    input_size: int | tuple[int, ...] | None,
    batch: int,
    output: Path,
) -> None:
    """Write a network in the form for inference (extra: export). TARGET is as of coconv plan.

    It is converted if its checkpoint says so, or if the model is one of ours. Norms are folded, contextual convolutions
    are plain ones, and what was written is compared with what the network computes. Of a detector its backbone, neck
    and, where it has one stage, its head's raw outputs are written (extra: mmdet).

    \b
    coconv export resnet50 --checkpoint converted.safetensors -o model.onnx
    coconv export coresnet50 --input-size 288 -o model.pt2
    coconv export configs/ssd/ssd300_coresnet50_coco.py --input-size 300 -o ssd.xml
    """
    from coconv_surgery.deployment.exporting import export, files_of

    _check_weights(checkpoint, pretrained)
    if targets.is_config(target) and (pretrained or arguments):
        raise click.UsageError("a config says all of its network: give the weights of a detector by --checkpoint")
    given = targets.read_arguments(arguments)
    files = files_of(output)
    if checkpoint is not None and checkpoint.resolve() in [file.resolve() for file in files]:
        raise click.UsageError(f"{output} would be written over {checkpoint}: choose another name")
    with console.status(f"creating {target}"):
        if targets.is_config(target):
            from coconv_surgery.mmdet.exporting import maps_of_config

            network: nn.Module = maps_of_config(Path(target), checkpoint)
            click.echo(f"of {target}: {network.part}")
        else:
            network = targets.build(target, given, pretrained=pretrained)
            _load(network, checkpoint)
    inputs = infer_inputs(network, input_size)
    images = inputs.args[0].expand(batch, -1, -1, -1)
    with console.status(f"deploying {target}"):
        deployed = deploy(network, example_inputs=replace(inputs, args=(images,)))
    click.echo(get_deployment(deployed))
    network.eval()
    with console.status(f"writing {output}"):
        written = export(deployed, output, images, like=network)
    click.echo(written)


@app.command()
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--images", default=64, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the latents.")
@_device_option
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="A picture.")
def generate(checkpoint: Path, images: int, seed: int, device: str | None, output: Path) -> None:
    """Picture what the averaged generator of a CHECKPOINT makes (extra: generation).

    \b
    coconv generate work_dirs/coprogan_shapes-32x32/iter_6000.pth -o grid.png --seed 0
    """
    from coconv_surgery.generation.sampling import load_grown, write_grid

    grown = load_grown(checkpoint, _device(device))
    write_grid(grown, output, images, seed)
    click.echo(f"{output}: {images} images {grown}")


@app.command("evaluate-gan")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A folder of real images.")
@click.option("--crop", type=_numbers, metavar="TOP,LEFT,H,W", help="What of them is used. CelebA: 57,25,128,128.")
@click.option("--mirror", is_flag=True, help="Mirror half of the real images, where the training mirrored them.")
@click.option("--cifar10", type=click.Path(exists=True, file_okay=False, path_type=Path), help="CIFAR-10 instead.")
@click.option("--score", "scores", multiple=True, help="is, fid, ms-ssim or swd. Repeatable. Default: swd.")
@click.option("--count", type=click.IntRange(min=2), help="Images for each. Default: as ProGAN's authors.")
@click.option(
    "--inception", type=click.Path(dir_okay=False, path_type=Path), help="Inception's weights, for is and fid."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@_device_option
def evaluate_gan(
    checkpoint: Path,
    data: Path | None,
    crop: tuple[int, ...] | None,
    mirror: bool,
    cifar10: Path | None,
    scores: tuple[str, ...],
    count: int | None,
    inception: Path | None,
    seed: int,
    device: str | None,
) -> None:
    """Print Table 7's columns for the averaged generator of a CHECKPOINT (extra: generation).

    \b
    coconv evaluate-gan iter_6000.pth --data data/shapes64/val --crop 16,16,32,32 --mirror --score swd
    coconv evaluate-gan iter_164062.pth --cifar10 data --score is --score fid --inception weights-inception.pth
    """
    from coconv_surgery.generation.images import CIFAR10Images, FolderImages
    from coconv_surgery.generation.sampling import load_grown
    from coconv_surgery.generation.scores import SCORES, Score, score

    if (data is None) == (cifar10 is None):
        raise click.UsageError("real images: give either --data FOLDER or --cifar10 FOLDER")
    if cifar10 is not None and crop is not None:
        raise click.UsageError("--crop is for the images of a folder, and CIFAR-10's are used whole")
    for name in scores:
        choice(name, "--score", SCORES)
    grown = load_grown(checkpoint, _device(device))
    side, colours = grown.resolution, grown.generator.colours
    reals = FolderImages(data, side, colours, crop) if data is not None else CIFAR10Images(cifar10 or "", side)
    with console.status("scoring") as status:
        wanted = cast(tuple[Score, ...], scores or ("swd",))
        found = score(
            grown,
            reals,
            wanted,
            count=count,
            inception=inception,
            mirror=mirror,
            seed=seed,
            progress=status.update,
        )
    click.echo(f"{checkpoint}: images {grown}, {len(reals):,} real ones\n")
    click.echo(align([list(found), [f"{value:.4f}" for value in found.values()]]))


@app.command()
@click.argument("number", type=click.IntRange(1, 7))
@click.option("--time", "timed", is_flag=True, help="Also time a forward pass of each, side by side.")
def table(number: int, timed: bool) -> None:
    """Count the networks of the paper's table NUMBER beside the paper's own figures (table 6: extra mmdet)."""
    from coconv_surgery.paper.tables import render

    with console.status(f"counting table {number}"):
        text = render(number, timed=timed)
    click.echo(text)


@app.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--shape", nargs=2, type=click.IntRange(min=1), required=True, metavar="H W", help="Size of the image.")
def flops(config: str, shape: tuple[int, int]) -> None:
    """Count parameters and FLOPs of the detector in an MMDetection CONFIG, without its data set (extra: mmdet).

    \b
    coconv flops configs/ssd/ssd300_coresnet50_coco.py --shape 300 300
    """
    with console.status(f"counting {config}"):
        from coconv_surgery.mmdet.flops import count_config

        parameters, count = count_config(config, shape)
    click.echo(f"parameters  {parameters:,}")
    click.echo(f"GFLOPs      {count / 1e9:.3f} at {shape[0]}×{shape[1]}, a multiply-add as one")


@app.command()
@click.argument("collection", type=click.Choice(list(COLLECTIONS)))
@click.option("--only", multiple=True, metavar="GLOB", help="Only networks with such a name. Repeatable.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Processes.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds for one network.")
@click.option("--fresh", is_flag=True, help="Start over instead of resuming the last sweep.")
@click.option(
    "-o", "--output", default="docs/coverage", show_default=True, type=click.Path(file_okay=False, path_type=Path)
)
def sweep(collection: str, only: tuple[str, ...], jobs: int, timeout: float, fresh: bool, output: Path) -> None:
    """Convert every network of a COLLECTION (extra: sweep).

    What happened goes to COLLECTION.csv, COLLECTION.md and index.md.

    \b
    coconv sweep timm --jobs 2
    coconv sweep mmdet --only 'retinanet/*' -o /tmp/coverage
    """
    from coconv_surgery.sweep.check import NOT_BUILT
    from coconv_surgery.sweep.report import render, render_index
    from coconv_surgery.sweep.walk import read_rows, walk

    chosen = COLLECTIONS[collection]
    table_path, page_path = output / f"{collection}.csv", output / f"{collection}.md"
    # For the processes: none repeats the warnings of the others, and none downloads anything.
    os.environ.update(PYTHONWARNINGS="ignore", HF_HUB_OFFLINE="1")
    with console.status(f"listing {collection}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = chosen.names()
    if only:
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in only)]
        if not names:
            raise ValueError(f"{chosen.title} has no network that matches {' or '.join(map(repr, only))}")
    if fresh:
        table_path.unlink(missing_ok=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(collection, total=len(names))
        rows = walk(
            chosen,
            names,
            table_path,
            jobs=jobs,
            timeout=timeout,
            progress=lambda row: bar.update(task, advance=1, description=row.name),
        )
    patterns = "".join(f" --only '{pattern}'" for pattern in only)
    page_path.write_text(render(chosen, rows, f"coconv sweep {collection}{patterns} --jobs {jobs}"), encoding="utf-8")
    tables = {name: read_rows(output / f"{name}.csv") for name in COLLECTIONS}
    index = render_index({name: found for name, found in tables.items() if found})
    (output / "index.md").write_text(index, encoding="utf-8")
    asked = [row for row in rows if row.name in names]
    unsound = [row for row in asked if row.status != NOT_BUILT and not row.sound]
    for row in unsound:
        click.echo(f"{row.name}: {row.status} {row.error or 'but not the same before and after'}")
    click.echo(f"{len(asked)} networks, {len(unsound)} with a problem: {table_path}, {page_path}")
    if unsound:
        sys.exit(1)


@app.command()
@click.argument("target", type=click.Choice(get_args(Target)))
@click.option("--only", default="*", metavar="GLOB", help="Only layers or networks with such a name.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(ENGINES), help="Default: both.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=2), help="How often each is timed.")
@click.option(
    "-o", "--output", default="benchmarks", show_default=True, type=click.Path(file_okay=False, path_type=Path)
)
def bench(target: Target, only: str, engines: tuple[Engine, ...], rounds: int, output: Path) -> None:
    """Time contextual beside plain LAYERS or NETWORKS, or what SURGERY or CALIBRATION costs, on a GPU if there is one.

    DEPLOY times networks in ONNX Runtime, OpenVINO and frozen by torch.compile (extras: export, openvino, mmdet).

    \b
    coconv bench layers --engine eager
    coconv bench networks --only 'resnet50*'
    """
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        files = run(
            target,
            output,
            only=only,
            engines=engines,
            rounds=rounds,
            track=lambda items: bar.track(items, description=target),
        )
    click.echo(files.page.read_text(encoding="utf-8"))
    click.echo("\n".join(str(path) for path in files if path is not None))


@app.command()
def build() -> None:
    """Compile the operator for depthwise levels on this machine: half a minute, a C++ compiler and ninja.

    From then on every process uses it by itself, unless COCONV_NATIVE=0 is set.
    """
    from coconv_surgery.layers.depthwise import build_depthwise

    with console.status("compiling"):
        library = build_depthwise()
    click.echo(library)


@app.command()
@click.argument("root", type=click.Path(file_okay=False, path_type=Path))
@click.option("--train", default=512, show_default=True, help="Images to train on.")
@click.option("--val", default=128, show_default=True, help="Images to validate on.")
@click.option("--size", default=300, show_default=True, help="Side of an image in pixels.")
@click.option("--seed", default=0, show_default=True)
def shapes(root: Path, train: int, val: int, size: int, seed: int) -> None:
    """Write a small COCO-format data set of drawn shapes to the folder ROOT."""
    with console.status(f"drawing {root}"):
        written = write_shapes(root, train=train, val=val, size=size, seed=seed)
    click.echo(f"{root}: {train} + {val} images {'written' if written else 'were there already'}")


@app.command()
@click.option(
    "-o", "--output", default="demo_output", show_default=True, type=click.Path(file_okay=False, path_type=Path)
)
@click.option("--detection", is_flag=True, help="Also train a detector: minutes on 2 cores (extra: mmdet).")
@click.option("--generation", is_flag=True, help="Also train two GANs: eight minutes on 2 cores (extra: generation).")
def demo(output: Path, detection: bool, generation: bool) -> None:
    """Convert a timm network, run it on a photograph, and write its plan as text, JSON and a picture."""
    from coconv_surgery.demo.conversion import convert_and_compare

    output.mkdir(parents=True, exist_ok=True)
    with console.status("converting resnet50"):
        report = convert_and_compare("resnet50", output)
    click.echo(report)
    if detection:
        from coconv_surgery.demo.detection import train_and_detect

        _with_progress(train_and_detect, output)
    if generation:
        from coconv_surgery.demo.generation import train_and_generate

        _with_progress(train_and_generate, output)


def _with_progress(work: Callable[[Path, Callable[[float, str], None]], str], output: Path) -> None:
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=1.0)
        report = work(output, lambda done, what: bar.update(task, completed=done, description=what))
    click.echo(report)


def _check_weights(checkpoint: Path | None, pretrained: bool) -> None:
    if checkpoint is not None and pretrained:
        raise click.UsageError("--checkpoint and --pretrained both give the weights: choose one")


def _load(network: nn.Module, checkpoint: Path | None) -> str:
    """Load weights, and say of what kind of network they are."""
    if checkpoint is None:
        return "none"
    if is_authors_checkpoint(checkpoint):
        load_authors_checkpoint(network, checkpoint)
        return "authors"
    if _tells_plan(checkpoint):
        load_converted(network, checkpoint)
        return "converted"
    load_checkpoint(network, str(checkpoint), weights_only=True)
    return "plain"


def _tells_plan(checkpoint: Path) -> bool:
    # timm reads numpy's formats for networks of JAX.
    return checkpoint.suffix not in (".npz", ".npy") and plan_of(checkpoint) is not None


def _plan(model: nn.Module, target: str, options: dict[str, Any]) -> Plan:
    size = options["input_size"]
    inputs = targets.inputs_of(model, target, size)
    settings = {key: options[key] for key in ("max_levels", "split", "min_channels") if options[key] is not None}
    return plan_conversion(
        model,
        options["policy"],
        input_size=size if inputs is None else None,
        example_inputs=inputs,
        include=options["include"] or None,
        exclude=options["exclude"] or None,
        **settings,
    )
