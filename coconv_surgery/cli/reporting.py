"""What a page is made of, gathered for a target of the command line."""

import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.calibration import calibrate
from coconv_surgery.cli import targets
from coconv_surgery.cli.images import image_batches
from coconv_surgery.cli.weights import load
from coconv_surgery.reporting.gathering import Findings, before_and_after, gather, wake
from coconv_surgery.surgery import NoChangeWarning, apply_plan, get_plan
from coconv_surgery.tracing.inputs import Inputs, infer_inputs

_RANDOM = "random, with norms that start at zero set to one"


def converted_network(
    target: str,
    arguments: Mapping[str, Any],
    *,
    checkpoint: Path | None,
    pretrained: bool,
    anew: bool,
    **choices: Any,
) -> tuple[nn.Module, Inputs, str]:
    """Build the network of a target and convert it, unless it is already.

    Args:
        target: As of :func:`~coconv_surgery.cli.targets.build`.
        arguments: As there.
        checkpoint: A file of weights.
        pretrained: As there.
        anew: Whether one that is converted already is planned again.
        **choices: As of :func:`~coconv_surgery.cli.targets.plan_as_chosen`.

    Returns:
        The network, what it is called with, and where its weights are from, in words.
    """
    network = targets.build(target, arguments, pretrained=pretrained)
    load(network, checkpoint)
    file = checkpoint or (Path(target) if targets.is_file(target) else None)
    words = f"of {file.name}" if file else "of the library" if pretrained else _RANDOM
    if words == _RANDOM:
        wake(network)
    if anew or not get_plan(network).converted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoChangeWarning)  # the plan says so
            apply_plan(network, targets.plan_as_chosen(network, target, **choices))
    inputs = targets.inputs_of(network, target, choices["input_size"]) or infer_inputs(network, choices["input_size"])
    return network.eval(), inputs, words


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
    network, inputs, words = converted_network(target, arguments, **how)
    networks, calibration, batch = before_and_after(network), None, None
    if folder is not None:
        if words == _RANDOM:
            raise ValueError("--calibrate needs trained weights: give --pretrained or --checkpoint as well")
        tell(f"calibrating {target}")
        batches = image_batches(network, folder, images, how["input_size"])
        calibration = calibrate(network, batches, max_images=images)
        batch = torch.cat([images for images, _ in itertools.islice(batches, 1)])[:8]
    return gather(target, networks, inputs, words, calibration=calibration, images=batch, rounds=rounds, tell=tell)
