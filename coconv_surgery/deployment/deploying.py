"""Make a copy of a network that is fit for inference and export."""

import contextvars
import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn as nn
from timm.layers import Conv2dSame
from torch.utils._pytree import tree_map_only

from coconv_surgery.deployment.comparing import difference
from coconv_surgery.deployment.graphs import nodes_to_modules
from coconv_surgery.deployment.kernels import Kernels, is_as_it_is, is_layer, read_kernels
from coconv_surgery.deployment.norms import Norm, is_norm, read_norm
from coconv_surgery.deployment.report import Deployment, DeploymentError
from coconv_surgery.deployment.watching import Watch
from coconv_surgery.layers.arguments import instance
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.layers.rollback import deep_restorer
from coconv_surgery.merging import keep_levels_in_merges
from coconv_surgery.planning.notes import attributes_kept_by, is_guarded, note_plan, set_guard
from coconv_surgery.tracing.convertible import check_convertible
from coconv_surgery.tracing.copying import separate_copy
from coconv_surgery.tracing.inputs import BlankInputs, Inputs, InputSize, infer_inputs
from coconv_surgery.tracing.objects import in_short, tensors_in
from coconv_surgery.tracing.unseen import unseen
from coconv_surgery.tracing.visit import Visit

_ATTRIBUTE = "_coconv_deployment"
_HIDDEN = "its code may use convolutions or norms in a way that one forward pass does not show"
_ROUNDED = 100  # times what the rounding of weights changes


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
    if any(parameter.is_meta for parameter in model.parameters()):
        raise DeploymentError("the network is on the meta device, without numbers: load its weights first")
    deployed = separate_copy(model).eval()
    with unseen(model):
        deployed, merged, refused = _merge_blocks(deployed)
        refused |= nodes_to_modules(deployed)
        decision = _watch(deployed, inputs)
        inside = tuple(f"{block}." if block else "" for block in merged)
        there = {name for name, _ in model.named_modules()}
        names = {name for name in decision.names & there if not name.startswith(inside)}
        expected, rounded = _run(model, inputs, names), _run(model, inputs, names, _round_weights)
        deployed = _replace(deployed, decision)
        with ExitStack() as undo:
            _forget_conversion(deployed, undo)
            undo.pop_all()
        apart = _compare(_run(deployed, inputs, names), expected, rounded)
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


@dataclass
class _Decision:
    """What is to become of a network's modules, by name."""

    kernels: dict[str, tuple[Kernels, torch.dtype]] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    report: Deployment = field(default_factory=Deployment)

    @property
    def names(self) -> set[str]:
        """Modules that give the same as before."""
        folded = {layer for layers in self.report.folded.values() for layer in layers}
        return {*self.norms, *self.kernels} - folded


# What a network computes: the tensors that it returns by the name "outputs", samples of those of its modules by theirs.
_Computed = dict[str, list[torch.Tensor]]
_OUTPUTS = "outputs"
_SAMPLE = 256


def _with_numbers(inputs: Inputs) -> Inputs:
    """Inputs without blank images, on which little of a network would be seen to differ."""
    if isinstance(inputs, BlankInputs):
        raise ValueError(f"an image of {inputs} is too large to run the network on: give a smaller input_size")
    generator = torch.Generator("cpu").manual_seed(0)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.is_meta or tensor.any():
            return tensor
        return torch.rand(tensor.shape, generator=generator).to(tensor)

    args, kwargs = tree_map_only(torch.Tensor, fill, (tuple(inputs.args), dict(inputs.kwargs)))
    return replace(inputs, args=args, kwargs=kwargs)


def _run(
    model: nn.Module, inputs: Inputs, names: Collection[str], change: Callable[[nn.Module], object] | None = None
) -> _Computed:
    """What a copy of a network computes in evaluation mode, if need be after a change.

    Args:
        model: The network.
        inputs: What to run it on.
        names: Modules whose outputs to sample.
        change: A change.
    """

    def run(twin: nn.Module) -> _Computed:
        if change is not None:
            change(twin)
        computed: _Computed = {}
        for name, module in twin.named_modules():
            if name in names:
                module.register_forward_hook(functools.partial(_sample, computed.setdefault(name, [])))
        computed[_OUTPUTS] = _outputs(inputs.run, twin)
        return computed

    with Visit(model, inputs) as visit:
        return contextvars.copy_context().run(run, visit.twin(fake=False).model)


def _sample(samples: list[torch.Tensor], module: nn.Module, args: Any, output: Any) -> None:
    for tensor in tensors_in(output):
        samples.append(tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLE)].clone())


def _round_weights(model: nn.Module) -> None:
    """Change every weight by as much as rounding may."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, dtype=torch.float32) - 0.5
            tensor.data = tensor.data * (1 + 2 * torch.finfo(tensor.dtype).eps * noise).to(tensor)


def _outputs(run: Callable[..., Any], *args: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return [tensor.detach().clone() for tensor in tensors_in(run(*args))]
    except Exception as error:  # the network's own code
        raise DeploymentError(f"the network does not run on the inputs to deploy it for: {in_short(error)}") from error


def _merge_blocks(model: nn.Module) -> tuple[nn.Module, list[str], dict[str, str]]:
    """Let the blocks of a network that can merge their branches do so, in the way of timm's ``reparameterize_model``.

    Returns:
        The network, the names of those that did, and why others did not.
    """
    names: dict[str, None] = {}
    refused: dict[str, str] = {}
    became: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> nn.Module:
        if module in became:
            return became[module]
        became[module] = module
        if (merge := _merge_of(module)) is not None:
            with ExitStack() as undo:
                undo.callback(deep_restorer(module))
                try:
                    result = merge()
                except Exception as error:  # the block's own code, or levels that do not agree
                    refused[path] = in_short(error)
                else:
                    undo.pop_all()
                    names[path] = None
                    became[module] = result.eval() if isinstance(result, nn.Module) else module
                    return became[module]
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = visit(child, f"{path}.{name}".lstrip("."))
        return module

    return visit(model, ""), list(names), refused


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
    modules = dict(twin.named_modules())
    layers = {name: module for name, module in modules.items() if is_layer(module)}
    dtypes = {name: _dtype_of(module) for name, module in layers.items()}
    twin.double()
    kernels = _KernelsOf(layers, watch)
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
            changed = cast(Kernels, kernels[layer]).scaled(norm.scale, norm.shift)
            decision.kernels[layer] = changed, dtypes[layer]
    written_out, constant = {}, []
    for name, module in layers.items():
        contextual = isinstance(module, CoConv2d)
        if not contextual and not _computes_weight(module):
            continue
        if (found := kernels[name]) is None:
            left[name] = f"its class, {type(module).__name__}, does more than to convolve with constant kernels"
            continue
        decision.kernels.setdefault(name, (found, dtypes[name]))
        if contextual:
            written_out[name] = cast(CoConv2d, module).levels
        else:
            constant.append(name)
    decision.report = Deployment(written_out, tuple(constant), folded, left=left)
    return decision


class _KernelsOf(dict[str, Kernels | None]):
    """Kernels of layers by name, read when they are asked for."""

    def __init__(self, layers: Mapping[str, nn.Module], watch: Watch) -> None:
        super().__init__()
        self._layers, self._watch = layers, watch

    def __missing__(self, name: str) -> Kernels | None:
        layer, seen = self._layers[name], self._watch.layers.get(name)
        # One that has not run is written out for batched images.
        rank = 4 if seen is None and isinstance(layer, nn.Conv2d) else None if seen is None else seen.rank
        self[name] = None if rank is None else read_kernels(layer, rank)
        return self[name]


def _dtype_of(module: nn.Module) -> torch.dtype:
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    return next((tensor.dtype for tensor in tensors), torch.get_default_dtype())


def _computes_weight(module: nn.Module) -> bool:
    """Whether a layer may compute its weight, or convolve with something else than it."""
    inherits = isinstance(module, nn.Conv2d) and type(module)._conv_forward is nn.Conv2d._conv_forward
    plain = inherits and type(module).forward in (nn.Conv2d.forward, Conv2dSame.forward)
    return not is_as_it_is(module) and not (plain and "weight" in module._parameters and not module._forward_pre_hooks)


def _foldable(watch: Watch, name: str, kernels: _KernelsOf) -> tuple[Norm | None, str]:
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
        if (found := kernels[layer]) is None:
            return None, f"{layer} does more than to multiply with constant numbers"
        # As many dimensions as batched maps of the layer have: others would be normalised along another one.
        if seen.rank is not None and seen.rank != found.weight.dim():
            return None, f"it does not norm what {layer} gives by output channel"
    norm = None if seen.rank is None else read_norm(seen.module, seen.rank)
    return norm, "it does more than to scale, shift and activate with constant numbers"


def _replace(model: nn.Module, decision: _Decision) -> nn.Module:
    """Put plain modules in the place of others, wherever a network holds them: in lists and attributes as well."""
    made: dict[int, Any] = {}
    for name, (kernels, dtype) in decision.kernels.items():
        made[id(model.get_submodule(name))] = kernels.module(dtype)
    for name, norm in decision.norms.items():
        module = model.get_submodule(name)
        made[id(module)] = nn.Identity() if norm.act is None else module.get_submodule(norm.act)
    replaced: nn.Module = copy.deepcopy(model, made)
    return replaced


def _forget_conversion(model: nn.Module, undo: ExitStack) -> None:
    """Leave nothing of what a conversion leaves with a network."""
    for module in model.modules():
        note_plan(module, None, undo)
        if is_guarded(module):
            set_guard(module, None, undo)
    keep_levels_in_merges(model, undo)


def _compare(found: _Computed, expected: _Computed, rounded: _Computed) -> float:
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
            allowed = _ROUNDED * max(least, difference(rounded[name][number], theirs) if alike else least)
            if differs > allowed:
                what = "its outputs" if name == _OUTPUTS else name
                raise DeploymentError(
                    f"the deployed network would compute something else, by {differs:.1e} of the largest number in "
                    f"{what}: {_HIDDEN}"
                )
            if not math.isnan(differs):
                apart.setdefault(name, []).append(differs)
    if not apart and len(expected) > 1:
        raise DeploymentError("what the network computes on these inputs holds no numbers to compare: give others")
    return max(apart.get(_OUTPUTS) or [number for numbers in apart.values() for number in numbers] or [0.0])


def _shapes(tensors: list[torch.Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]
