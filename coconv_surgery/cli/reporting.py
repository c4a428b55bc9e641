"""What a page is made of, gathered for a target of the command line."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from coconv_surgery.calibration import calibrate
from coconv_surgery.cli import targets
from coconv_surgery.cli.images import image_batches
from coconv_surgery.cli.weights import load
from coconv_surgery.reporting.gathering import Findings, before_and_after, gather, wake
from coconv_surgery.surgery import NoChangeWarning, apply_plan, get_plan
from coconv_surgery.tracing.inputs import Inputs

_RANDOM = "random, with norms that start at zero set to one"
_AS_MADE = "those that it was made with"


class Subject(NamedTuple):
    """A converted network.

    Attributes:
        network: The network, in evaluation mode.
        inputs: What it is called with.
        weights: Where its weights are from, in words.
        were_plain: Whether they were trained in plain convolutions.
    """

    network: nn.Module
    inputs: Inputs
    weights: str
    were_plain: bool


def converted_network(
    target: str,
    arguments: Mapping[str, Any],
    *,
    checkpoint: Path | None,
    pretrained: bool,
    anew: bool,
    **choices: Any,
) -> Subject:
    """Build the network of a target and convert it, unless it is already.

    Args:
        target: As of :func:`~coconv_surgery.cli.targets.build`.
        arguments: As there.
        checkpoint: A file of weights.
        pretrained: As there.
        anew: Whether one that is converted already is planned again.
        **choices: As of :func:`~coconv_surgery.cli.targets.plan_as_chosen`.

    Returns:
        The network, and what there is to know of it.
    """
    network = targets.build(target, arguments, pretrained=pretrained)
    kind = load(network, checkpoint)
    file = checkpoint or (Path(target) if targets.is_file(target) else None)
    brought = not targets.has_weights_of_chance(target, arguments, checkpoint, pretrained=pretrained)
    words = f"of {file.name}" if file else "of the library" if pretrained else None
    if words is None:
        woken = wake(network)
        brought = brought and not woken
        words = _AS_MADE if brought else _RANDOM
    if anew or not get_plan(network).converted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoChangeWarning)  # the plan says so
            apply_plan(network, targets.plan_as_chosen(network, target, **choices))
        kind = "plain" if kind == "none" and brought and not file else kind
    inputs = targets.inputs_of(network, target, choices["input_size"])
    return Subject(network.eval(), inputs, words, were_plain=kind == "plain")


def examine(
    target: str,
    arguments: Mapping[str, Any],
    *,
    folder: Path | None,
    images: int,
    rounds: int,
    tell: Callable[[str], None],
    **how: Any,
) -> Findings:
    """Gather what a page says.

    Args:
        target: As of :func:`converted_network`.
        arguments: As there.
        folder: Images to calibrate on, if it is to be calibrated.
        images: How many of them, at most.
        rounds: How often each network is timed; 0 for not at all.
        tell: Called with what is being done.
        **how: As of :func:`converted_network`.

    Raises:
        ValueError: If it is to be calibrated and its weights are not those of a plain network.
    """
    subject = converted_network(target, arguments, **how)
    networks, calibration, batch = before_and_after(subject.network), None, None
    if folder is not None:
        if not subject.were_plain:
            raise ValueError("--calibrate needs weights of a plain network: give them by --checkpoint or --pretrained")
        tell(f"calibrating {target}")
        batches = image_batches(subject.network, folder, images, how["input_size"])
        calibration = calibrate(subject.network, batches, max_images=images)
        batch = torch.cat([images for images, _ in itertools.islice(batches, 1)])[:8]
    return gather(
        Path(target).name if targets.is_config(target) or targets.is_file(target) else target,
        networks,
        subject.inputs,
        subject.weights,
        were_plain=subject.were_plain,
        calibration=calibration,
        images=batch,
        rounds=rounds,
        tell=tell,
    )
