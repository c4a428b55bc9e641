"""Layers and networks, plain and contextual, side by side."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast, get_args

import timm
import torch
import torch.nn as nn

from coconv_surgery.bench.authors import LevelsAlone, use_authors_layout
from coconv_surgery.bench.timing import Ratio, interleave, quiet
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.levels import complete_levels
from coconv_surgery.layers.switch import to_coconv_
from coconv_surgery.surgery import convert

Mode = Literal["eval", "train"]
Layout = Literal["NCHW", "channels_last"]
Precision = Literal["fp32", "bf16"]
Engine = Literal["eager", "compile"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        subject: Name of the layer or network.
        mode: A forward pass in evaluation mode, or a training step: forward, backward and, for a network, SGD.
        layout: Memory format of images and weights.
        precision: Single precision, or bfloat16 autocast.
        engine: Eager, or ``torch.compile``.
    """

    subject: str
    mode: Mode
    layout: Layout
    precision: Precision
    engine: Engine

    @property
    def settings(self) -> tuple[str, ...]:
        """How the subject is run."""
        return self.mode, self.layout, self.precision, self.engine


@dataclass(frozen=True)
class Timing:
    """What a case took.

    Attributes:
        case: The case.
        plain_ms: Median milliseconds of the plain convolution or network.
        coconv: The contextual one over the plain one.
        authors: The authors' layout over the plain one.
        alone: The convolutions of a layer's levels and nothing else over the plain one; None for a network, and for
            a compiled layer.
    """

    case: Case
    plain_ms: float
    coconv: Ratio
    authors: Ratio
    alone: Ratio | None = None


@dataclass(frozen=True)
class Subject:
    """A layer or a network, and its input.

    Attributes:
        plain: Builds the plain one.
        contextual: Builds the contextual one.
        shape: Shape of the input.
        outputs: Calls the model on an input, and returns what a training step differentiates.
    """

    plain: Callable[[], nn.Module]
    contextual: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outputs: Callable[[nn.Module, torch.Tensor], Sequence[torch.Tensor]]


def _outputs(model: nn.Module, image: torch.Tensor) -> Sequence[torch.Tensor]:
    output: torch.Tensor | list[torch.Tensor] = model(image)
    return output if isinstance(output, list) else [output]


def _layer(channels: int, side: int, levels: int, *, stride: int = 1, groups: int = 1) -> Subject:
    def plain() -> nn.Conv2d:
        return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=groups, bias=False)

    def contextual() -> nn.Module:
        conv = plain()
        to_coconv_(conv, *complete_levels(conv, levels))
        return conv

    return Subject(plain, contextual, (8, channels, side, side), _outputs)


# The shapes of Table 1, stage by stage, those of SSD at 300×300, and a depthwise one.
LAYERS = {
    "64 at 56×56, 4 levels": _layer(64, 56, 4),
    "128 at 56×56, stride 2, 3 levels": _layer(128, 56, 3, stride=2),
    "128 at 28×28, 3 levels": _layer(128, 28, 3),
    "256 at 28×28, stride 2, 2 levels": _layer(256, 28, 2, stride=2),
    "256 at 14×14, 2 levels": _layer(256, 14, 2),
    "64 at 75×75, 4 levels": _layer(64, 75, 4),
    "128 at 38×38, 4 levels": _layer(128, 38, 4),
    "256 at 38×38, 4 levels": _layer(256, 38, 4),
    "96 depthwise at 56×56, 4 levels": _layer(96, 56, 4, groups=96),
}


def ssd(backbone: str) -> nn.Module:
    """The SSD300 of this project with a backbone."""
    from coconv_surgery.mmdet.building import build_ssd

    return build_ssd(backbone)


def _maps(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    return [scores for maps in model(image) for scores in maps]


def _converted(name: str) -> Subject:
    def contextual() -> nn.Module:
        return convert(timm.create_model(name), input_size=224)

    return Subject(lambda: timm.create_model(name), contextual, (4, 3, 224, 224), _outputs)


NETWORKS = {
    "resnet50, 4×224×224": Subject(
        lambda: timm.create_model("resnet50"),
        lambda: timm.create_model("coresnet50"),
        (4, 3, 224, 224),
        _outputs,
    ),
    "SSD300-ResNet50, 2×300×300": Subject(lambda: ssd("r50"), lambda: ssd("coresnet50"), (2, 3, 300, 300), _maps),
    "efficientnet_b0, 4×224×224": _converted("efficientnet_b0"),
    "mobilenetv3_large_100, 4×224×224": _converted("mobilenetv3_large_100"),
    "regnety_032, 4×224×224": _converted("regnety_032"),
}
SUBJECTS = {**LAYERS, **NETWORKS}
# A layer in eager mode has a fourth, "alone".
CONTENDERS = ("plain", "coconv", "authors")


def cases(subjects: Iterable[str], engines: Iterable[str]) -> Iterator[Case]:
    """All cases of some subjects."""
    choices: Any = product(subjects, ("eval", "train"), ("NCHW", "channels_last"), ("fp32", "bf16"), engines)
    return (Case(*choice) for choice in choices)


def measure(case: Case, device: torch.device, rounds: int) -> Timing:
    """Time a case.

    Args:
        case: The case.
        device: Where to compute.
        rounds: How often to time each contender, at least twice.
    """
    subject = SUBJECTS[case.subject]
    names = (*CONTENDERS, "alone") if case.subject in LAYERS and case.engine == "eager" else CONTENDERS
    with quiet():
        calls = {name: prepare(contender(subject, name), subject, case, device) for name in names}
        times = interleave(calls, rounds=rounds, device=device)
    ratios = {name: Ratio.of(times[name], times["plain"]) for name in names if name != "plain"}
    return Timing(case, 1000 * statistics.median(times["plain"]), **ratios)


def contender(subject: Subject, which: str) -> nn.Module:
    """Build a contender, with the same weights as the others: all are drawn from one seed."""
    torch.manual_seed(0)
    if which == "plain":
        return subject.plain()
    model = subject.contextual()
    if which == "alone":
        return LevelsAlone(cast(CoConv2d, model))
    return use_authors_layout(model) if which == "authors" else model


def prepare(model: nn.Module, subject: Subject, case: Case, device: torch.device) -> Callable[[], Any]:
    """Prepare a model for a case.

    Returns:
        A function that runs it once: a forward pass, or a training step.
    """
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    model.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
    model.train(case.mode == "train")
    image = torch.randn(subject.shape, device=device).contiguous(memory_format=memory_format)
    if case.engine == "compile":
        torch._dynamo.reset()
        model.compile()  # type: ignore[no-untyped-call]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16")
    if case.mode == "eval":

        def evaluate() -> None:
            with torch.no_grad(), autocast:
                model(image)

        return evaluate
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    image.requires_grad_(case.subject in LAYERS)  # as in the middle of a network
    gradients: list[torch.Tensor] = []

    def train() -> None:
        optimizer.zero_grad()
        image.grad = None
        with autocast:
            outputs = subject.outputs(model, image)
        if not gradients:
            gradients.extend(torch.ones_like(output) for output in outputs)
        torch.autograd.backward(outputs, gradients)
        if case.subject in NETWORKS:
            optimizer.step()

    return train
