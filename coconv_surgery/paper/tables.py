"""The networks of the paper's tables, counted here beside the paper's figures: ``coconv table``."""

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import timm
import torch
import torch.nn as nn

from coconv_surgery.bench.timing import interleave, quiet
from coconv_surgery.paper.counting import Cost, count
from coconv_surgery.paper.peers import dilated_resnet, nonlocal_resnet, preact_resnet, resnet, se_resnet
from coconv_surgery.planning.plan import Plan, PlanRow, align
from coconv_surgery.surgery import NoChangeWarning, get_plan
from coconv_surgery.zoo.progan import coprogan, progan

Build = Callable[[], nn.Module]


class Row(NamedTuple):
    """A network, and what the paper says of it.

    Attributes:
        network: Its name.
        build: Builds it.
        parameters: The paper's parameters in millions, where it gives them.
        gflops: The paper's GFLOPs, which are multiply-adds, where it gives them.
        results: The paper's results, None for one that it does not give.
        config: What in ``configs/`` trains it.
    """

    network: str
    build: Build
    parameters: float | None
    gflops: float | None
    results: tuple[float | str | None, ...] = ()
    config: str | None = None


class Table(NamedTuple):
    """One of the paper's tables.

    Attributes:
        title: What it compares.
        rows: Its networks.
        results: What the paper's results measure.
        input: Shape of one input.
        notes: What a reader must know beside how things are counted.
        layout: A network to show the levels of, map by map.
        sizes: More counts to show: for each size, a network, what it is compared with, and one input.
    """

    title: str
    rows: tuple[Row, ...]
    results: tuple[str, ...] = ()
    input: tuple[int, ...] = (1, 3, 224, 224)
    notes: tuple[str, ...] = ()
    layout: Build | None = None
    sizes: tuple["Size", ...] = ()


class Size(NamedTuple):
    """A network that comes in several sizes, plain and contextual.

    Attributes:
        name: Which size it is.
        plain: Builds the plain network.
        contextual: Builds the contextual one.
    """

    name: str
    plain: Build
    contextual: Build


def coresnet(depth: int, **arguments: object) -> nn.Module:
    """CoResNet, see :class:`~coconv_surgery.zoo.CoResNet`."""
    model: nn.Module = timm.create_model(f"coresnet{depth}", **arguments)
    return model


def ssd(backbone: str) -> nn.Module:
    """The SSD of Table 6.

    Args:
        backbone: As the config's name has it, such as ``"coresnet50"``.

    Raises:
        RuntimeError: If MMDetection is not installed.
    """
    try:
        from coconv_surgery.mmdet.building import build_ssd
    except ImportError as error:
        raise RuntimeError(f"Table 6 is of detectors, and {error}") from error
    return build_ssd(backbone)


_UNCOUNTED = (None, None)
_CIFAR, _CELEBA = (
    tuple(f"progan/{network}_{data}.py" for network in ("progan", "coprogan"))
    for data in ("cifar10-32x32", "celeba-128x128")
)
_ROUNDS = 5  # how often a forward pass is timed
_ERRORS = ("top-1 error, %", "top-5 error, %")

_NON_LOCAL = (
    "NL ResNet: a non-local block after every stage gives the paper's parameters. Its FLOPs do not follow: attention "
    "over all 56×56 positions of stage 1 alone is 2.5 G, and the paper does not say how it reduces or counts that."
)
_PRE_ACTIVATION = "pre-act. ResNet: timm's has no norms in its shortcuts, 7,680 parameters."
_SQUEEZE = "SE ResNet: without biases in its two layers, which gives the paper's parameters."

_TABLE_5 = {
    "ResNet": (
        resnet,
        {50: (25.56, 4.14, (23.88, 7.06)), 101: (44.55, 7.88, (22.00, 6.10)), 152: (60.19, 11.62, (21.55, 5.74))},
    ),
    "pre-act. ResNet": (
        preact_resnet,
        {50: (25.56, 4.14, (23.77, 7.04)), 101: (44.55, 7.88, (22.11, 6.26)), 152: (60.19, 11.62, (21.41, 5.78))},
    ),
    "SE ResNet": (
        se_resnet,
        {50: (28.07, 4.15, (22.74, 6.37)), 101: (49.29, 7.90, (21.31, 5.79)), 152: (66.77, 11.65, (21.38, 5.80))},
    ),
    "NL ResNet": (
        nonlocal_resnet,
        {50: (36.72, 6.18, (22.91, 6.42)), 101: (55.71, 9.91, (21.40, 5.83)), 152: (71.35, 13.66, (21.91, 6.11))},
    ),
    "CoResNet": (
        coresnet,
        {50: (25.56, 4.14, (22.73, 6.49)), 101: (44.55, 7.88, (21.29, 5.72)), 152: (60.19, 11.62, (20.97, 5.48))},
    ),
}

_TABLE_3 = {
    "stage(1,1,1,1)": (23.88, 7.06),
    "stage(2,2,2,1)": (23.24, 6.79),
    "stage(3,3,2,1)": (23.23, 6.66),
    "stage(3,3,3,3)": (23.33, 6.71),
    "stage(4,3,2,1)": (22.73, 6.49),
    "top(4,3,2,1)": (25.58, 8.05),
}

TABLES = {
    1: Table(
        "ResNet-50 and CoResNet-50",
        (
            Row("ResNet-50", partial(resnet, 50), 25.56, 4.14),
            Row("CoResNet-50", partial(coresnet, 50), 25.56, 4.14),
        ),
        layout=partial(coresnet, 50, policy="resolution"),
    ),
    2: Table(
        "ProGAN and CoProGAN, the generators for 128×128 pixels",
        tuple(
            Row(f"{name}, fmap_base {base}", partial(build, fmap_base=base), 27.21, 54.76)
            for base in (16384, 8192)
            for name, build in (("ProGAN", progan), ("CoProGAN", coprogan))
        ),
        input=(1, 512),
        notes=(
            "The paper prints the rows of fmap_base 8192, which is what the reference implementation of ProGAN has by "
            "default, and the totals of fmap_base 16384.",
            "Generators have colours at every resolution, of which a fully grown one uses the last.",
        ),
        layout=coprogan,
        sizes=tuple(
            Size(
                f"{side}×{side}, fmap_base {base}",
                partial(progan, side, fmap_base=base),
                partial(coprogan, side, fmap_base=base),
            )
            for base in (8192, 16384)
            for side in (4, 8, 16, 32, 64, 128, 256, 512, 1024)
        ),
    ),
    3: Table(
        "CoResNet-50 by policy: levels at each stage",
        tuple(
            Row(policy, partial(coresnet, 50, policy=policy), 25.56, 4.14, errors)
            for policy, errors in _TABLE_3.items()
        ),
        _ERRORS,
    ),
    4: Table(
        "CoResNet-50 and closely related networks",
        (
            Row("ResNet-50, stride 32", partial(resnet, 50), 25.56, 4.14, (23.88, 7.06)),
            Row("NL ResNet-50, stride 32", partial(nonlocal_resnet, 50), 36.72, 6.18, (22.91, 6.42)),
            Row("CoResNet-50, stride 32", partial(coresnet, 50), 25.56, 4.14, (22.73, 6.49)),
            Row("DRN-50, stride 8", partial(dilated_resnet, 50), 25.56, 19.20, (22.44, 6.47)),
            Row("CoResNet-50, stride 8", partial(coresnet, 50, output_stride=8), 25.56, 19.20, (21.93, 6.17)),
        ),
        _ERRORS,
        notes=(_NON_LOCAL,),
    ),
    5: Table(
        "CoResNet and other networks at three depths",
        tuple(
            Row(f"{name}-{depth}", partial(build, depth), *figures[depth])
            for depth in (50, 101, 152)
            for name, (build, figures) in _TABLE_5.items()
        ),
        _ERRORS,
        notes=(_PRE_ACTIVATION, _SQUEEZE, _NON_LOCAL),
    ),
    6: Table(
        "SSD300 on ResNet and CoResNet, cut after their third stage",
        (
            Row("SSD, ResNet-50", partial(ssd, "r50"), 22.89, 20.92, (26.20, 43.97)),
            Row("SSD, CoResNet-50", partial(ssd, "coresnet50"), 22.89, 20.92, (28.63, 46.71)),
            Row("SSD, ResNet-101", partial(ssd, "r101"), 41.89, 48.45, (29.58, 47.69)),
            Row("SSD, CoResNet-101", partial(ssd, "coresnet101"), 41.89, 48.45, (31.19, 49.89)),
        ),
        ("AP, %", "AP at IoU 0.5, %"),
        input=(1, 3, 300, 300),
        notes=("The paper counts more than the wide count does, the same amount at both depths.",),
    ),
    7: Table(
        "ProGAN and CoProGAN on CIFAR-10 (32×32 pixels) and CelebA (128×128)",
        (
            Row("ProGAN, CIFAR-10", partial(progan, 32), *_UNCOUNTED, ("7.60 ± 0.09", 20.70, *[None] * 6), _CIFAR[0]),
            Row(
                "CoProGAN, CIFAR-10", partial(coprogan, 32), *_UNCOUNTED, ("7.71 ± 0.06", 19.66, *[None] * 6), _CIFAR[1]
            ),
            Row(
                "ProGAN, CelebA", progan, *_UNCOUNTED, (None, None, "0.2894", 3.65, 2.48, 2.66, 7.29, 4.02), _CELEBA[0]
            ),
            Row(
                "CoProGAN, CelebA",
                coprogan,
                *_UNCOUNTED,
                (None, None, "0.2875", 3.29, 2.43, 2.27, 5.35, 3.34),
                _CELEBA[1],
            ),
        ),
        ("IS", "FID", "MS-SSIM", *(f"SWD×10³, {side}" for side in (128, 64, 32, 16)), "average"),
        input=(1, 512),
        notes=(
            "Higher IS is better, lower FID, MS-SSIM and SWD are.",
            "`coconv evaluate-gan` prints these columns for a checkpoint that a config trained.",
        ),
    ),
}


def render(number: int, *, timed: bool = False) -> str:
    """Count the networks of one of the paper's tables beside the paper's own figures.

    Args:
        number: The table's, 1 to 7.
        timed: Also time a forward pass of each, side by side, on the first GPU if there is one.

    Returns:
        The table, for a reader.

    Raises:
        RuntimeError: For Table 6, if MMDetection is not installed.
    """
    table = TABLES[number]
    parts = [f"Table {number}: {table.title}"]
    if table.layout is not None:
        with torch.device("meta"):
            parts.append(_layout(table.rows[-1].network, get_plan(table.layout())))
    header = ["network", "parameters", "paper, M", "multiply-adds, G", "wide, G", "paper, G"]
    lines = [[*_counts(row, table), *map(_number, row.results)] for row in table.rows]
    header += [f"paper: {name}" for name in table.results]
    if any(row.config for row in table.rows):
        header.append("config")
        lines = [[*line, row.config or ""] for line, row in zip(lines, table.rows, strict=True)]
    if timed:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        header += [f"ms ({device.type})", "× first"]
        times = _time(table, device)
        lines = [[*line, f"{t * 1e3:.1f}", f"{t / times[0]:.2f}"] for line, t in zip(lines, times, strict=True)]
    parts.append(align([header, *lines]))
    if table.sizes:
        parts.append(_sizes(table))
    parts.append("\n".join(f"- {note}" for note in _notes(table)))
    return "\n\n".join(parts)


def _counts(row: Row, table: Table) -> list[str]:
    cost = _count(row.build, table)
    return [
        row.network,
        f"{cost.parameters:,}",
        _number(row.parameters),
        f"{cost.multiply_adds / 1e9:.3f}",
        f"{cost.wide / 1e9:.3f}",
        _number(row.gflops),
    ]


def _count(build: Build, table: Table) -> Cost:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)  # the smallest maps have one level
        return count(build().eval(), torch.empty(table.input))


def _number(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _sizes(table: Table) -> str:
    lines = [["size", "parameters", "multiply-adds, G", "contextual: parameters", "multiply-adds, G"]]
    for name, *builds in table.sizes:
        costs = [_count(build, table) for build in builds]
        counts = [(f"{cost.parameters:,}", f"{cost.multiply_adds / 1e9:.3f}") for cost in costs]
        lines.append([name, *counts[0], *counts[1]])
    return align(lines)


def _time(table: Table, device: torch.device) -> list[float]:
    """Median seconds of a forward pass of each network."""
    images = torch.randn(table.input, device=device)
    models = {row.network: row.build().eval().to(device) for row in table.rows}
    calls = {network: partial(model, images) for network, model in models.items()}
    with quiet(), torch.inference_mode():
        times = interleave(calls, rounds=_ROUNDS, device=device)
    return [statistics.median(times[row.network]) for row in table.rows]


def _notes(table: Table) -> Sequence[str]:
    results = ("The results are the paper's. They are not reproduced here.",) if table.results else ()
    return (
        f"multiply-adds: one input of {'×'.join(map(str, table.input[1:]))}; convolutions, linear layers and matrix "
        "products, by torch's FLOP counter.",
        "wide: with 4 for an element of a batch norm, 2 of a pixel norm and 1 of an activation, the count "
        "that gives the paper's figures for ResNet and ProGAN.",
        *results,
        *table.notes,
    )


def _layout(network: str, plan: Plan) -> str:
    kinds = Counter((_size(row), _levels(row)) for row in plan.rows if row.signature.kernel_size == (3, 3))
    lines = [[size, str(number), levels] for (size, levels), number in kinds.items()]
    return align([("map", "3×3 convs", f"{network}: channels at each dilation"), *lines])


def _size(row: PlanRow) -> str:
    return ", ".join("×".join(map(str, size)) for size in row.output_sizes)


def _levels(row: PlanRow) -> str:
    return ", ".join(f"{channels} at {dilation}" for channels, dilation in zip(row.splits, row.dilations, strict=True))
