"""Make a copy of a network that is fit for inference and export."""

import contextvars
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map_only

from coconv_surgery.deployment.graphs import nodes_to_modules
from coconv_surgery.deployment.kernels import Kernels, difference, is_layer, read_kernels
from coconv_surgery.deployment.norms import Norm, is_norm, read_norm
from coconv_surgery.deployment.report import Deployment, DeploymentError
from coconv_surgery.deployment.watching import Seen, Watch
from coconv_surgery.layers.arguments import instance
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.merging import keep_levels_in_merges
from coconv_surgery.planning.notes import is_guarded, note_plan, set_guard
from coconv_surgery.tracing.convertible import check_convertible
from coconv_surgery.tracing.copying import separate_copy
from coconv_surgery.tracing.inputs import BlankInputs, Inputs, InputSize, infer_inputs
from coconv_surgery.tracing.objects import in_short, tensors_in
from coconv_surgery.tracing.unseen import unseen
from coconv_surgery.tracing.visit import Visit

_ATTRIBUTE = "_coconv_deployment"
_SIDE = 32
_ROUNDING = 100  # times what the rounding of weights changes


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
            network.
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
    inputs = _with_numbers(infer_inputs(model, input_size, example_inputs))
    deployed = separate_copy(model).eval()
    with unseen(model):
        expected, rounded = _run(model, inputs), _run(model, inputs, _round_weights)
        merged, refused = _merge_blocks(deployed)
        nodes_to_modules(deployed)
        decision = _watch(deployed, inputs)
        deployed = _replace(deployed, decision)
        with ExitStack() as undo:
            _forget_conversion(deployed, undo)
            undo.pop_all()
        apart = _compare(_run(deployed, inputs), expected, rounded)
    report = replace(decision.report, merged=tuple(merged), left={**refused, **decision.report.left})
    vars(deployed)[_ATTRIBUTE] = replace(report, difference=apart)
    return deployed.requires_grad_(False)


def get_deployment(model: nn.Module) -> Deployment:
    """What :func:`deploy` did.

    Args:
        model: What it returned.

    Raises:
        ValueError: If it was not returned by :func:`deploy`.
    """
    found = vars(instance(model, "model", nn.Module, "a torch.nn.Module")).get(_ATTRIBUTE)
    if not isinstance(found, Deployment):
        raise ValueError(f"this {type(model).__name__} was not deployed: deploy() returns a copy that was")
    return found


@dataclass
class _Decision:
    """What is to become of a network's modules, by name."""

    kernels: dict[str, Kernels] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    report: Deployment = field(default_factory=Deployment)


def _with_numbers(inputs: Inputs) -> Inputs:
    """Inputs without blank images, on which little of a network would be seen to differ."""
    if isinstance(inputs, BlankInputs):
        raise ValueError(f"an image of {inputs} is too large to run the network on: give a smaller input_size")
    generator = torch.Generator("cpu").manual_seed(0)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 3 or not tensor.is_floating_point() or tensor.is_meta or tensor.any():
            return tensor
        return torch.rand(tensor.shape, generator=generator).to(tensor)

    args, kwargs = tree_map_only(torch.Tensor, fill, (tuple(inputs.args), dict(inputs.kwargs)))
    return replace(inputs, args=args, kwargs=kwargs)


def _run(model: nn.Module, inputs: Inputs, change: Callable[[nn.Module], object] | None = None) -> list[torch.Tensor]:
    """What a copy of a network computes in evaluation mode, if need be after a change."""

    def run(twin: nn.Module) -> list[torch.Tensor]:
        if change is not None:
            change(twin)
        return _outputs(inputs.run, twin)

    with Visit(model, inputs) as visit:
        return contextvars.copy_context().run(run, visit.twin(fake=False).model)


def _round_weights(model: nn.Module) -> None:
    """Change every weight by as much as rounding may."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, dtype=torch.float32) - 0.5
            tensor.data.mul_(1 + 2 * torch.finfo(tensor.dtype).eps * noise.to(tensor.device))


def _outputs(run: Callable[..., Any], *args: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return [tensor.detach().clone() for tensor in tensors_in(run(*args))]
    except Exception as error:  # the network's own code
        raise DeploymentError(f"the network does not run on the inputs to deploy it for: {in_short(error)}") from error


def _merge_blocks(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Let the blocks of a network that can merge their branches do so, in the way of timm's ``reparameterize_model``.

    Returns:
        The names of those that did, and why others did not.
    """
    merged, refused = [], {}
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        for name, child in list(module.named_children()):
            path = f"{prefix}{name}"
            if (merge := _merge_of(child)) is None:
                stack.append((f"{path}.", child))
                continue
            try:
                result = merge()
            except ValueError as error:  # of levels that do not agree
                refused[path] = str(error)
                continue
            if isinstance(result, nn.Module):
                setattr(module, name, result.eval())
            merged.append(path)
    return merged, refused


def _merge_of(module: nn.Module) -> Callable[[], Any] | None:
    for name in ("fuse", "reparameterize", "switch_to_deploy"):
        if callable(method := getattr(module, name, None)):
            try:
                inspect.signature(method).bind()
            except (TypeError, ValueError):  # one that wants something is no merge
                continue
            return cast(Callable[[], Any], method)
    return None


def _watch(model: nn.Module, inputs: Inputs) -> _Decision:
    with Visit(model, inputs) as visit:
        return contextvars.copy_context().run(_decide, visit.twin(fake=False).model, inputs)


def _decide(twin: nn.Module, inputs: Inputs) -> _Decision:
    watch = Watch(twin)
    _outputs(watch.run, inputs)
    twin.double()
    modules = dict(twin.named_modules())
    kernels = {name: _kernels(module, watch.layers.get(name)) for name, module in modules.items() if is_layer(module)}
    folded: dict[str, tuple[str, ...]] = {}
    decision, left = _Decision(), {}
    for name, module in modules.items():
        if not is_norm(module):
            continue
        norm, why = _foldable(watch, name, kernels)
        if norm is None:
            left[name] = why
            continue
        decision.norms[name], folded[name] = norm, tuple(sorted(watch.norms[name].others))
        for layer in folded[name]:
            decision.kernels[layer] = cast(Kernels, kernels[layer]).scaled(norm.scale, norm.shift)
    written_out, constant = {}, []
    for name, found in kernels.items():
        module = modules[name]
        contextual = isinstance(module, CoConv2d)
        if found is None:
            if contextual:
                left[name] = f"its class, {type(module).__name__}, does more than to convolve with constant kernels"
        elif contextual or _computes_weight(module, found):
            decision.kernels.setdefault(name, found)
            if contextual:
                written_out[name] = cast(CoConv2d, module).levels
            else:
                constant.append(name)
    decision.report = Deployment(written_out, tuple(constant), folded, left=left)
    return decision


def _kernels(module: nn.Module, seen: Seen | None) -> Kernels | None:
    if seen is not None:
        return None if (image := seen.images()) is None else read_kernels(module, image)
    if not isinstance(module, nn.Conv2d) or (weight := next(module.parameters(), None)) is None:
        return None
    return read_kernels(module, torch.randn(1, module.in_channels, _SIDE, _SIDE).to(weight))


def _computes_weight(module: nn.Module, kernels: Kernels) -> bool:
    weight = module._parameters.get("weight")
    return weight is None or weight.data_ptr() != kernels.weight.data_ptr()


def _foldable(watch: Watch, name: str, kernels: Mapping[str, Kernels | None]) -> tuple[Norm | None, str]:
    """What a norm does if it can be folded into the layers before it, or why it cannot."""
    seen = watch.norms.get(name)
    if seen is None:
        return None, "it does not run"
    if seen.otherwise:
        return None, "its input is not what a convolution or a linear layer gives"
    for layer in sorted(seen.others):
        if watch.layers[layer].otherwise:
            return None, f"what {layer} gives is read by others as well"
        if watch.layers[layer].others != {name}:
            return None, f"what {layer} gives is read by other norms as well"
        if kernels[layer] is None:
            return None, f"{layer} does more than to multiply with constant numbers"
    image = seen.images()
    norm = None if image is None else read_norm(seen.module, image)
    return norm, "it does more than to scale, shift and activate with constant numbers"


def _replace(model: nn.Module, decision: _Decision) -> nn.Module:
    """Put plain modules in the place of others, wherever a network holds them."""
    made: dict[nn.Module, nn.Module] = {}
    for name, kernels in decision.kernels.items():
        layer = model.get_submodule(name)
        made[layer] = kernels.module(layer)
    for name, norm in decision.norms.items():
        module = model.get_submodule(name)
        made[module] = nn.Identity() if norm.act is None else module.get_submodule(norm.act)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in made:
                module._modules[name] = made[child]
    return made.get(model, model)


def _forget_conversion(model: nn.Module, undo: ExitStack) -> None:
    """Leave nothing of what a conversion leaves with a network."""
    for module in model.modules():
        note_plan(module, None, undo)
        if is_guarded(module):
            set_guard(module, None, undo)
    keep_levels_in_merges(model, undo)


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor], rounded: list[torch.Tensor]) -> float:
    """By how much what is computed differs, relative to the largest number.

    Args:
        found: What the deployed network computes.
        expected: What the network computes.
        rounded: What it computes with other weights that differ by rounding.

    Raises:
        DeploymentError: If it differs by more than rounding.
    """
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        raise DeploymentError("the deployed network would not return what the network returns")
    apart = max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    least = max((_ROUNDING * torch.finfo(t.dtype).eps for t in expected if t.is_floating_point()), default=0.0)
    allowed = max(_ROUNDING * difference(a, b) for a, b in zip(rounded, expected, strict=True)) if rounded else 0.0
    if not apart <= max(least, allowed):
        raise DeploymentError(
            f"the deployed network would compute something else, by {apart:.1e} of the largest number: its code may "
            "use convolutions or norms in a way that one forward pass does not show"
        )
    return apart
