"""Whether a deployed network computes what the network computes, in what it returns and in maps inside of it."""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn as nn

from coconv_surgery.deployment.report import DeploymentError
from coconv_surgery.tracing.differences import difference
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.objects import in_short, tensors_in
from coconv_surgery.tracing.visit import on_a_copy

# What a network computes: the tensors that it returns, by a name that no module has, and samples of those that its
# modules return, by theirs.
Computed = dict[str, list[torch.Tensor]]
_OUTPUTS = "."
_SAMPLE = 256
_HIDDEN = "its code may use convolutions or norms in a way that one forward pass does not show"
_DOES_NOT_RUN = "the network does not run on the inputs to deploy it for"
COPY_DOES_NOT_RUN = f"the network runs, and the deployed one does not: {_HIDDEN}"
_NO_NUMBERS = " on these inputs holds no numbers to compare: give others"
# How many times what the rounding of weights changes: it adds up over a network. The second where numbers are so coarse
# that nothing would be told apart.
_ROUNDED, _ROUNDED_COARSELY = 100, 8


def compute(
    model: nn.Module,
    inputs: Inputs,
    names: Collection[str],
    change: Callable[[nn.Module], object] | None = None,
    otherwise: str = _DOES_NOT_RUN,
) -> Computed:
    """What a copy of a network computes in evaluation mode, if need be after a change.

    Args:
        model: The network.
        inputs: What to run it on.
        names: Modules whose outputs to sample.
        change: A change.
        otherwise: What to say if it does not run.
    """

    def run(twin: nn.Module) -> Computed:
        if change is not None:
            change(twin)
        computed: Computed = {}
        for name, module in twin.named_modules():
            if name in names:
                module.register_forward_hook(functools.partial(_sample, computed.setdefault(name, [])))
        computed[_OUTPUTS] = outputs_of(inputs.run, twin, otherwise=otherwise)
        return computed

    return on_a_copy(model, inputs, run)


def _sample(samples: list[torch.Tensor], module: nn.Module, args: Any, output: Any) -> None:
    for tensor in tensors_in(output):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            continue  # it ends with the call that it is computed in
        samples.append(tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLE)].clone())


def round_weights(model: nn.Module) -> None:
    """Change every weight by as much as rounding may."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, dtype=torch.float64) - 0.5
            tensor.data = tensor.data * (1 + 2 * torch.finfo(tensor.dtype).eps * noise).to(tensor)


def outputs_of(run: Callable[..., Any], *args: Any, otherwise: str) -> list[torch.Tensor]:
    """The tensors that a run of a network returns, without gradients and with the same random numbers each time.

    Raises:
        DeploymentError: If the network's code raises something, which stands behind ``otherwise``.
    """
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return [tensor.detach().clone() for tensor in tensors_in(run(*args))]
    except Exception as error:  # the network's own code
        raise DeploymentError(f"{otherwise}: {in_short(error)}") from error


def compare(found: Computed, expected: Computed, rounded: Computed) -> float:
    """By how much what is computed differs, relative to the largest number of a tensor.

    Args:
        found: What the deployed network computes.
        expected: What the network computes.
        rounded: What it computes with other weights that differ by rounding.

    Raises:
        DeploymentError: If it differs by more than rounding, or there is nothing to compare.
    """
    apart: dict[str, list[float]] = {}
    for name, tensors in expected.items():
        if _shapes(found[name]) != _shapes(tensors):
            if _shapes(rounded[name]) != _shapes(tensors):
                continue  # rounding alone decides how many there are
            what = "return what the network returns" if name == _OUTPUTS else f"run {name} as the network does"
            raise DeploymentError(f"the deployed network would not {what}: {_HIDDEN}")
        alike = _shapes(rounded[name]) == _shapes(tensors)
        for number, (mine, theirs) in enumerate(zip(found[name], tensors, strict=True)):
            differs = difference(mine, theirs)
            least = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
            times = _ROUNDED if least < 1e-4 else _ROUNDED_COARSELY
            allowed = times * max(least, difference(rounded[name][number], theirs) if alike else least)
            if differs > allowed:
                what = "its outputs" if name == _OUTPUTS else name
                raise DeploymentError(
                    f"the deployed network would compute something else, by {differs:.1e} of the largest number in "
                    f"{what}: {_HIDDEN}"
                )
            if not math.isnan(differs):
                apart.setdefault(name, []).append(differs)
        if name == _OUTPUTS and name not in apart and any(tensor.numel() for tensor in tensors):
            raise DeploymentError(f"what the network returns{_NO_NUMBERS}")
    if not apart and len(expected) > 1:
        raise DeploymentError(f"what the network computes{_NO_NUMBERS}")
    return max(apart.get(_OUTPUTS) or [number for numbers in apart.values() for number in numbers] or [0.0])


def _shapes(tensors: list[torch.Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]
