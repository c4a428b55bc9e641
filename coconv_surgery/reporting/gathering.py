"""What a page says of a network, measured."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.bench.report import machine
from coconv_surgery.bench.timing import Ratio, interleave, quiet
from coconv_surgery.calibration import Calibration
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.paper.counting import Cost, count
from coconv_surgery.planning.plan import Plan
from coconv_surgery.receptive import EffectiveField, FieldReport, effective_receptive_field, receptive_fields
from coconv_surgery.surgery import CalibratedWeightsWarning, get_plan, revert
from coconv_surgery.tracing.copying import separate_copy
from coconv_surgery.tracing.inputs import Inputs

_IMAGES = 8


@dataclass(frozen=True)
class Findings:
    """What there is to say; whatever is missing stands in ``missing``, with why.

    Attributes:
        title: What named the network.
        plan: How it is converted.
        input: Size of what it is called with.
        weights: Where its weights are from, in words.
        were_plain: Whether they were trained in plain convolutions.
        example: One of its contextual convolutions, if it has any.
        costs: What the network costs, by ``"before"`` and ``"after"``.
        fields: Theoretical receptive fields, likewise.
        effective: Effective ones of one convolution, likewise.
        calibration: What a calibration did.
        speed: Time of the converted network over that of the plain one.
        machine: What measured, by name.
        missing: Why a part is not there, by its name.
    """

    title: str
    plan: Plan
    input: str
    weights: str
    were_plain: bool
    example: CoConv2d | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    fields: Mapping[str, FieldReport] = field(default_factory=dict)
    effective: Mapping[str, EffectiveField] = field(default_factory=dict)
    calibration: Calibration | None = None
    speed: Ratio | None = None
    machine: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def before_and_after(network: nn.Module) -> dict[str, nn.Module]:
    """A converted network, and a copy of it with plain convolutions again, of the same weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibratedWeightsWarning)  # nobody goes on with that copy
        return {"before": revert(separate_copy(network)), "after": network}


def wake(network: nn.Module) -> bool:
    """Let every branch of a network with random weights count, also those whose norm starts at zero.

    Returns:
        Whether there were any, as in a network that was never trained.
    """
    woken = False
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1 and not weight.is_meta and not weight.any():
            nn.init.ones_(weight)
            woken = True
    return woken


def gather(
    title: str,
    networks: Mapping[str, nn.Module],
    inputs: Inputs,
    weights: str,
    *,
    were_plain: bool,
    calibration: Calibration | None = None,
    images: torch.Tensor | None = None,
    rounds: int = 0,
    tell: Callable[[str], None] = lambda what: None,
) -> Findings:
    """Measure all that a page says.

    Args:
        title: What named the network.
        networks: As of :func:`before_and_after`.
        inputs: What they are called with.
        weights: Where their weights are from, in words.
        were_plain: Whether they were trained in plain convolutions.
        calibration: What a calibration did, if there was one.
        images: ``(N, channels, height, width)`` to measure effective receptive fields on. Default: random ones.
        rounds: How often each is timed; 0 for not at all.
        tell: Called with what is being done.

    Returns:
        The findings.
    """
    missing: dict[str, str] = {}

    def of_each(part: str, measure: Callable[[nn.Module], Any]) -> dict[str, Any]:
        tell(f"{title}: {part}")
        try:
            return {name: measure(network) for name, network in networks.items()}
        except (RuntimeError, TypeError, ValueError) as error:  # of a network that wants more than an image
            missing[part] = str(error)
            return {}

    plan = get_plan(networks["after"])
    costs = of_each("costs", lambda network: _cost(network, inputs))
    fields = of_each("receptive fields", lambda network: receptive_fields(network, example_inputs=inputs))
    effective, speed = {}, None
    if not plan.converted:
        missing["effective receptive fields"] = "no convolution is converted"
    elif len(inputs.args) != 1 or inputs.kwargs or inputs.call:
        missing["effective receptive fields"] = "the network takes more than a batch of images"
    else:
        layer, size = plan.converted[-1].name, tuple(inputs.args[0].shape[1:])
        given: dict[str, Any] = {"input_size": size, "images": _IMAGES} if images is None else {"images": images}
        effective = of_each(
            "effective receptive fields", lambda network: effective_receptive_field(network, layer, **given)
        )
    if rounds:
        tell(f"{title}: speed")
        speed = _speed(networks, inputs, rounds)
    example = next((module for module in networks["after"].modules() if isinstance(module, CoConv2d)), None)
    device = next((parameter.device for parameter in networks["after"].parameters()), torch.device("cpu"))
    return Findings(
        title,
        plan,
        str(inputs),
        weights,
        were_plain,
        example,
        costs,
        fields,
        effective,
        calibration,
        speed,
        machine(device),
        missing,
    )


def _cost(network: nn.Module, inputs: Inputs) -> Cost:
    return count(_Called(separate_copy(network).eval(), inputs))


class _Called(nn.Module):
    """A network that brings its inputs."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.network, self._inputs = network, inputs

    def forward(self) -> Any:
        return self._inputs.run(self.network)


def _speed(networks: Mapping[str, nn.Module], inputs: Inputs, rounds: int) -> Ratio:
    device = next(networks["after"].parameters()).device
    copies = {name: separate_copy(network).eval() for name, network in networks.items()}

    def call(network: nn.Module) -> Callable[[], Any]:
        return lambda: inputs.run(network)

    with torch.inference_mode(), quiet():
        times = interleave({name: call(copy) for name, copy in copies.items()}, rounds=rounds, device=device)
    return Ratio.of(times["after"], times["before"])
