"""Commands of generators."""

# ruff: noqa: D301 (click's \b keeps the lines of an example apart)

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from coconv_cli import options
from coconv_cli.console import doing, width

if TYPE_CHECKING:
    from coconv_surgery.generation.scores import Score


def _crop(value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in value.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 4 or min(numbers[:2]) < 0 or min(numbers[2:]) < 1:
        raise click.BadParameter(f"{value!r} is no crop: give TOP,LEFT,H,W in pixels, as 57,25,128,128")
    return numbers


@click.command()
@click.argument("checkpoint", type=options.FILE)
@click.option("--images", default=64, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the latents.")
@options.device
@click.option("-o", "--output", required=True, type=options.Output(), help="A picture.")
def generate(checkpoint: Path, images: int, seed: int, device: str | None, output: Path) -> None:
    """Picture what the averaged generator of a CHECKPOINT makes (extra: generation).

    \b
    coconv generate work_dirs/coprogan_shapes-32x32/iter_6000.pth -o grid.png --seed 0
    """
    from coconv_surgery.generation.sampling import load_grown, write_grid

    grown = load_grown(checkpoint, _device(device))
    write_grid(grown, output, images, seed)
    click.echo(f"{output}: {images} images {grown}")


@click.command("evaluate-gan")
@click.argument("checkpoint", type=options.FILE)
@click.option("--data", type=options.FOLDER, help="A folder of real images.")
@click.option("--crop", type=_crop, metavar="TOP,LEFT,H,W", help="What of them is used. CelebA: 57,25,128,128.")
@click.option("--mirror", is_flag=True, help="Mirror half of the real images, where the training mirrored them.")
@click.option("--cifar10", type=options.FOLDER, help="CIFAR-10 instead.")
@click.option("--score", "scores", multiple=True, help="is, fid, ms-ssim or swd. Repeatable. Default: swd.")
@click.option("--count", type=click.IntRange(min=2), help="Images for each. Default: as ProGAN's authors.")
@click.option(
    "--inception", type=click.Path(dir_okay=False, path_type=Path), help="Inception's weights, for is and fid."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@options.device
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
    from coconv_surgery.generation.scores import SCORES, score
    from coconv_surgery.layers.arguments import choice
    from coconv_surgery.planning.plan import align

    if (data is None) == (cifar10 is None):
        raise click.UsageError("real images: give either --data FOLDER or --cifar10 FOLDER")
    if cifar10 is not None and crop is not None:
        raise click.UsageError("--crop is for the images of a folder, and CIFAR-10's are used whole")
    for name in scores:
        choice(name, "--score", SCORES)
    grown = load_grown(checkpoint, _device(device))
    side, colours = grown.resolution, grown.generator.colours
    reals = FolderImages(data, side, colours, crop) if data is not None else CIFAR10Images(cifar10 or "", side)
    with doing("scoring") as tell:
        wanted = cast("tuple[Score, ...]", scores or ("swd",))
        found = score(
            grown,
            reals,
            wanted,
            count=count,
            inception=inception,
            mirror=mirror,
            seed=seed,
            progress=tell,
        )
    click.echo(f"{checkpoint}: images {grown}, {len(reals):,} real ones\n")
    click.echo(align([list(found), [f"{value:.4f}" for value in found.values()]], width()))


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


COMMANDS = (generate, evaluate_gan)
