"""What is to become of the convolutions and norms of a network, as one watched pass shows them."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn as nn
from timm.layers import Conv2dSame

from coconv_surgery.deployment.checking import COPY_DOES_NOT_RUN, outputs_of
from coconv_surgery.deployment.kernels import Kernels, is_as_it_is, is_layer, read_kernels
from coconv_surgery.deployment.norms import Norm, is_norm, read_norm
from coconv_surgery.deployment.report import Deployment
from coconv_surgery.deployment.watching import Watch
from coconv_surgery.layers.conv import CoConv2d
from coconv_surgery.tracing.inputs import Inputs
from coconv_surgery.tracing.visit import on_a_copy


@dataclass
class Decision:
    """What is to become of a network's modules, by name."""

    kernels: dict[str, tuple[Kernels, torch.dtype]] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    report: Deployment = field(default_factory=Deployment)

    @property
    def names(self) -> set[str]:
        """Modules that give the same as before."""
        folded = {layer for layers in self.report.folded.values() for layer in layers}
        return {*self.norms, *self.kernels} - folded


def decide(model: nn.Module, inputs: Inputs) -> Decision:
    """Watch a copy of a network run, and decide what is to become of its modules.

    Args:
        model: The network.
        inputs: What to run it on.

    Raises:
        DeploymentError: If it does not run.
    """
    return on_a_copy(model, inputs, functools.partial(_decide_by, inputs=inputs))


def _decide_by(twin: nn.Module, inputs: Inputs) -> Decision:
    watch = Watch(twin)
    outputs_of(watch.run, inputs, otherwise=COPY_DOES_NOT_RUN)
    modules = dict(twin.named_modules())
    layers = {name: module for name, module in modules.items() if is_layer(module)}
    dtypes = {name: _dtype_of(module) for name, module in layers.items()}
    twin.double()
    kernels = _KernelsOf(layers, watch)
    folded: dict[str, tuple[str, ...]] = {}
    decision, left = Decision(), {}
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
        if not isinstance(module, CoConv2d) and not _computes_weight(module):
            continue
        if (found := kernels[name]) is None:
            left[name] = f"its class, {type(module).__name__}, does more than to convolve with constant kernels"
            continue
        decision.kernels.setdefault(name, (found, dtypes[name]))
        if not isinstance(module, CoConv2d):
            constant.append(name)
        elif module.contextual_levels is not None:
            written_out[name] = module.levels
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
    dtypes = (tensor.dtype for tensor in (*module.parameters(), *module.buffers()))
    return next((dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), torch.get_default_dtype())


def _computes_weight(module: nn.Module) -> bool:
    """Whether a layer may compute its weight, or convolve with something else than it."""
    inherits = isinstance(module, nn.Conv2d) and type(module)._conv_forward is nn.Conv2d._conv_forward
    plain = inherits and type(module).forward in (nn.Conv2d.forward, Conv2dSame.forward)
    return not is_as_it_is(module) and not (plain and "weight" in module._parameters)


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
    if seen.module.training:
        return norm, "the network keeps it in training mode, where it norms by the images at hand"
    return norm, "it does more than to scale, shift and activate with constant numbers"
