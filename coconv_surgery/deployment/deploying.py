"""Make a copy of a network that is fit for inference and export."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map_only

from coconv_surgery.deployment.blocks import merge_blocks
from coconv_surgery.deployment.checking import COPY_DOES_NOT_RUN, compare, compute, round_weights
from coconv_surgery.deployment.deciding import Decision, decide
from coconv_surgery.deployment.graphs import nodes_to_modules
from coconv_surgery.deployment.report import Deployment, DeploymentError
from coconv_surgery.layers.arguments import instance
from coconv_surgery.merging import keep_levels_in_merges
from coconv_surgery.planning.notes import (
    attributes_kept_by,
    compare_no_more,
    inputs_for,
    is_guarded,
    note_plan,
    set_guard,
)
from coconv_surgery.tracing.convertible import check_convertible
from coconv_surgery.tracing.copying import copy_deeply, separate_copy
from coconv_surgery.tracing.evaluating import evaluate
from coconv_surgery.tracing.inputs import BlankInputs, Inputs, InputSize
from coconv_surgery.tracing.objects import tensors_in
from coconv_surgery.tracing.unseen import unseen

_ATTRIBUTE = "_coconv_deployment"


def deploy(model: nn.Module, *, input_size: InputSize | None = None, example_inputs: Any = None) -> nn.Module:
    """Make a copy of a network for inference, of plain layers that every exporter, scripter and quantiser knows.

    - A contextual convolution becomes a plain one for each level, and a concatenation.
    - Weights that are computed, as standardised ones are, become constant.
    - A norm is folded into the convolutions before it, where it alone reads what they give. One forward pass shows it.
    - Blocks with branches for training alone, as RepVGG's, are merged.

    What cannot be known is left as it is, and :func:`get_deployment` says why. Hooks on convolutions and norms that
    were replaced are gone. The copy computes what the network computes in evaluation mode, which is checked.

    Args:
        model: A network, converted or not. It is not changed.
        input_size: Side, (height, width) or (channels, height, width) of its input. Default: what timm says of the
            network, or else what its conversion was planned for.
        example_inputs: What to call it with instead, see :func:`~coconv_surgery.plan_conversion`.

    Returns:
        The copy, in evaluation mode. Its parameters require no gradients.

    Raises:
        TypeError: If ``model`` is not a module that can be copied whole, or an argument is of a wrong kind.
        ValueError: If the input size cannot be known or does not suit the network.
        DeploymentError: If the network does not run, or its copy would not compute the same.

    >>> import timm
    >>> from coconv_surgery import convert
    >>> deployed = deploy(convert(timm.create_model("resnet18")))
    >>> print(get_deployment(deployed).summary().split("; largest")[0])
    12 contextual convolutions written out as 36 plain ones; 20 norms folded
    """
    check_convertible(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise DeploymentError("the network is on the meta device, without numbers: load its weights first")
    inputs = _with_numbers(inputs_for(model, input_size, example_inputs))
    deployed = separate_copy(model)
    with unseen(model):
        compute(model, inputs, ())  # whatever does not run from here on is the copy
        evaluate(deployed)
        deployed, merged, refused = merge_blocks(deployed)
        refused |= nodes_to_modules(deployed)
        decision = decide(deployed, inputs)
        inside = tuple(f"{block}." if block else "" for block in merged)
        there = {name for name, _ in model.named_modules()}
        names = {name for name in decision.names & there if not name.startswith(inside)}
        expected, rounded = compute(model, inputs, names), compute(model, inputs, names, round_weights)
        deployed = _replace(deployed, decision)
        with ExitStack() as undo:
            _forget_conversion(deployed, undo)
            undo.pop_all()
        found = compute(deployed, inputs, names, otherwise=COPY_DOES_NOT_RUN)
        apart = compare(found, expected, rounded)
    report = replace(decision.report, merged=tuple(merged), left={**refused, **decision.report.left}, difference=apart)
    attributes_kept_by(deployed)[_ATTRIBUTE] = report
    return deployed.requires_grad_(False)


def get_deployment(model: nn.Module) -> Deployment:
    """What :func:`deploy` did.

    Args:
        model: What it returned.

    Raises:
        ValueError: If it was not returned by :func:`deploy`.
    """
    found = attributes_kept_by(instance(model, "model", nn.Module, "a torch.nn.Module")).get(_ATTRIBUTE)
    if not isinstance(found, Deployment):
        raise ValueError(f"this {type(model).__name__} was not deployed: deploy() returns a copy that was")
    return found


def _with_numbers(inputs: Inputs) -> Inputs:
    """Inputs without blank images, on which little of a network would be seen to differ."""
    if isinstance(inputs, BlankInputs):
        raise ValueError(f"an image of {inputs} is too large to run the network on: give a smaller input_size")
    if any(tensor.is_meta for tensor in tensors_in(inputs.args, inputs.kwargs)):
        raise DeploymentError("the inputs are on the meta device, without numbers: give some that have them")
    generator = torch.Generator("cpu").manual_seed(0)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.any():
            return tensor
        return torch.rand(tensor.shape, generator=generator).to(tensor)

    args, kwargs = tree_map_only(torch.Tensor, fill, (tuple(inputs.args), dict(inputs.kwargs)))
    return replace(inputs, args=args, kwargs=kwargs)


def _replace(model: nn.Module, decision: Decision) -> nn.Module:
    """Put plain modules in the place of others, wherever a network holds them: in lists and attributes as well."""
    made: dict[int, Any] = {}
    for name, (kernels, dtype) in decision.kernels.items():
        made[id(model.get_submodule(name))] = kernels.module(dtype)
    for name, norm in decision.norms.items():
        module = model.get_submodule(name)
        made[id(module)] = nn.Identity() if norm.act is None else module.get_submodule(norm.act)
    replaced: nn.Module = copy_deeply(model, made)
    return replaced


def _forget_conversion(model: nn.Module, undo: ExitStack) -> None:
    """Leave nothing of what a conversion leaves with a network."""
    for module in model.modules():
        note_plan(module, None, undo)
        if is_guarded(module):
            set_guard(module, None, undo)
    compare_no_more(model, undo)  # as a part does of which the whole holds the plan
    keep_levels_in_merges(model, undo)
