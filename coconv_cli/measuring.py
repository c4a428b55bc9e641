"""Commands that count, time and try out."""

# ruff: noqa: D301 (click's \b keeps the lines of an example apart)

import itertools
import os
import sys
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coconv_cli import options
from coconv_cli.console import doing, progress, tracked

if TYPE_CHECKING:
    from coconv_surgery.bench.run import Target
    from coconv_surgery.bench.speed import Engine
    from coconv_surgery.sweep.check import Row

# Without torch the names that the library has are not known here; a test compares.
BENCHMARKS = ("layers", "networks", "surgery", "calibration", "deploy")
COLLECTIONS = ("timm", "torchvision", "transformers", "mmdet")
ENGINES = ("eager", "compile")


@click.command()
@click.argument("number", type=click.IntRange(1, 7))
@click.option("--time", "timed", is_flag=True, help="Also time a forward pass of each, side by side.")
def table(number: int, timed: bool) -> None:
    """Count the networks of the paper's table NUMBER beside the paper's own figures (table 6: extra mmdet)."""
    from coconv_surgery.paper.tables import render

    with doing(f"counting table {number}"):
        text = render(number, timed=timed)
    click.echo(text)


@click.command()
@click.argument("collection", type=click.Choice(COLLECTIONS))
@click.option("--only", multiple=True, metavar="GLOB", help="Only networks with such a name. Repeatable.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Processes.")
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds for one network.",
)
@click.option("--fresh", is_flag=True, help="Start over instead of resuming the last sweep.")
@click.option("-o", "--output", default="docs/coverage", show_default=True, type=options.Output(folder=True))
def sweep(collection: str, only: tuple[str, ...], jobs: int, timeout: float, fresh: bool, output: Path) -> None:
    """Convert every network of a COLLECTION (extra: sweep).

    What happened goes to COLLECTION.csv, COLLECTION.md and index.md, which are kept up while it goes on.

    \b
    coconv sweep timm --jobs 2
    coconv sweep mmdet --only 'retinanet/*' -o /tmp/coverage
    """
    from coconv_surgery.sweep import collections
    from coconv_surgery.sweep.check import NOT_BUILT
    from coconv_surgery.sweep.report import Pages
    from coconv_surgery.sweep.walk import walk

    chosen = collections.COLLECTIONS[collection]
    table_path = output / f"{collection}.csv"
    # For the processes: none repeats the warnings of the others, and none downloads anything.
    os.environ.update(PYTHONWARNINGS="ignore", HF_HUB_OFFLINE="1")
    with doing(f"listing {collection}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = chosen.names()
    if only:
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in only)]
        if not names:
            raise ValueError(f"{chosen.title} has no network that matches {' or '.join(map(repr, only))}")
    if fresh:
        table_path.unlink(missing_ok=True)
    patterns = "".join(f" --only '{pattern}'" for pattern in only)
    pages = Pages(collection, output, f"coconv sweep {collection}{patterns} --jobs {jobs}")
    with progress(len(names)) as update, pages.kept():
        done = itertools.count(1)

        def after(row: "Row") -> None:
            pages.renew()
            update(next(done), row.name)

        rows = walk(chosen, names, table_path, jobs=jobs, timeout=timeout, progress=after)
    asked = [row for row in rows if row.name in names]
    unsound = [row for row in asked if row.status != NOT_BUILT and not row.sound]
    for row in unsound:
        click.echo(f"{row.name}: {row.status} {row.error or 'but not the same before and after'}")
    click.echo(f"{len(asked)} networks, {len(unsound)} with a problem: {table_path}, {pages.path}")
    if unsound:
        sys.exit(1)


@click.command()
@click.argument("target", type=click.Choice(BENCHMARKS))
@click.option("--only", default="*", metavar="GLOB", help="Only layers or networks with such a name.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(ENGINES), help="Default: both.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=2), help="How often each is timed.")
@click.option("-o", "--output", default="benchmarks", show_default=True, type=options.Output(folder=True))
def bench(target: "Target", only: str, engines: tuple["Engine", ...], rounds: int, output: Path) -> None:
    """Time contextual beside plain LAYERS or NETWORKS, or what SURGERY or CALIBRATION costs, on a GPU if there is one.

    DEPLOY times networks in ONNX Runtime, OpenVINO and frozen by torch.compile (extras: export, openvino, mmdet).

    \b
    coconv bench layers --engine eager
    coconv bench networks --only 'resnet50*'
    """
    from coconv_surgery.bench.run import run

    files = run(target, output, only=only, engines=engines, rounds=rounds, track=lambda items: tracked(items, target))
    click.echo(files.page.read_text(encoding="utf-8"))
    click.echo("\n".join(str(path) for path in files if path is not None))


@click.command()
def build() -> None:
    """Compile the operator for depthwise levels on this machine: half a minute, a C++ compiler and ninja.

    From then on every process uses it by itself, unless COCONV_NATIVE=0 is set.
    """
    from coconv_surgery.layers.depthwise import build_depthwise

    with doing("compiling"):
        library = build_depthwise()
    click.echo(library)


COMMANDS = (table, sweep, bench, build)
